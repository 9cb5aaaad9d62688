"""The benchmarks of a step on a CPU: both sides compute the same, and a side that fails is not a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers import WorkerPool

ROOT = Path(__file__).parent.parent


def compare_toys() -> dict[str, Any]:
    from benchmarks import llava

    return llava.compare(llava.TOY, repeats=2)


def compare_after_a_bug() -> str:
    """LLaVAModel gets the features of the tiles in another order."""
    from benchmarks import llava

    as_they_are, told = llava.as_patches, ""
    llava.as_patches = lambda features: as_they_are(features.flip(0))
    try:
        llava.compare(llava.TOY, repeats=1)
    except SystemExit as error:
        told = str(error)
    finally:
        llava.as_patches = as_they_are
    return told


def test_llava_s_step_is_of_the_same_loss(workers: WorkerPool) -> None:
    first, second = workers.run(2, compare_toys)
    assert first == second
    # Near a uniform guess: ln(512) = 6.24.
    assert first["first_loss"] == pytest.approx(6.24, abs=0.3)
    assert first["tokens"] == 3 * 4 + 40
    for clock in ("wall", "cpu"):
        figures = first[clock]
        assert figures["smallest_ratio"] <= figures["ratio"] <= figures["largest_ratio"]


def test_another_order_of_tiles_is_another_loss(workers: WorkerPool) -> None:
    told = workers.run(2, compare_after_a_bug)
    assert all("first losses differ" in each for each in told)


def test_patches_are_what_the_pixel_shuffle_joins() -> None:
    from megatron.core.models.multimodal.llava_model import pixel_shuffle

    from benchmarks.llava import as_patches

    features = torch.randn(3, 4, 32)
    patches = as_patches(features)
    assert patches.shape == (3, 17, 8) and not patches[:, 0].any()
    assert torch.equal(pixel_shuffle(patches[:, 1:]), features)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["x", "x_tp2_pp2"])
def test_a_checkout_beside_itself(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.before import compare

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cpu = compare(ROOT, ROOT, case, repeats=2)["cpu"]
    assert 0.5 < cpu["ratio"] < 2.0
    assert cpu["smallest_ratio"] <= cpu["ratio"] <= cpu["largest_ratio"]


def test_a_side_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    from benchmarks.before import Side

    with pytest.raises(SystemExit, match=rf"x in {tmp_path}: the first rank ended"):
        Side(tmp_path, "x")
