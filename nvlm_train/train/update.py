"""megatron-core's optimizer step in two halves, so that all ranks can agree in between.

`MegatronOptimizer.step` takes the norm, clips and updates in one call, and knows of its own process
group only. These are the same calls in the same order (optimizer/optimizer.py, ChainedOptimizer.step).
"""

from __future__ import annotations

from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Makes reduced gradients ready for the update. Returns their norm, of all parameters of the model."""
    overflowed = optimizer.prepare_grads()
    assert not overflowed, "there is no loss scale in fp32 and bf16"
    return float(optimizer.get_grad_norm() or 0.0)


def update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clips by the norm that was taken, and changes weights, moments and step counts."""
    for each in parts(optimizer):
        parameters = [] if each.is_stub_optimizer else each.get_parameters()
        if parameters and each.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=each.config.clip_grad,
                total_norm=grad_norm,
                use_decoupled_grad=each.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )
    optimizer.step_with_ready_grads()


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain, or the one that there is."""
    if isinstance(optimizer, ChainedOptimizer):
        return list(optimizer.chained_optimizers)
    return [optimizer]
