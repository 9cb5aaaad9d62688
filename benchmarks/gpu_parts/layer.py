"""One decoder layer on megatron-core, forward and backward, in the ways that it can be built.

Shape legend: S tokens of a pack, B batch (always 1), H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.random import (
    get_all_rng_states,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.rows import randomise
from benchmarks.gpu.shapes import LANGUAGES, Sizes, make_recipe
from benchmarks.gpu_parts.attention import plan_segments
from benchmarks.gpu_parts.variants import (
    Row,
    Run,
    Timing,
    Variant,
    captured,
    compare,
    in_fp32,
    random,
    with_gradients,
)
from nvlm_train.model.block import decoder_block_spec
from nvlm_train.model.build import transformer_config
from nvlm_train.parallel import kernels
from nvlm_train.parallel.kernels import Kernels
from nvlm_train.parallel.topology import device

TORCH_ONLY = Kernels("megatron", "torch_sdpa", "torch", "torch", weight_gradient="separate")


def layer_config(
    sizes: Sizes, chosen: Kernels, precision: Literal["bf16", "fp32"] = "bf16"
) -> TransformerConfig:
    """megatron-core's config of the language model, as training builds it."""
    recipe = replace(make_recipe("d", sizes), precision=precision)
    return transformer_config(recipe, recipe.stages["sft"], chosen)


@dataclass(frozen=True)
class LayerProblem:
    """What every variant of the layer starts from."""

    sizes: Sizes
    weights: dict[str, Tensor]
    hidden_SBH: Tensor
    output_gradient_SBH: Tensor

    @classmethod
    def of(cls, sizes: Sizes) -> LayerProblem:
        config = layer_config(sizes, TORCH_ONLY)
        layer = build_layer(config, TORCH_ONLY)
        randomise(layer)
        weights = {name: value.detach().clone() for name, value in layer.named_parameters()}
        shape = (sizes.pack_length, 1, config.hidden_size)
        return cls(sizes, weights, random(*shape), random(*shape).detach())


def layer_rows(sizes: Sizes, timing: Timing) -> list[Row]:
    """The layer as training runs it today, and with what megatron-core and CUDA offer besides.

    Weight gradients end in fp32 buffers: in bf16 first and by one addition a weight, or straight into
    them where the variant's name has `buffer`. They are compared too.
    """
    problem = LayerProblem.of(sizes)
    engine = replace(
        kernels.detect(),
        linear="transformer_engine",
        attention="transformer_engine",
        norm="transformer_engine",
    )

    def variant(name: str, chosen: Kernels, *fused: str) -> Variant:
        return Variant(name, lambda: _layer_run(problem, chosen, *fused), chosen is engine)

    def graph(name: str, *fused: str) -> Variant:
        return Variant(name, lambda: _captured_layer(problem, engine, *fused), True)

    return compare(
        "layer",
        _layer_run(problem, TORCH_ONLY, precision="fp32"),
        [
            variant("torch", TORCH_ONLY),
            variant("engine", engine),
            variant("engine_rope", engine, "rope"),
            variant("engine_rope_buffer", engine, "rope", "buffer"),
            graph("engine_rope_graph", "rope"),
            graph("engine_rope_buffer_graph", "rope", "buffer"),
        ],
        timing,
    )


def build_layer(config: TransformerConfig, chosen: Kernels) -> nn.Module:
    """The first layer of the model's decoder."""
    first, *_ = decoder_block_spec(config, None, chosen).layer_specs
    return build_module(first, config=config, layer_number=1).to(device())  # type: ignore[no-any-return]


def _layer_run(
    problem: LayerProblem,
    chosen: Kernels,
    *fused: str,
    precision: Literal["bf16", "fp32"] = "bf16",
) -> Run:
    """Forward and backward over a pack: output, input gradient, and the fp32 buffers by name."""
    config = layer_config(problem.sizes, chosen, precision)
    config.apply_rope_fusion = "rope" in fused
    config.gradient_accumulation_fusion = "buffer" in fused
    layer = build_layer(config, chosen)
    rotary = RotaryEmbedding(config.kv_channels, rotary_percent=1.0, rotary_base=1e6)
    angles = rotary(problem.sizes.pack_length + 1, packed_seq=True)
    packed = plan_segments(problem.sizes).packed()
    dtype = config.params_dtype
    hidden = problem.hidden_SBH.detach().to(dtype).requires_grad_()
    output_gradient = problem.output_gradient_SBH.to(dtype)
    weights = dict(sorted(layer.named_parameters()))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(problem.weights[name])
            weight.main_grad = torch.zeros(weight.shape, device=device())  # type: ignore[attr-defined]
            weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    buffers = [weight.main_grad for weight in weights.values()]  # type: ignore[attr-defined]

    def run() -> tuple[Tensor, ...]:
        # From zero each time, so that they can be compared; the same cost for all.
        torch._foreach_zero_(buffers)
        output, _ = layer(
            hidden, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=packed
        )
        hidden.grad = None
        output.backward(output_gradient)
        _to_buffers(list(weights.values()))
        return output, hidden.grad, *buffers  # type: ignore[return-value]

    return run


def _captured_layer(problem: LayerProblem, chosen: Kernels, *fused: str) -> Run:
    """As one graph. megatron-core's usual generator states cannot be set while a graph is captured."""
    model_parallel_cuda_manual_seed(0, use_cudagraphable_rng=True, force_reset_rng=True)
    try:
        return captured(_layer_run(problem, chosen, *fused), get_all_rng_states().values())
    finally:
        model_parallel_cuda_manual_seed(0, force_reset_rng=True)


def _to_buffers(weights: Sequence[nn.Parameter]) -> None:
    """What megatron-core's DDP does in its hooks."""
    for weight in weights:
        if weight.grad is not None and not weight.grad_added_to_main_grad:  # type: ignore[attr-defined]
            weight.main_grad.add_(weight.grad)  # type: ignore[attr-defined]
        weight.grad = None


# ---- what is between the products ----


def elementwise_rows(sizes: Sizes, timing: Timing) -> list[Row]:
    """RMSNorm and SwiGLU over a pack, forward and backward."""
    language = LANGUAGES[sizes.language]
    hidden = random(sizes.pack_length, language.hidden_size)
    weight = random(language.hidden_size)
    wide = random(sizes.pack_length, 2 * language.ffn_hidden_size)
    of_norm = random(*hidden.shape).detach()
    of_wide = random(sizes.pack_length, language.ffn_hidden_size).detach()

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return F.rms_norm(x, scale.shape, scale, 1e-6)

    def engine_norm() -> Run:
        import transformer_engine.pytorch as te

        module = te.RMSNorm(
            language.hidden_size, eps=1e-6, params_dtype=torch.bfloat16, device=device()
        )
        with torch.no_grad():
            module.weight.copy_(weight)

        def run() -> tuple[Tensor, ...]:
            output = module(hidden)
            return output, *torch.autograd.grad(output, (hidden, module.weight), of_norm)

        return run

    def megatron_swiglu() -> Run:
        from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

        return with_gradients(lambda x: bias_swiglu_impl(x[:, None], None)[:, 0], (wide,), of_wide)

    rows = compare(
        "rms_norm",
        in_fp32(norm, (hidden, weight), of_norm),
        [
            Variant("torch", lambda: with_gradients(norm, (hidden, weight), of_norm)),
            Variant(
                "compiled",
                lambda: with_gradients(
                    torch.compile(norm, dynamic=False), (hidden, weight), of_norm
                ),
                needs_cuda=True,
            ),
            Variant("transformer_engine", engine_norm, needs_cuda=True),
        ],
        timing,
    )
    return rows + compare(
        "swiglu",
        in_fp32(swiglu, (wide,), of_wide),
        [
            Variant("plain", lambda: with_gradients(swiglu, (wide,), of_wide)),
            Variant("megatron", megatron_swiglu),
            Variant(
                "compiled",
                lambda: with_gradients(torch.compile(swiglu, dynamic=False), (wide,), of_wide),
                needs_cuda=True,
            ),
        ],
        timing,
    )


def swiglu(x: Tensor) -> Tensor:
    """silu of one half times the other."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value
