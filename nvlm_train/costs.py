"""What a recipe costs: parameters, FLOPs, bytes. Pure arithmetic on the recipe; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nvlm_train.config.layouts import recomputed_parts
from nvlm_train.config.model_schema import (
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from nvlm_train.config.schema import ParallelConfig, StageConfig
from nvlm_train.convert.vision import kind_of
from nvlm_train.geometry import (
    head_size,
    kv_size,
    num_cross_layers,
    pack_length,
    query_size,
    tile_feature_size,
    tokens_per_tile,
)


def vision_parameters(vision: VisionConfig) -> int:
    """Counts the parameters of the vision encoder: 5.5 B for InternViT-6B with 45 layers.

    Raises:
        ConfigError: the recipe names an unknown kind of encoder.
    """
    return sum(math.prod(shape) for shape in kind_of(vision).shapes(vision).values())


def vision_tile_flops(vision: VisionConfig) -> float:
    """Counts the FLOPs of one tile's forward pass through the encoder's layers.

    Raises:
        ConfigError: the recipe names an unknown kind of encoder.
    """
    kind = kind_of(vision)
    positions = kind.sizes(vision)["positions"]
    products = 2.0 * kind.layer_weights(vision) + 4.0 * positions * vision.hidden_size
    return vision.num_layers * positions * products


def projector_parameters(model: ModelConfig) -> int:
    """Counts the LayerNorm and two linears without biases: 620.7 M at 72B; NVLM-X has one linear."""
    inputs, projector = tile_feature_size(model.vision), model.projector
    weights = projector_weights(inputs, projector, model.language.hidden_size)
    return 2 * inputs + weights + resampler_parameters(model)


def resampler_parameters(model: ModelConfig) -> int:
    """Counts latents, layers of attention and feed-forward with three norms, and one norm at the end."""
    resampler, language = model.resampler, model.language
    if resampler is None:
        return 0
    layer = language_layer_weights(language) + 3 * language.hidden_size
    return resampler.num_layers * layer + (resampler.num_latents + 1) * language.hidden_size


def projector_weights(inputs: int, projector: ProjectorConfig, outputs: int) -> int:
    """Counts the matrix entries of the projector, without its norm."""
    if projector.ffn_hidden_size is None:
        return inputs * outputs
    return inputs * projector.ffn_hidden_size + projector.ffn_hidden_size * outputs


def cross_query_weights(model: ModelConfig) -> int:
    """Counts the matrix entries that a decoder token meets in the cross path of one layer."""
    language, cross = model.language, model.cross_attention
    gated = cross is not None and cross.feed_forward == "gated"
    feed_forward = 3 * language.hidden_size * language.ffn_hidden_size if gated else 0
    return 2 * language.hidden_size * query_size(language) + feed_forward


def cross_context_weights(language: LanguageConfig) -> int:
    """Counts the matrix entries that a context token meets in one layer: its key and its value."""
    return 2 * language.hidden_size * kv_size(language)


def cross_attention_parameters(model: ModelConfig) -> int:
    """Counts queries, keys, values, output, norms on both sides, gates, and the gated feed-forward."""
    cross, hidden = model.cross_attention, model.language.hidden_size
    if cross is None:
        return 0
    norms_and_gates = 2 * hidden + 1
    if cross.feed_forward == "gated":
        norms_and_gates += hidden + 1
    layer = cross_query_weights(model) + cross_context_weights(model.language) + norms_and_gates
    return num_cross_layers(model) * layer


def resampler_products(model: ModelConfig) -> int:
    """Counts the multiplications of the resampler for one tile."""
    resampler, language = model.resampler, model.language
    if resampler is None:
        return 0
    queries, latents = query_size(language), resampler.num_latents
    read = tokens_per_tile(model.vision) + latents
    on_latents = 2 * language.hidden_size * queries + mlp_weights(language)
    scores = 2 * latents * read * queries
    layer = latents * on_latents + read * cross_context_weights(language) + scores
    return resampler.num_layers * layer


def language_layer_weights(language: LanguageConfig) -> int:
    """Counts the matrix entries of one decoder layer (what a token is multiplied with)."""
    attention = 2 * query_size(language) + 2 * kv_size(language)
    return language.hidden_size * attention + mlp_weights(language)


def mlp_weights(language: LanguageConfig) -> int:
    """Counts the matrix entries of the MLP of one decoder layer."""
    return 3 * language.hidden_size * language.ffn_hidden_size


def language_parameters(language: LanguageConfig) -> int:
    """Counts the parameters of the language model; tied embeddings are one table, and count once."""
    hidden = language.hidden_size
    bias = query_size(language) + 2 * kv_size(language) if language.qkv_bias else 0
    norms = 2 * hidden + (2 * head_size(language) if language.qk_norm else 0)
    layer = language_layer_weights(language) + bias + norms
    tables = 1 if language.tied_embeddings else 2
    return language.num_layers * layer + tables * language.vocab_size * hidden + hidden


def part_parameters(model: ModelConfig) -> dict[str, int]:
    """Counts the parameters of each part, by the names that a stage's `trainable` uses."""
    parts = {
        "vision_encoder": vision_parameters(model.vision),
        "projector": projector_parameters(model),
        "cross_attention": cross_attention_parameters(model),
        "language_model": language_parameters(model.language),
    }
    return {part: count for part, count in parts.items() if count}


def rank_memory(model: ModelConfig, stage: StageConfig, precision: str, data_size: int) -> int:
    """Adds up bytes of weights, gradients, optimizer state and encoder on the fullest pipeline stage.

    Gradients are fp32; Adam keeps an fp32 copy and two moments, spread over data-parallel ranks by
    the distributed optimizer. Activations and features in flight come on top.
    """
    width = 2 if precision == "bf16" else 4
    tensor, pipeline = stage.parallel.tensor, stage.parallel.pipeline
    spread = data_size if stage.parallel.distributed_optimizer else 1
    language = model.language
    table = language.vocab_size * language.hidden_size
    tables = 1 if language.tied_embeddings else 2
    layers = (language_parameters(language) - tables * table) / pipeline
    # Both ends hold a table, tied or not; the first stage also holds the projector.
    on_first = {
        "projector": projector_parameters(model) / tensor,
        "cross_attention": cross_attention_parameters(model) / pipeline / tensor,
        "language_model": (layers + table * (tables if pipeline == 1 else 1)) / tensor,
    }
    total = float(vision_parameters(model.vision) * width)
    for part, count in on_first.items():
        total += count * width
        if part in stage.trainable:
            total += count * (4 + 12 / spread)
    return round(total)


def layer_activations(language: LanguageConfig, parallel: ParallelConfig) -> dict[str, float]:
    """Counts the numbers that a rank keeps of a decoder layer for backward, for each token of a pack.

    They are listed by what makes them again: a part of the recipe's `recompute`, or `full` alone. `layer` is
    the layer's input, which nothing makes again. Attention is counted without a matrix of scores, and
    dropout, rotary angles and norms' scales are left out: small numbers beside these.
    """
    tensor = parallel.tensor
    hidden = language.hidden_size / (tensor if parallel.sequence_parallel else 1)
    queries, states = query_size(language) / tensor, kv_size(language) / tensor
    return {
        "layer": hidden,
        "norms": 2 * hidden,
        # The first product's output, and that of SwiGLU, which is half as wide.
        "mlp": 3 * language.ffn_hidden_size / tensor,
        # The rotated keys. Of the queries, what it would be made of again is kept instead.
        "attention": states,
        # What the second norm reads; one product's queries, keys and values; the queries by themselves,
        # rotated or not; the heads' outputs.
        "full": hidden + (queries + 2 * states) + queries + queries,
    }


def activation_bytes(model: ModelConfig, stage: StageConfig, precision: str) -> int:
    """Adds up bytes of the decoder layers' activations on the first pipeline stage, when all are in flight.

    It has 1 / pipeline of the layers, and keeps as many packs of them as there are stages. What is made
    again in backward is not counted: recomputation holds that of one layer at a time. Logits, tiles and the
    cross path come on top.
    """
    parts = layer_activations(model.language, stage.parallel)
    kept = set(parts) - set(recomputed_parts(stage.parallel))
    if stage.parallel.recompute == "full":
        kept = {"layer"}
    numbers = sum(parts[part] for part in kept)
    width = 2 if precision == "bf16" else 4
    return round(numbers * pack_length(stage) * model.language.num_layers * width)


def checkpoint_bytes(model: ModelConfig, stage: StageConfig, precision: str) -> int:
    """Adds up bytes of a stage's checkpoint, in any layout: weights, and what AdamW keeps of what trains.

    The vision encoder never changes and is not saved. AdamW has two fp32 moments, and of bf16 weights an
    fp32 copy.
    """
    width, has_copy = (2, True) if precision == "bf16" else (4, False)
    total = 0
    for part, count in part_parameters(model).items():
        if part != "vision_encoder":
            total += count * width
            total += count * (12 if has_copy else 8) if part in stage.trainable else 0
    return total


@dataclass(frozen=True)
class StepWork:
    """Counts what one optimizer step processed, summed over the world."""

    tokens: int
    """Decoder tokens without padding."""
    attention_pairs: int
    """Sum over samples of length squared; causal attention computes half of the pairs."""
    trained_tokens: int
    tiles: int
    cross_tokens: int = 0
    """Decoder tokens of packs that have a cross-attention context."""
    context_tokens: int = 0
    """Tokens of those contexts."""
    cross_pairs: int = 0
    """Pairs of a decoder token and a context token that it sees."""


@dataclass(frozen=True)
class StepFlops:
    """FLOPs that the model needs for a step, by what computes them."""

    encode: float
    """The frozen encoder's forward pass."""
    layers: float
    """Projector, the language model's layers, and the cross-attention in them."""
    output: float
    """Logits."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.encode + self.layers + self.output


def step_flops(model: ModelConfig, stage: StageConfig, work: StepWork) -> float:
    """Counts model FLOPs of a step (`step_flops_by_part`)."""
    return step_flops_by_part(model, stage, work).total


def step_flops_by_part(model: ModelConfig, stage: StageConfig, work: StepWork) -> StepFlops:
    """Counts model FLOPs of a step; frozen parts count forward, and backward where gradients flow through.

    The vision encoder is always frozen and nothing trainable lies before it: forward only. A frozen
    language model still carries the gradient to the projector (2 of the 3 products), but forms no
    weight gradient. What is computed again in the backward pass to save memory does not count.
    """
    language = model.language
    per_token = 2.0 * language.num_layers * language_layer_weights(language)
    # Past keys and values the last layer sees trained positions only (model/last_layer.py); who asks
    # its attention is not counted here, which leaves a share of one layer's attention too much.
    skipped = 2.0 * (mlp_weights(language) + language.hidden_size * query_size(language))
    skipped *= work.tokens - work.trained_tokens
    attention = 2.0 * language.num_layers * query_size(language) * work.attention_pairs
    logits = 2.0 * language.hidden_size * language.vocab_size * work.trained_tokens
    passes = 3 if "language_model" in stage.trainable else 2
    layers = (
        _projector_flops(model, stage, work)
        + (per_token * work.tokens - skipped) * passes
        # Attention scores have no weights: backward is two products for each forward one either way.
        + attention * 3
        + _cross_flops(model, stage, work)
    )
    return StepFlops(vision_tile_flops(model.vision) * work.tiles, layers, logits * passes)


def _projector_flops(model: ModelConfig, stage: StageConfig, work: StepWork) -> float:
    """Counts a step's FLOPs of the projector and of the resampler behind it."""
    vision = model.vision
    products = 2.0 * projector_weights(
        tile_feature_size(vision), model.projector, model.language.hidden_size
    )
    products += 2.0 * resampler_products(model) / tokens_per_tile(vision)
    # The projector's input needs no gradient: forward and weight gradient.
    passes = 2 if "projector" in stage.trainable else 1
    return products * work.tiles * tokens_per_tile(vision) * passes


def _cross_flops(model: ModelConfig, stage: StageConfig, work: StepWork) -> float:
    """Counts a step's FLOPs of cross-attention: products with weights, and scores, which have none."""
    language, layers = model.language, 2.0 * num_cross_layers(model)
    path = (
        cross_query_weights(model) * work.cross_tokens
        + cross_context_weights(language) * work.context_tokens
    )
    passes = 3 if "cross_attention" in stage.trainable else 2
    return layers * path * passes + layers * 2.0 * query_size(language) * work.cross_pairs * 3
