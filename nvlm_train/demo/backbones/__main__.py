"""Reproduces the demo's pretrained backbones: `python -m nvlm_train.demo.backbones --out DIR`.

Writes `DIR/language_model` (with its tokenizer), `DIR/vision_encoder` and `DIR/measured.json`.
The shipped copies are in `nvlm_train/demo/assets`.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import Qwen2ForCausalLM

from nvlm_train.demo.backbones.language import SampleMaker, heldout_loss, train_language
from nvlm_train.demo.backbones.tokenizer import save_tokenizer, train_tokenizer
from nvlm_train.demo.backbones.vision import heldout_accuracy, train_vision

logger = logging.getLogger(__name__)

NUM_LANGUAGE_STEPS = 900
NUM_VISION_STEPS = 700


def build_language(folder: Path, num_steps: int, start: Path | None) -> dict[str, float]:
    """Trains and saves tokenizer and language model. Returns what was measured.

    Args:
        folder: where both are saved.
        num_steps: optimizer steps.
        start: a saved language model to go on from; None to start from random weights.
    """
    began = time.monotonic()
    tokenizer = Tokenizer.from_file(str(start / "tokenizer.json")) if start else train_tokenizer()
    maker = SampleMaker(tokenizer)
    previous = Qwen2ForCausalLM.from_pretrained(start) if start else None
    model = train_language(maker, num_steps, previous)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return {
        "language_heldout_loss": heldout_loss(model, maker),
        "language_parameters": model.num_parameters(),
        "language_seconds": time.monotonic() - began,
    }


def build_vision(folder: Path, num_steps: int) -> dict[str, float]:
    """Trains and saves the vision encoder. Returns what its heads read on held-out pages, among others."""
    began = time.monotonic()
    model, heads = train_vision(num_steps)
    model.save_pretrained(folder)
    return {
        "vision_heldout_char_accuracy": heldout_accuracy(model, heads),
        "vision_parameters": model.num_parameters(),
        "vision_seconds": time.monotonic() - began,
    }


def main() -> None:
    """Trains both backbones and writes them to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the assets")
    parser.add_argument("--only", choices=["language", "vision"], help="train just one of the two")
    parser.add_argument("--continue-from", type=Path, help="language model directory to go on from")
    parser.add_argument("--language-steps", type=int, default=NUM_LANGUAGE_STEPS)
    parser.add_argument("--vision-steps", type=int, default=NUM_VISION_STEPS)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    path = options.out / "measured.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    if options.only != "vision":
        measured |= build_language(
            options.out / "language_model", options.language_steps, options.continue_from
        )
    if options.only != "language":
        measured |= build_vision(options.out / "vision_encoder", options.vision_steps)
    path.write_text(json.dumps(measured, indent=2) + "\n")
    logger.info("wrote %s: %s", options.out, measured)


if __name__ == "__main__":
    main()
