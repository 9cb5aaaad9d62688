"""`nvlm chat`: asks a trained run one question, in its layout (started by torchrun for TP or PP)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from nvlm_train.config import rules
from nvlm_train.config.schema import Recipe
from nvlm_train.data.dataset import build_encoder
from nvlm_train.errors import SampleError
from nvlm_train.evaluation.generate import generate
from nvlm_train.evaluation.prompts import make_prompt
from nvlm_train.parallel.topology import process_group
from nvlm_train.train.start import trained_replica


def answer(recipe: Recipe, images: Sequence[str], question: str, max_new_tokens: int) -> int:
    """Prints the model's answer on rank 0.

    Raises:
        NvlmError: the run has no checkpoint, or the question does not fit.
    """
    with process_group():
        return _answer(recipe, images, question, max_new_tokens)


def _answer(recipe: Recipe, images: Sequence[str], question: str, max_new_tokens: int) -> int:
    rules.check(recipe, dist.get_world_size())
    name = recipe.schedule[-1]
    encoder = build_encoder(recipe.stages[name], recipe)
    try:
        files = [Path(image).read_bytes() for image in images]
        prompt = make_prompt(encoder, question, files, max_new_tokens)
    except (ValueError, OSError) as error:
        raise SampleError("command line", "question", str(error)) from error
    end = encoder.tokenizer.turn_end
    (ids,) = generate(trained_replica(recipe, name), [prompt], max_new_tokens, end)
    if dist.get_rank() == 0:
        sys.stdout.write(encoder.tokenizer.decode(ids).strip() + "\n")
    return 0
