"""Splits megatron-core's optimizer step in two, so that all ranks can agree between the halves.

`MegatronOptimizer.step` takes the norm, clips and updates in one call, and reduces over its own
process group only. The functions here make the same calls in the same order
(megatron/core/optimizer/optimizer.py, `ChainedOptimizer.step`).
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from nvlm_train.config.schema import OptimizerConfig


def set_groups(optimizer: MegatronOptimizer, settings: OptimizerConfig, rate: float) -> None:
    """Sets what the next update reads in every parameter group: rate, weight decay, Adam's constants.

    megatron-core puts norms, biases and gates (parameters of one dimension) into a group whose
    `wd_mult` is 0. Only its own scheduler multiplies by it (optimizer_param_scheduler.py, `step`), and
    `lr_mult` is applied nowhere. A loaded checkpoint brings the groups of the run that wrote it, so
    the recipe's constants are set again as well.

    Args:
        optimizer: this rank's; it has no groups when the rank trains no parameter.
        settings: the stage's optimizer.
        rate: the step's learning rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mult"]
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        group["betas"] = (settings.beta1, settings.beta2)
        group["eps"] = settings.eps


def load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Loads an optimizer's state, which another kernel library's Adam may have saved.

    A loaded group replaces the one that was built, and each library keeps fields of its own there
    (Transformer Engine's and apex's Adam read `bias_correction`). Fields that the loaded group lacks
    keep the values that were built.
    """
    built = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, built, strict=True):
        for name, value in own.items():
            group.setdefault(name, value)


def make_moments(optimizer: MegatronOptimizer) -> None:
    """Gives parameters that were never updated moments of zero: megatron-core expects them in a save.

    Such a save happens when no step since the stage's start was finite.
    """
    for each in parts(optimizer):
        if not each.is_stub_optimizer:
            each.init_state_fn(each.optimizer, each.config)


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Prepares reduced gradients for the update. Returns their norm over all parameters of the model."""
    overflowed = optimizer.prepare_grads()
    assert not overflowed, "there is no loss scale in fp32 and bf16"
    return float(optimizer.get_grad_norm() or 0.0)


def update(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Clips the gradients by `grad_norm`, and changes weights, moments and step counts."""
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
    """Returns the optimizers of a chain, or the optimizer itself when it is no chain."""
    if isinstance(optimizer, ChainedOptimizer):
        return list(optimizer.chained_optimizers)
    return [optimizer]
