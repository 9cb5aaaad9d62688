"""Derived numbers against the paper's model and against real parameters."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nvlm_train import costs, geometry
from nvlm_train.config.model_schema import (
    CrossAttentionConfig,
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    TokenizerConfig,
    VisionConfig,
)
from nvlm_train.config.schema import ParallelConfig, Recompute
from nvlm_train.costs import StepWork
from tests.hugging_face import encoder_sizes, sizes
from tests.parity import cross_gradients, cross_recipes, kept, recipes
from tests.workers import WorkerPool

VISION_6B = VisionConfig(
    num_layers=45, hidden_size=3200, num_heads=25, ffn_hidden_size=12800, tile_size=448, patch_size=14
)  # fmt: skip
QWEN2_72B = LanguageConfig(
    num_layers=80, hidden_size=8192, num_heads=64, num_kv_heads=8, ffn_hidden_size=29568,
    vocab_size=152064,
)  # fmt: skip
D_72B = ModelConfig(
    "d", VISION_6B, ProjectorConfig(ffn_hidden_size=29568), QWEN2_72B, TokenizerConfig(path="unused")
)  # fmt: skip


def test_tokens_of_a_tile() -> None:
    assert geometry.patches_per_side(VISION_6B) == 32
    assert geometry.tokens_per_tile(VISION_6B) == 256
    assert geometry.tile_feature_size(VISION_6B) == 12800


def test_parameters_of_the_72b_model() -> None:
    """The projector has 620.7 M; Qwen2-72B has 72.7 B, InternViT 5.5 B."""
    parts = costs.part_parameters(D_72B)
    assert parts["projector"] / 1e6 == pytest.approx(620.7, abs=0.1)
    assert parts["language_model"] == 72_706_203_648
    assert parts["vision_encoder"] / 1e9 == pytest.approx(5.54, abs=0.01)


def test_the_encoders_memory_is_what_the_docs_say() -> None:
    page = Path(__file__).parents[1] / "docs" / "architecture.md"
    said = re.search(r"a whole encoder on every rank \((\S+) GB in bf16", page.read_text())
    assert said is not None
    assert float(said[1]) == round(2 * costs.vision_parameters(VISION_6B) / 1e9, 1) == 11.1


def test_language_parameters_are_those_of_transformers() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    language = QWEN2_72B
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes(language)))
    assert costs.language_parameters(language) == _count(model)


def test_vision_parameters_are_those_of_transformers_and_ours() -> None:
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    from nvlm_train.vision.intern_vit import InternViT

    config = InternVLVisionConfig(**encoder_sizes(VISION_6B))
    with torch.device("meta"):
        models = [InternVLVisionModel(config), InternViT(VISION_6B)]
    assert [_count(model) for model in models] == [costs.vision_parameters(VISION_6B)] * 2


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _counts_of_parts(name: str) -> dict[str, int]:
    """Returns on a worker the parameters of the model that is really built."""
    from nvlm_train.model.global_weights import part_of
    from tests.parity.cross_gradients import start_engine

    engine = start_engine(name, ParallelConfig())
    parts = {"vision_encoder": _count(engine.encoder)}
    for parameter_name, parameter in engine.model.module.named_parameters():
        part = part_of(parameter_name)
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


@pytest.mark.parametrize("name", cross_recipes.ALL)
def test_parameters_of_the_small_models(workers: WorkerPool, name: str) -> None:
    model = cross_recipes.ALL[name]
    assert workers.run(1, _counts_of_parts, name)[0] == costs.part_parameters(model)


def test_cross_attention_at_72b() -> None:
    """Ten layers have 1.51 B, and 7.27 B with feed-forwards of the backbone's width."""
    x_72b = replace(
        D_72B, architecture="x", projector=ProjectorConfig(None),
        cross_attention=CrossAttentionConfig(every=8),
    )  # fmt: skip
    parts = costs.part_parameters(x_72b)
    assert costs.num_cross_layers(x_72b) == 10
    assert parts["cross_attention"] / 1e9 == pytest.approx(1.51, abs=0.005)
    assert parts["projector"] / 1e6 == pytest.approx(104.9, abs=0.1)
    gated = replace(x_72b, cross_attention=CrossAttentionConfig(every=8, feed_forward="gated"))
    more = costs.part_parameters(gated)["cross_attention"] - parts["cross_attention"]
    assert more / 1e9 == pytest.approx(7.27, abs=0.005)


def test_cross_flops_count_both_sides_and_what_they_see() -> None:
    model = cross_recipes.MODELS["x"]
    stage = recipes.stage(ParallelConfig(), trainable=cross_gradients.ALL_PARTS)
    nothing = StepWork(tokens=0, attention_pairs=0, trained_tokens=0, tiles=0)
    hidden, layers = model.language.hidden_size, 2
    for work, forward in (
        (replace(nothing, cross_tokens=10), 2 * layers * 2 * hidden**2 * 10),
        (replace(nothing, context_tokens=10), 2 * layers * 2 * hidden * hidden // 2 * 10),
        (replace(nothing, cross_pairs=10), 2 * layers * 2 * hidden * 10),
    ):
        assert costs.step_flops(model, stage, work) == 3 * forward


def test_memory_falls_with_the_layout() -> None:
    """Weights, gradients and Adam are first on one rank, then shared by more and more ranks."""
    everything = recipes.stage(ParallelConfig())
    parts = costs.part_parameters(recipes.MODEL)
    trained = parts["projector"] + parts["language_model"]
    expected = parts["vision_encoder"] * 4 + trained * (4 + 4 + 12)
    assert costs.rank_memory(recipes.MODEL, everything, "fp32", 1) == expected

    def memory(parallel: ParallelConfig, data_size: int = 1) -> int:
        return costs.rank_memory(recipes.MODEL, recipes.stage(parallel), "fp32", data_size)

    whole = ParallelConfig(distributed_optimizer=False)
    assert memory(whole, 8) == expected
    assert memory(ParallelConfig(), 8) < memory(ParallelConfig(), 2) < expected
    assert memory(ParallelConfig(tensor=2)) - parts["vision_encoder"] * 4 == trained * 20 / 2
    assert memory(ParallelConfig(pipeline=2)) < expected
    frozen = replace(everything, trainable=("projector",))
    assert expected - costs.rank_memory(recipes.MODEL, frozen, "fp32", 1) == (
        parts["language_model"] * 16
    )


def test_flops_count_what_is_computed() -> None:
    """A weight costs six per token when everything trains, and less where parts are frozen."""
    work = StepWork(tokens=1000, attention_pairs=0, trained_tokens=0, tiles=0)
    stage = recipes.stage(ParallelConfig())
    weights = recipes.LANGUAGE.num_layers * costs.language_layer_weights(recipes.LANGUAGE)
    # Without a label, the last layer's output projection and MLP have nothing to do.
    hidden = recipes.LANGUAGE.hidden_size
    last = hidden * (hidden + 3 * recipes.LANGUAGE.ffn_hidden_size)
    weights -= last
    assert costs.step_flops(recipes.MODEL, stage, work) == 6 * weights * 1000
    frozen = recipes.stage(ParallelConfig(), trainable=("projector",))
    assert costs.step_flops(recipes.MODEL, frozen, work) == 4 * weights * 1000
    logits = replace(work, trained_tokens=10)
    table = recipes.LANGUAGE.hidden_size * recipes.LANGUAGE.vocab_size
    assert costs.step_flops(recipes.MODEL, stage, logits) == 6 * (
        weights * 1000 + (last + table) * 10
    )
    tiles = replace(work, tiles=1)
    nothing = recipes.stage(ParallelConfig(), trainable=())
    patches = geometry.patches_per_side(recipes.VISION) ** 2 + 1
    vision = recipes.VISION
    layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.ffn_hidden_size
    encoder = vision.num_layers * patches * (2 * layer + 4 * patches * vision.hidden_size)
    projector = 2 * costs.projector_weights(
        geometry.tile_feature_size(vision), recipes.MODEL.projector, recipes.LANGUAGE.hidden_size
    ) * geometry.tokens_per_tile(vision)  # fmt: skip
    assert costs.step_flops(recipes.MODEL, nothing, tiles) == pytest.approx(
        4 * weights * 1000 + encoder + projector
    )


@pytest.mark.parametrize(
    "recompute",
    ["none", "full", ("norms",), ("mlp",), ("attention",), ("mlp", "norms")],
    ids=lambda each: each if isinstance(each, str) else " and ".join(each),
)
def test_activations_are_those_that_autograd_keeps(
    workers: WorkerPool, recompute: Recompute
) -> None:
    measured = workers.run(1, kept.numbers_of_a_layer, recompute)[0]
    model = replace(recipes.MODEL, language=kept.LANGUAGE)
    stage = recipes.stage(ParallelConfig(recompute=recompute))
    tokens = stage.sequence_length * model.language.num_layers
    predicted = costs.activation_bytes(model, stage, "fp32") / 4 / tokens
    assert predicted == pytest.approx(measured, rel=0.04)


def test_activations_are_those_of_a_pack() -> None:
    """Which may be longer than what a sample is cut at."""
    stage = recipes.stage(ParallelConfig())
    twice = replace(stage, pack_length=2 * stage.sequence_length)
    once = costs.activation_bytes(recipes.MODEL, stage, "bf16")
    assert costs.activation_bytes(recipes.MODEL, twice, "bf16") == 2 * once


def test_activations_are_shared_by_tensor_parallel_ranks() -> None:
    """A sequence is cut where layers are not, and a pipeline's first stage keeps a pack for each stage."""

    def of(precision: str = "fp32", **layout: Any) -> int:
        return costs.activation_bytes(
            recipes.MODEL, recipes.stage(ParallelConfig(**layout)), precision
        )

    assert of(tensor=2, sequence_parallel=True) == of() / 2 == of("bf16")
    assert of() / 2 < of(tensor=2) < of() == of(pipeline=2)
    assert of(recompute="full") == recipes.SEQUENCE_LENGTH * 4 * 64 * 4
