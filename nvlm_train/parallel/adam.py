"""AdamW with one step count per parameter group, as in Transformer Engine's and apex's fused Adam.

torch's AdamW keeps a `step` tensor per parameter, which megatron-core 0.16's distributed optimizer
saves and restores wrongly (it asserts on a fresh state, shares one tensor between parameters and
misses the key on load: distrib_optimizer.py 641, 819, 938). With the count in the group, it takes the
code path that was made for fused Adam, which is correct. A step is one call of torch's kernel a group,
and no tensor for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class GroupStepAdamW(torch.optim.Optimizer):
    """Replaces apex's FusedAdam where neither apex nor Transformer Engine is installed.

    It keeps `exp_avg` and `exp_avg_sq` for each parameter, with the parameter's shape and dtype.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError(
                "adam_w_mode=False: only decoupled weight decay (AdamW) is implemented"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        assert closure is None, "closures are not used by megatron-core"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param)
                self.state[param]["exp_avg_sq"] = torch.zeros_like(param)
        # The kernel only reads the step, so that all parameters can share one tensor, made where they are.
        # (torch's AdamW, which counts in it, has one for each.)
        step = torch.full((), float(group["step"]), device=params[0].device)
        torch._fused_adamw_(
            params,
            [param.grad for param in params if param.grad is not None],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            [step] * len(params),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
