"""What transformers' SigLIP makes of tiles, to compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.vision.test_intern_vit import shuffle_by_loops


def features_of_siglip(model: torch.nn.Module, tiles_TCEE: Tensor) -> Tensor:
    """Pixels to -1..1, the last hidden state, all patches, shuffled by plain loops."""
    with torch.no_grad():
        states = model(tiles_TCEE.float() / 127.5 - 1).last_hidden_state
    return shuffle_by_loops(states)
