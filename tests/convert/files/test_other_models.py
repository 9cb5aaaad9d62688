"""Checkpoints of other models with a Qwen2's sizes: doctor is red, and training does not start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from nvlm_train.config.schema import Recipe
from nvlm_train.convert.reader import language_source
from nvlm_train.doctor.weights import check_weights
from nvlm_train.errors import CheckpointError
from nvlm_train.recipe.load import load_recipe
from tests.convert.files import starts
from tests.convert.files.models import randomise
from tests.workers import WorkerPool

pytestmark = pytest.mark.slow
SIZES: dict[str, Any] = {
    "vocab_size": 640, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "max_position_embeddings": 256, "head_dim": 8,
}  # fmt: skip
BASE = {"rope_theta": 1000.0}
LLAMA_3_1 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 1000.0,
}  # fmt: skip


def qwen2(**changes: Any) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES | {"rope_parameters": dict(BASE)} | changes))


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES | {"rope_parameters": dict(BASE)} | changes))


def qwen3(**changes: Any) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES | {"rope_parameters": dict(BASE)} | changes))


def gemma(**changes: Any) -> nn.Module:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**SIZES | {"rope_parameters": dict(BASE)} | changes))


def mistral(**changes: Any) -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES | {"rope_parameters": dict(BASE)} | changes))


AS_QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
"""Written over another model's config.json: its tensors and other keys must give it away, too."""
NO_BIAS = "model.language.qkv_bias=false"

OTHERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[str], str]] = {
    "Llama 3.1": (
        lambda: llama(rope_parameters=dict(LLAMA_3_1)), {}, [NO_BIAS], "RoPE of the type llama3"
    ),
    "Llama 3.1 called Qwen2": (
        lambda: llama(rope_parameters=dict(LLAMA_3_1)), AS_QWEN2, [NO_BIAS], "RoPE of the type llama3"
    ),
    "Qwen3": (qwen3, {}, [NO_BIAS], "model_type=qwen3"),
    "Qwen3 called Qwen2": (
        qwen3, AS_QWEN2, [NO_BIAS], "unexpected=['model.layers.0.self_attn.k_norm.weight'"
    ),
    "Gemma": (gemma, {}, [NO_BIAS], "model_type=gemma"),
    "Gemma called Qwen2": (gemma, AS_QWEN2, [NO_BIAS], "hidden_act=gelu_pytorch_tanh"),
    "Mistral with a window": (
        lambda: mistral(sliding_window=16), {}, [NO_BIAS], "sliding_window=16"
    ),
    "a window called Qwen2": (
        lambda: qwen2(use_sliding_window=True, sliding_window=16, max_window_layers=1), {}, [],
        "use_sliding_window=true",
    ),
    "Llama with biases": (
        lambda: llama(attention_bias=True), {}, [], "attention_bias=true"
    ),
    "a bias of o_proj": (
        lambda: llama(attention_bias=True), AS_QWEN2, [],
        "unexpected=['model.layers.0.self_attn.o_proj.bias']",
    ),
    "biases that the recipe leaves out": (
        qwen2, {}, [NO_BIAS], "unexpected=['model.layers.0.self_attn.k_proj.bias'"
    ),
    "biases that are not there": (llama, AS_QWEN2 | {"attention_bias": True}, [], "missing=["),
    "linear scaling": (
        lambda: qwen2(rope_parameters={"rope_type": "linear", "factor": 2.0, **BASE}), {}, [],
        "RoPE of the type linear",
    ),
    "yarn": (
        lambda: qwen2(rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **BASE
        }), {}, [], "RoPE of the type yarn",
    ),
    "tied tables": (lambda: qwen2(tie_word_embeddings=True), {}, [], "tie_word_embeddings=true"),
    "more layers": (lambda: qwen2(num_hidden_layers=3), {}, [], "unexpected=['model.layers.2."),
}  # fmt: skip


def written(model: nn.Module, changes: dict[str, Any], directory: Path) -> Path:
    """What save_pretrained wrote, with these keys of config.json written over."""
    randomise(model).save_pretrained(directory)  # type: ignore[operator]
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


def arguments(weights: Path, run_dir: Path, *more: str) -> list[str]:
    """The smoke recipe on a language model of the sizes above."""
    language = {
        "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 48,
        "norm_eps": 1e-5, "rope_theta": 1000.0, "weights": weights,
    }  # fmt: skip
    fields = [f"model.language.{key}={value}" for key, value in language.items()]
    return ["experiment=smoke", f"run_dir={run_dir}", *fields, *more]


def doctor_errors(recipe: Recipe) -> str:
    return "\n".join(each.text for each in check_weights(recipe) if each.level == "error")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Overrides of a recipe on each of the other models."""
    root, found = tmp_path_factory.mktemp("others"), {}
    for number, (name, (make, changes, more, _)) in enumerate(OTHERS.items()):
        directory = written(make(), changes, root / f"weights-{number}")
        found[name] = arguments(directory, root / f"run-{number}", *more)
    return found


@pytest.fixture(scope="module")
def refused(workers: WorkerPool, recipes: dict[str, list[str]]) -> list[dict[str, str]]:
    """What training says to each, on each of two ranks."""
    said = workers.run(2, starts.refusals, *recipes.values())
    return [dict(zip(recipes, each, strict=True)) for each in said]


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_is_refused(
    recipes: dict[str, list[str]], refused: list[dict[str, str]], name: str
) -> None:
    *_, message = OTHERS[name]
    recipe = load_recipe(recipes[name])
    assert message in doctor_errors(recipe)
    with pytest.raises(CheckpointError) as caught, language_source(recipe.model.language):
        pass
    assert message in str(caught.value)
    for said in refused:
        assert said[name].startswith("ConfigError: ") and message in said[name]


def test_nvlm_d_s_dynamic_scaling_is_accepted(tmp_path: Path) -> None:
    own = {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "rope_theta": 1000.0}
    directory = written(qwen2(), own | {"rope_parameters": None}, tmp_path / "weights")
    recipe = load_recipe(arguments(directory, tmp_path / "run"))
    assert doctor_errors(recipe) == ""
    longer = load_recipe(arguments(directory, tmp_path / "run", "stages.sft.sequence_length=257"))
    assert (
        "stages.sft.sequence_length=257 is longer than max_position_embeddings=256"
        in doctor_errors(longer)
    )


def test_one_rank_s_files_end_all_ranks(workers: WorkerPool, tmp_path: Path) -> None:
    """On nodes' own disks: rank 1 has other weights, and rank 0 must not wait for it."""
    written(qwen2(), {}, tmp_path / "weights-0")
    written(qwen2(), {"hidden_act": "gelu"}, tmp_path / "weights-1")
    own = arguments(tmp_path / "weights-{rank}", tmp_path / "run")
    said = workers.run(2, starts.refusals, own)
    assert "hidden_act=gelu" in said[0][0] and said[0] == said[1]


def test_a_model_for_generation_is_refused_alike(workers: WorkerPool, tmp_path: Path) -> None:
    directory = written(qwen2(), {"hidden_act": "gelu"}, tmp_path / "weights")
    (said,) = workers.run(1, starts.untrained, arguments(directory, tmp_path / "run"))
    assert "hidden_act=gelu" in said


def test_a_run_with_a_checkpoint_may_do_without_the_weights(tmp_path: Path) -> None:
    recipe = load_recipe(arguments(tmp_path / "gone", tmp_path / "run"))
    assert "no config.json there" in doctor_errors(recipe)
    (tmp_path / "run/checkpoints/pretrain-00000004").mkdir(parents=True)
    (tmp_path / "run/checkpoints/pretrain-00000004/manifest.json").write_text("{}")
    warnings = [each for each in check_weights(recipe) if each.level == "warning"]
    assert doctor_errors(recipe) == "" and "is not there" in warnings[0].text


def test_the_shipped_weights_are_accepted() -> None:
    for experiment in ("demo", "demo_x", "demo_h", "smoke"):
        levels = {each.level for each in check_weights(load_recipe([f"experiment={experiment}"]))}
        assert levels == {"ok"}
