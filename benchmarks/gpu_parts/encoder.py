"""InternViT's layers: as they are, with fused norms and one qkv product, compiled, and as a CUDA graph.

Layers are alike, so a few of them stand for all: tiles a second are of the whole stack, scaled.
Shape legend: T tiles, P patches of a tile + class token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.rows import PEAK_FLOPS, encoder_flops, randomise
from benchmarks.gpu_parts.variants import Row, Run, Timing, Variant, captured, compare, random
from nvlm_train.config.schema import VisionConfig
from nvlm_train.geometry import patches_per_side
from nvlm_train.parallel.topology import device
from nvlm_train.vision.intern_vit import Layer


class Weights(NamedTuple):
    """Those of a layer, with queries, keys and values in one matrix."""

    before: Tensor
    qkv: Tensor
    query_norm: Tensor
    key_norm: Tensor
    proj: Tensor
    proj_bias: Tensor
    scale_1: Tensor
    after: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    scale_2: Tensor

    @classmethod
    def of(cls, layer: Layer) -> Weights:
        attention, mlp = layer.attention, layer.mlp
        qkv = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        return cls(
            layer.layernorm_before.weight,
            torch.cat(qkv),
            attention.q_norm.weight,
            attention.k_norm.weight,
            attention.projection_layer.weight,
            attention.projection_layer.bias,
            layer.lambda_1,
            layer.layernorm_after.weight,
            mlp.fc1.weight,
            mlp.fc1.bias,
            mlp.fc2.weight,
            mlp.fc2.bias,
            layer.lambda_2,
        )


def fused_layer(x_TPH: Tensor, weights: Weights, heads: int, eps: float) -> Tensor:
    """The layer with torch's fused norm and one product for queries, keys and values."""

    def norm(states: Tensor, scale: Tensor) -> Tensor:
        return F.rms_norm(states, scale.shape, scale, eps)

    query, key, value = F.linear(norm(x_TPH, weights.before), weights.qkv).chunk(3, dim=-1)
    split = (
        states.unflatten(-1, (heads, -1)).transpose(1, 2)
        for states in (norm(query, weights.query_norm), norm(key, weights.key_norm), value)
    )
    attended = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    projected = F.linear(attended, weights.proj, weights.proj_bias)
    x_TPH = torch.addcmul(x_TPH, weights.scale_1, projected)
    wide = F.gelu(F.linear(norm(x_TPH, weights.after), weights.fc1, weights.fc1_bias))
    return torch.addcmul(x_TPH, weights.scale_2, F.linear(wide, weights.fc2, weights.fc2_bias))


def encoder_rows(
    name: str, vision: VisionConfig, layers: int, batches: Sequence[int], timing: Timing
) -> list[Row]:
    """Rows for each batch size; `torch.compile` for the first alone, because it takes long."""
    torch.manual_seed(0)
    with torch.device(device()):
        stack = [Layer(vision) for _ in range(layers)]
    for layer in stack:
        randomise(layer)
        layer.to(torch.bfloat16).requires_grad_(False)
    weights = [Weights.of(layer) for layer in stack]
    heads, eps = vision.num_heads, vision.norm_eps

    def fused(function: Callable[..., Tensor], x_TPH: Tensor) -> Run:
        return _through(
            [partial(function, weights=w, heads=heads, eps=eps) for w in weights], x_TPH
        )

    def variants(x_TPH: Tensor) -> list[Variant]:
        return [
            Variant("as_is", lambda: _through(stack, x_TPH)),
            Variant("fused", lambda: fused(fused_layer, x_TPH)),
            Variant("fused_graph", lambda: captured(fused(fused_layer, x_TPH)), needs_cuda=True),
            Variant("fused_cudnn", lambda: _with_cudnn(fused(fused_layer, x_TPH)), needs_cuda=True),
        ]

    def compiled(x_TPH: Tensor) -> list[Variant]:
        # One graph of the whole stack would take minutes to compile; one of a layer serves all.
        def function() -> Callable[..., Tensor]:
            return torch.compile(fused_layer, dynamic=False)

        return [
            Variant("compiled", lambda: fused(function(), x_TPH), needs_cuda=True),
            Variant("compiled_graph", lambda: captured(fused(function(), x_TPH)), needs_cuda=True),
        ]

    rows = []
    for batch in batches:
        x_TPH = random(batch, patches_per_side(vision) ** 2 + 1, vision.hidden_size).detach()
        ways = variants(x_TPH) + (compiled(x_TPH) if batch == batches[0] else [])
        reference = _through([_in_fp32(layer) for layer in stack], x_TPH.float())
        found = compare(f"encoder_{name}", reference, ways, timing)
        rows += [row | _rates(row, vision, layers, batch) for row in found]
    return rows


def _through(layers: Sequence[Callable[[Tensor], Tensor]], x_TPH: Tensor) -> Run:
    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        states = x_TPH
        for layer in layers:
            states = layer(states)
        return (states,)

    return run


def _with_cudnn(run: Run) -> Run:
    """With cuDNN's attention; torch prefers FlashAttention 2, whose kernels are not Hopper's."""

    def inside() -> Sequence[Tensor]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return run()

    return inside


def _in_fp32(layer: Layer) -> Callable[[Tensor], Tensor]:
    """A layer that is fp32 while it runs: of the large ones, all at once would take too much memory."""

    def function(x_TPH: Tensor) -> Tensor:
        output = layer.float()(x_TPH)
        layer.to(torch.bfloat16)
        return output  # type: ignore[no-any-return]

    return function


def _rates(row: Row, vision: VisionConfig, layers: int, batch: int) -> Row:
    shape = {"batch": batch, "layers": layers}
    if "ms" not in row:
        return shape
    whole_ms = row["ms"] * vision.num_layers / layers
    flops = encoder_flops(vision, batch)
    return shape | {
        "tiles_per_s": round(batch / whole_ms * 1e3, 1),
        "mfu": round(flops / whole_ms * 1e3 / PEAK_FLOPS, 4),
    }
