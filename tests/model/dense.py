"""X and H in plain torch with an explicit mask: one process, no megatron-core, no spans.

The mask is made from the rule of the paper, tile by tile and token by token, from what the encoder
says about pieces; the model's own path never sees it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nvlm_train.batch import Microbatch
from nvlm_train.config.model_schema import ModelConfig
from nvlm_train.data.samples.chat_format import Piece
from nvlm_train.tiling import ImageLayout


def allowed_tiles(
    pieces_of: Sequence[Sequence[tuple[Piece, int]]],
    images_of: Sequence[Sequence[ImageLayout]],
    length: int,
) -> Tensor:
    """bool [S, T] by the rule: a tag sees its tile; other text the tiles of images that ended before it.

    Args:
        pieces_of: per sample its pieces with their token counts.
        images_of: per sample how its images are cut.
        length: of the pack.
    """
    num_tiles = sum(image.num_tiles for images in images_of for image in images)
    allowed = torch.zeros(length, num_tiles, dtype=torch.bool)
    position = first = 0
    for pieces, images in zip(pieces_of, images_of, strict=True):
        waiting = list(images)
        ended: list[int] = []
        start_of_image, tag_number = first, 0
        for piece, count in pieces:
            rows = slice(position, position + count)
            if piece.text.startswith("</Image>"):
                image = waiting.pop(0)
                ended += range(start_of_image, start_of_image + image.num_tiles)
                start_of_image += image.num_tiles
                tag_number = 0
            if piece.text.startswith("<tile_"):
                allowed[rows, start_of_image + tag_number] = True
                tag_number += 1
            else:
                allowed[rows, ended] = True
            position += count
        first = start_of_image
    return allowed


def forward(
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    microbatch: Microbatch,
    features: Tensor,
    allowed_ST: Tensor,
) -> Tensor:
    """Logits [S, V] of one pack.

    Args:
        model: architecture x or h.
        weights: whole tensors by canonical name.
        microbatch: ids and where samples begin.
        features: [T, tokens per tile, feature size].
        allowed_ST: bool [S, T].
    """
    language, context = model.language, microbatch.context
    projected = _project(weights, features)
    if model.resampler is not None and len(projected):
        projected = torch.stack([_resample(model, weights, tile) for tile in projected])
    table = weights["language_model.embedding.word_embeddings.weight"]
    hidden = table[microbatch.token_ids_S]
    states, mask_SC = None, None
    if context is not None:
        hidden = hidden.index_copy(
            0, microbatch.image_positions, projected[context.decoder_tiles].flatten(0, 1)
        )
        states = torch.zeros(context.length, hidden.shape[1])
        states = states.index_copy(
            0, context.tile_positions, projected[context.cross_tiles].flatten(0, 1)
        )
        states = states.index_copy(0, context.tag_positions, table[context.tag_ids])
        owner_C = _owners(context.length, context.tile_positions, projected.shape[1])
        mask_SC = allowed_ST[:, context.cross_tiles][:, owner_C]
    else:
        hidden = hidden.index_copy(0, microbatch.image_positions, projected.flatten(0, 1))
    segments = torch.bucketize(
        torch.arange(len(hidden)), microbatch.cu_seqlens[1:].long(), right=True
    )
    for number in range(1, language.num_layers + 1):
        prefix = f"language_model.decoder.layers.{number - 1}."
        layer = {
            name.removeprefix(prefix): value
            for name, value in weights.items()
            if name.startswith(prefix)
        }
        hidden = hidden + _self_attention(model, layer, hidden, segments, microbatch.cu_seqlens)
        if "cross_attention.linear_q.weight" in layer and states is not None:
            hidden = hidden + _cross(model, layer, hidden, states, mask_SC)
            if "cross_feed_forward.norm.weight" in layer:
                hidden = hidden + _gated_feed_forward(layer, hidden, mask_SC)
        normed = _norm(hidden, layer["pre_mlp_layernorm.weight"])
        hidden = hidden + _mlp(
            normed, layer["mlp.linear_fc1.weight"], layer["mlp.linear_fc2.weight"]
        )
    hidden = _norm(hidden, weights["language_model.decoder.final_layernorm.weight"])
    return hidden @ weights["language_model.output_layer.weight"].T


def _project(weights: Mapping[str, Tensor], features: Tensor) -> Tensor:
    normed = F.layer_norm(
        features, features.shape[-1:], weights["projector.norm.weight"],
        weights["projector.norm.bias"], 1e-5,
    )  # fmt: skip
    if "projector.mlp.weight" in weights:
        return normed @ weights["projector.mlp.weight"].T
    between = F.gelu(normed @ weights["projector.mlp.linear_fc1.weight"].T)
    return between @ weights["projector.mlp.linear_fc2.weight"].T


def _resample(model: ModelConfig, weights: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """One tile's latents."""
    language = model.language
    groups, heads = language.num_kv_heads, language.num_heads
    channels = language.hidden_size // heads
    latents = weights["resampler.latents"]
    assert model.resampler is not None
    for number in range(model.resampler.num_layers):
        layer = {
            name.removeprefix(f"resampler.layer_{number}."): value
            for name, value in weights.items()
        }
        normed = _norm(latents, layer["latent_norm.weight"])
        both = torch.cat([_norm(features, layer["feature_norm.weight"]), normed])
        query = (normed @ layer["linear_q.weight"].T).unflatten(
            -1, (groups, heads // groups, channels)
        )
        kv = (both @ layer["linear_kv.weight"].T).unflatten(-1, (groups, 2, channels))
        everything = torch.ones(len(latents), len(both), dtype=torch.bool)
        output = _attention(query, kv[:, :, 0], kv[:, :, 1], everything)
        latents = latents + output @ layer["linear_proj.weight"].T
        normed = _norm(latents, layer["mlp_norm.weight"])
        latents = latents + _mlp(
            normed, layer["mlp.linear_fc1.weight"], layer["mlp.linear_fc2.weight"]
        )
    return _norm(latents, weights["resampler.norm.weight"])


def _owners(length: int, tile_positions: Tensor, per_tile: int) -> Tensor:
    """Number of the cross-routed tile that each context token belongs to; a tag comes before its tile."""
    ends = tile_positions.view(-1, per_tile)[:, -1]
    return torch.bucketize(torch.arange(length), ends)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def _mlp(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    gate, up = (x @ fc1.T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ fc2.T


def _self_attention(
    model: ModelConfig,
    layer: Mapping[str, Tensor],
    hidden: Tensor,
    segments: Tensor,
    bounds: Tensor,
) -> Tensor:
    language = model.language
    groups, heads = language.num_kv_heads, language.num_heads
    channels = language.hidden_size // heads
    normed = _norm(hidden, layer["input_layernorm.weight"])
    qkv = (
        normed @ layer["self_attention.linear_qkv.weight"].T
        + layer["self_attention.linear_qkv.bias"]
    )
    qkv = qkv.unflatten(-1, (groups, heads // groups + 2, channels))
    query, key, value = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    positions = torch.arange(len(hidden)) - bounds.long()[segments]
    query, key = (
        _rope(query, positions, language.rope_theta),
        _rope(key, positions, language.rope_theta),
    )
    causal = torch.ones(len(hidden), len(hidden)).tril().bool()
    allowed = causal & (segments[:, None] == segments[None])
    output = _attention(query, key, value, allowed)
    return output @ layer["self_attention.linear_proj.weight"].T


def _rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    channels = x.shape[-1]
    rates = theta ** (-torch.arange(0, channels, 2).float() / channels)
    angles = (positions[:, None] * rates).repeat(1, 2)
    angles = angles.view(len(x), *[1] * (x.dim() - 2), channels)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def _cross(
    model: ModelConfig, layer: Mapping[str, Tensor], hidden: Tensor, states: Tensor, mask: Tensor
) -> Tensor:
    language = model.language
    groups, heads = language.num_kv_heads, language.num_heads
    channels = language.hidden_size // heads
    query = _norm(hidden, layer["pre_cross_attn_layernorm.weight"])
    query = (query @ layer["cross_attention.linear_q.weight"].T).unflatten(
        -1, (groups, heads // groups, channels)
    )
    kv = _norm(states, layer["cross_attention.context_norm.weight"])
    kv = (kv @ layer["cross_attention.linear_kv.weight"].T).unflatten(-1, (groups, 2, channels))
    output = _attention(query, kv[:, :, 0], kv[:, :, 1], mask)
    output = output @ layer["cross_attention.linear_proj.weight"].T
    return torch.tanh(layer["cross_attention.gate.alpha"]) * output


def _gated_feed_forward(layer: Mapping[str, Tensor], hidden: Tensor, mask: Tensor) -> Tensor:
    normed = _norm(hidden, layer["cross_feed_forward.norm.weight"])
    fc1, fc2 = (layer[f"cross_feed_forward.mlp.linear_fc{n}.weight"] for n in (1, 2))
    gate = torch.tanh(layer["cross_feed_forward.gate.alpha"])
    return gate * _mlp(normed, fc1, fc2) * mask.any(dim=1, keepdim=True)


def _attention(
    query_SGRD: Tensor, key_CGD: Tensor, value_CGD: Tensor, allowed_SC: Tensor
) -> Tensor:
    """[S, G * R * D]; a row that may see nothing is zero."""
    scores = torch.einsum("sgrd,cgd->grsc", query_SGRD, key_CGD) / math.sqrt(query_SGRD.shape[-1])
    scores = scores.masked_fill(~allowed_SC, float("-inf"))
    weights = torch.nan_to_num(scores.softmax(dim=-1)) * allowed_SC
    return torch.einsum("grsc,cgd->sgrd", weights, value_CGD).flatten(1)
