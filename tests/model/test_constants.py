"""No constant of the model or the encoder loses precision with its weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.model import constants
from tests.parity.recipes import LANGUAGE
from tests.workers import WorkerPool

PRECISIONS = [("fp32", "none"), ("bf16", "none"), ("fp32", "bfloat16"), ("bf16", "half")]
"""The recipe's, and a cast of the built modules."""
WEIGHTS = {"none": None, "bfloat16": torch.bfloat16, "half": torch.float16}


@pytest.mark.parametrize("name", ["d", "h", "x with feed-forward", "flamingo"])
def test_constants_stay_as_they_are(workers: WorkerPool, name: str) -> None:
    """All that modules hold beside weights is listed here: what is new must be looked at."""
    for precision, cast in PRECISIONS:
        found, dtypes = workers.run(1, constants.constants, name, precision, cast)[0]
        recipes_own = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        assert dtypes == {WEIGHTS[cast] or recipes_own}
        assert set(found) == {"model.language_model.rotary.inv_freq"}
        channels = LANGUAGE.hidden_size // LANGUAGE.num_heads
        exact = LANGUAGE.rope_theta ** -(np.arange(0, channels, 2) / channels)
        (frequencies,) = found.values()
        assert frequencies.dtype == torch.float32
        np.testing.assert_allclose(frequencies.numpy(), exact, rtol=1e-6)


@pytest.mark.parametrize(("precision", "cast"), PRECISIONS[1:])
def test_angles_of_far_positions(workers: WorkerPool, precision: str, cast: str) -> None:
    """In bf16, positions above 256 would not even be whole numbers."""
    expected = workers.run(1, constants.angles, "fp32", "none")[0]
    found = workers.run(1, constants.angles, precision, cast)[0]
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert expected[-1].max() == 99_999
