"""Golden values: another order would silently change every run that is resumed."""

from __future__ import annotations

import numpy as np

from nvlm_train.data.ordering import hashed_permutation, stable_hash


def test_golden_values() -> None:
    assert stable_hash("prompt", "key", 3) == 9628093907545188421
    assert hashed_permutation(8, 1).tolist() == [4, 3, 7, 0, 1, 5, 6, 2]


def test_is_a_permutation() -> None:
    assert np.array_equal(np.sort(hashed_permutation(1000, 2**64 - 1)), np.arange(1000))
    assert len(hashed_permutation(0, 5)) == 0
