"""The Muon optimizer in fp32. torch's own works in bf16, which is ten times slower on most CPUs."""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration
NUM_ITERATIONS = 5


def orthogonalise(matrix_RC: torch.Tensor) -> torch.Tensor:
    """Returns roughly the nearest orthogonal matrix: singular values are moved to about 1."""
    a, b, c = COEFFICIENTS
    wide_RC = matrix_RC if matrix_RC.shape[0] <= matrix_RC.shape[1] else matrix_RC.T
    wide_RC = wide_RC / (wide_RC.norm() + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram_RR = wide_RC @ wide_RC.T
        wide_RC = a * wide_RC + (b * gram_RR + c * gram_RR @ gram_RR) @ wide_RC
    return wide_RC if matrix_RC.shape[0] <= matrix_RC.shape[1] else wide_RC.T


class Muon(torch.optim.Optimizer):
    """Updates by orthogonalised Nesterov momentum. A step is as large as AdamW's at the same rate."""

    def __init__(
        self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                velocity = state.setdefault("velocity", torch.zeros_like(matrix))
                velocity.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalise(matrix.grad.lerp(velocity, group["momentum"]))
                scale = 0.2 * max(matrix.shape) ** 0.5  # AdamW's updates have an RMS of about 0.2
                matrix.add_(update, alpha=-group["lr"] * scale)
