"""InternViT's layers: as they are, one kernel after the other, as a CUDA graph, with cuDNN's attention.

`unfused` is what they were before: three products for queries, keys and values, norms of several kernels.
Layers are alike, so a few of them stand for all: tiles a second are of the whole stack, scaled.
Shape legend: T tiles, P patches of a tile + class token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.rows import PEAK_FLOPS, encoder_flops, randomise
from benchmarks.gpu_parts.variants import Row, Run, Timing, Variant, captured, compare, random
from nvlm_train.config.model_schema import VisionConfig
from nvlm_train.geometry import patches_per_side
from nvlm_train.parallel.topology import device
from nvlm_train.vision.attention import attend
from nvlm_train.vision.intern_vit import Layer

EAGER: Callable[[Layer, Tensor], Tensor] = Layer.forward.__wrapped__  # type: ignore[attr-defined]
"""A layer one kernel after the other, wherever it runs."""


def unfused(layer: Layer, x_TPH: Tensor) -> Tensor:
    """A layer with three products for queries, keys and values, and norms of several kernels."""

    def norm(states: Tensor, scale: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        factor = torch.rsqrt(length.square() / states.shape[-1] + eps)
        return scale * (states.float() * factor).to(states.dtype)

    attention: Any = layer.attention
    before: Any = layer.layernorm_before
    after: Any = layer.layernorm_after
    normed = norm(x_TPH, before.weight, before.eps)
    query, key, value = (F.linear(normed, weight) for weight in attention.qkv.weight.chunk(3))
    query = norm(query, attention.q_norm.weight, before.eps)
    key = norm(key, attention.k_norm.weight, before.eps)
    attended = attention.projection_layer(attend(query, key, value, attention.num_heads))
    x_TPH = torch.addcmul(x_TPH, layer.lambda_1, attended)
    wide = layer.mlp(norm(x_TPH, after.weight, after.eps))
    return torch.addcmul(x_TPH, layer.lambda_2, wide)


def encoder_rows(
    name: str, vision: VisionConfig, layers: int, batches: Sequence[int], timing: Timing
) -> list[Row]:
    """Rows for each batch size."""
    torch.manual_seed(0)
    with torch.device(device()):
        stack = [Layer(vision) for _ in range(layers)]
    for layer in stack:
        randomise(layer)
        layer.to(torch.bfloat16).requires_grad_(False)

    def through(function: Callable[[Layer, Tensor], Tensor], x_TPH: Tensor) -> Run:
        return _through([partial(function, layer) for layer in stack], x_TPH)

    def variants(x_TPH: Tensor) -> list[Variant]:
        # As they are, layers run compiled on a GPU (vision/compiled.py).
        return [
            Variant("unfused", lambda: through(unfused, x_TPH)),
            Variant("fused", lambda: through(EAGER, x_TPH)),
            Variant("as_is", lambda: _through(stack, x_TPH)),
            Variant("fused_graph", lambda: captured(through(EAGER, x_TPH)), needs_cuda=True),
            Variant("as_is_graph", lambda: captured(_through(stack, x_TPH)), needs_cuda=True),
            Variant("fused_cudnn", lambda: _with_cudnn(through(EAGER, x_TPH)), needs_cuda=True),
        ]

    rows = []
    for batch in batches:
        x_TPH = random(batch, patches_per_side(vision) ** 2 + 1, vision.hidden_size).detach()
        reference = _through([_in_fp32(layer) for layer in stack], x_TPH.float())
        found = compare(f"encoder_{name}", reference, variants(x_TPH), timing)
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
        output = EAGER(layer.float(), x_TPH)
        layer.to(torch.bfloat16)
        return output

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
