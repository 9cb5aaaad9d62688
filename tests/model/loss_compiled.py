"""Runs alone: what a chunk's logits go through, compiled as on CUDA, against the same uncompiled."""

from __future__ import annotations

import torch

from nvlm_train.model.output import token_losses
from nvlm_train.parallel import kernels


def main() -> None:
    """Fails where numbers differ. Sizes change from call to call, as they do from pack to pack."""
    generator = torch.Generator().manual_seed(0)
    read = kernels.compiled(token_losses._read)
    turn = kernels.compiled(token_losses._turn_in_one)
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, rows in ((5, 24), (7, 24), (1, 40), (33, 16)):
            known = expected_known = None
            for start in (0, rows):
                logits_LC = (3 * torch.randn(tokens, rows, generator=generator)).to(dtype)
                labels_L = torch.randint(0, 2 * rows, (tokens,), generator=generator) - start
                known = read(logits_LC, labels_L, known)
                expected_known = token_losses._read(logits_LC, labels_L, expected_known)
                assert expected_known is not None
                for own, other in zip(known, expected_known, strict=True):
                    torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
            grad_L = torch.rand(tokens, generator=generator)
            expected_LC = logits_LC.clone()
            turn(logits_LC, labels_L, known, grad_L)
            token_losses._turn(expected_LC, labels_L, known, grad_L)
            # Rounded to bf16, numbers may be the next ones.
            torch.testing.assert_close(logits_LC, expected_LC, rtol=8e-3, atol=1e-6)


if __name__ == "__main__":
    main()
