"""Every family against transformers with odd sizes: one KV head, heads of a size of their own, 251 tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm_train.config.schema import ParallelConfig
from tests.convert import language_runs
from tests.convert.conftest import randomised
from tests.convert.test_language import PACKS, assert_close, expected_of
from tests.hugging_face import sizes
from tests.parity.recipes import LANGUAGE
from tests.workers import WorkerPool

TOKENS, ROWS = 251, 256
"""251 is a prime: no layout divides it."""
ALONE = {"single": (1, ParallelConfig()), "PP2": (2, ParallelConfig(pipeline=2))}
LAYOUTS = ALONE | {
    "TP2 SP PP2": (4, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
}


def qwen2(**changes: Any) -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**sizes(LANGUAGE) | changes))


def qwen3(**changes: Any) -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**sizes(LANGUAGE) | changes))


def llama(**changes: Any) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**sizes(LANGUAGE) | changes))


def mistral(**changes: Any) -> torch.nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    own = {"sliding_window": None} | changes
    return MistralForCausalLM(MistralConfig(**sizes(LANGUAGE) | own))


Make = Callable[..., torch.nn.Module]
FAMILIES: dict[str, tuple[Make, dict[str, Any]]] = {
    "qwen2": (qwen2, {"qkv_bias": True}),
    "qwen3": (qwen3, {"qkv_bias": False, "qk_norm": True}),
    "llama": (llama, {"qkv_bias": False}),
    "mistral": (mistral, {"qkv_bias": False}),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """`written(family, key=value)`: the model, and what save_pretrained made of it; each once."""
    made: dict[str, tuple[Any, Path]] = {}

    def write(family: str, **changes: Any) -> tuple[Any, Path]:
        name = f"{family}-{changes}"
        if name not in made:
            model = randomised(FAMILIES[family][0](vocab_size=TOKENS, **changes)).eval()
            directory = tmp_path_factory.mktemp(family)
            model.save_pretrained(directory)
            made[name] = model, directory
        return made[name]

    return write


def compare(
    workers: WorkerPool, model: Any, directory: Path, layout: str, fields: dict[str, Any]
) -> None:
    """Logits of the tokens are transformers', those of the padding minus infinity."""
    world, parallel = LAYOUTS[layout]
    own = {"vocab_size": ROWS, "num_tokens": TOKENS} | fields
    run = partial(language_runs.logits_of, **own)
    found = workers.run(world, run, parallel, directory, PACKS)[-1]
    assert all(logits.shape[1] == ROWS for logits in found)
    assert all(torch.isneginf(logits[:, TOKENS:]).all() for logits in found)
    assert_close([logits[:, :TOKENS] for logits in found], expected_of(model))


@pytest.mark.parametrize("layout", [pytest.param("single", marks=pytest.mark.slow), "TP2 SP PP2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_of_a_size_of_their_own(
    workers: WorkerPool, written: Callable[..., Any], family: str, layout: str
) -> None:
    """Four heads of 24 channels on a width of 64, tied tables where the family often has them."""
    tied = family in ("qwen3", "llama")
    model, directory = written(family, head_dim=24, tie_word_embeddings=tied)
    own = {"head_dim": 24, "tied_embeddings": tied}
    compare(workers, model, directory, layout, FAMILIES[family][1] | own)


@pytest.mark.parametrize("layout", ["single", pytest.param("PP2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_kv_head(
    workers: WorkerPool, written: Callable[..., Any], family: str, layout: str
) -> None:
    model, directory = written(family, num_key_value_heads=1, head_dim=16)
    own = {"num_kv_heads": 1, "head_dim": 16}
    compare(workers, model, directory, layout, FAMILIES[family][1] | own)
