"""Four decoder layers, forward and backward, by what the backward pass makes again: time against memory.

Shape legend: S tokens of a pack, B batch (always 1), H hidden.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor, nn

from benchmarks.gpu.shapes import Sizes
from benchmarks.gpu_parts.attention import plan_segments
from benchmarks.gpu_parts.layer import LayerProblem, build_layer, layer_config
from benchmarks.gpu_parts.variants import Row, Run, Timing, Variant, compare
from nvlm_train.config.schema import Recompute
from nvlm_train.model.build import RECOMPUTED
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import device

LAYERS = 4
CHOICES: tuple[Recompute, ...] = (
    "none",
    ("norms",),
    ("attention",),
    ("mlp",),
    ("mlp", "norms"),
    "full",
)


def recompute_rows(sizes: Sizes, timing: Timing) -> list[Row]:
    """Each choice of the recipe's `recompute`; `peak_mib` is what a call allocates besides weights."""
    problem = LayerProblem.of(sizes)

    def variant(choice: Recompute) -> Variant:
        name = choice if isinstance(choice, str) else "_".join(choice)
        return Variant(name, partial(_stack, problem, choice))

    return compare(
        "recompute", _stack(problem, "none"), [variant(choice) for choice in CHOICES], timing
    )


def _stack(problem: LayerProblem, choice: Recompute) -> Run:
    """The layers on the kernels that training chooses: output, and the input's gradient."""
    chosen = kernels.detect()
    config = layer_config(problem.sizes, chosen)
    config.gradient_accumulation_fusion = False
    if not isinstance(choice, str):
        config.recompute_granularity = "selective"
        config.recompute_modules = [RECOMPUTED[part] for part in choice]
    layers = [build_layer(config, chosen) for _ in range(LAYERS)]
    with torch.no_grad():
        for layer in layers:
            for name, weight in layer.named_parameters():
                weight.copy_(problem.weights[name])
    rotary = RotaryEmbedding(config.kv_channels, rotary_percent=1.0, rotary_base=1e6)
    angles = rotary(problem.sizes.pack_length + 1, packed_seq=True).to(device())
    packed = plan_segments(problem.sizes).packed()
    hidden = problem.hidden_SBH.detach().to(config.params_dtype).requires_grad_()

    def through(layer: nn.Module, states_SBH: Tensor) -> Tensor:
        output, _ = layer(
            states_SBH, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=packed
        )
        return output  # type: ignore[no-any-return]

    def run() -> tuple[Tensor, ...]:
        states_SBH: Tensor = hidden
        for layer in layers:
            if choice == "full":
                again = partial(through, layer)
                states_SBH = tensor_parallel.checkpoint(again, False, states_SBH)
            else:
                states_SBH = through(layer, states_SBH)
        hidden.grad = None
        states_SBH.backward(problem.output_gradient_SBH.to(config.params_dtype))
        for layer in layers:
            layer.zero_grad()
        return states_SBH, hidden.grad  # type: ignore[return-value]

    return run
