"""Images that cannot be decoded are counted, not trained on, and tolerated up to a limit."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from nvlm_train.batch import RankShare
from nvlm_train.data.dataset import build_data
from nvlm_train.data.loading.loader import Loader
from nvlm_train.errors import NvlmError, TrainingError
from nvlm_train.train.step import SkipBudget
from tests.train import runs
from tests.train.layouts import NO_DROPOUT, layout
from tests.train.smoke import make_smoke_data, read_metrics, smoke_recipe
from tests.workers import WorkerPool

TOLERANT = (*NO_DROPOUT, "loader.max_skipped_fraction=0.5")


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes the smoke data with a truncated PNG or JPEG in every other caption and question."""
    root = tmp_path_factory.mktemp("torn")
    make_smoke_data(root)
    for name in ("captions", "vqa"):
        for path in sorted(root.glob(f"{name}-*.tar")):
            _tear_images(path)
    return root


def _tear_images(path: Path) -> None:
    """Removes half of the pixels' data of every second image. Every second of those is a JPEG."""
    with tarfile.open(path) as tar:
        members = [(each.name, tar.extractfile(each).read()) for each in tar]  # type: ignore[union-attr]
    images = 0
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            if name.endswith(".png"):
                images += 1
                if images % 4 == 0:
                    name, content = f"{name.removesuffix('png')}jpg", _as_jpeg(content)  # noqa: PLW2901
                if images % 2 == 0:
                    content = _without_end(content)  # noqa: PLW2901
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _without_end(content: bytes) -> bytes:
    """Cuts in the middle of the compressed pixels. The header still has the size."""
    start = max(content.find(marker) for marker in (b"IDAT", b"\xff\xda"))
    return content[: (start + len(content)) // 2]


def _as_jpeg(png: bytes) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(png)).save(stream, "JPEG")
    return stream.getvalue()


def expected_steps(torn: Path, run_dir: Path, stage: str) -> list[tuple[int, int]]:
    """Returns (skipped samples, trained tokens) of each step, from the loader's own failures."""
    recipe = smoke_recipe(torn, run_dir, *TOLERANT)
    settings = recipe.stages[stage]
    plan, encoder = build_data(settings, recipe, ".")
    steps = []
    with Loader(plan, encoder, RankShare(), recipe.loader, 256, range(settings.steps)) as loader:
        for _ in range(settings.steps):
            batch = next(loader)
            failed = {(each.round, each.microbatch, each.sample) for each in batch.failures}
            labels = [
                (r, m, sample)
                for r, round_ in enumerate(batch.rounds)
                for m, microbatch in enumerate(round_.microbatches)
                for sample in microbatch.label_samples_L.tolist()
            ]
            steps.append((len(failed), sum(label not in failed for label in labels)))
    return steps


@pytest.mark.slow
def test_torn_images_are_trained_by_nobody(workers: WorkerPool, torn: Path, tmp_path: Path) -> None:
    assert workers.run(1, runs.run, torn, tmp_path / "single", *TOLERANT) == [0]
    single = read_metrics(tmp_path / "single")
    expected = [
        step
        for stage in ("pretrain", "sft")
        for step in expected_steps(torn, tmp_path / "single", stage)
    ]
    found = [(each["skipped_samples"], each["trained_tokens"]) for each in single]
    assert found == expected
    assert sum(skipped for skipped, _ in found) > 2
    assert all(each["samples"] == 4 for each in single)

    world, overrides = layout("TP2 PP2")
    codes = workers.run(world, runs.run, torn, tmp_path / "four", *overrides, *TOLERANT)
    assert codes == [0] * 4
    four = read_metrics(tmp_path / "four")
    for field in ("skipped_samples", "trained_tokens", "samples_hash"):
        assert [each[field] for each in four] == [each[field] for each in single], field
    assert [each["loss"] for each in four] == pytest.approx(
        [each["loss"] for each in single], rel=1e-4
    )


def _refusal(torn: Path, run_dir: Path, overrides: list[str]) -> str:
    with pytest.raises(NvlmError) as caught:
        runs.run(torn, run_dir, *overrides)
    return str(caught.value)


def test_too_many_torn_images_stop_the_run(workers: WorkerPool, torn: Path, tmp_path: Path) -> None:
    strict = ["loader.max_skipped_fraction=0"]
    messages = workers.run(2, _refusal, torn, tmp_path / "run", strict)
    for message in messages:
        assert "samples could not be decoded, loader.max_skipped_fraction=0.0 allows 0" in message
        assert "repair the shards, or raise the limit" in message
    records = read_metrics(tmp_path / "run")
    assert records[-1]["skipped_samples"] > 0, "the step that broke the rule is on record"
    assert all(each["skipped_samples"] == 0 for each in records[:-1])


def test_budget_is_a_share_of_all_samples_drawn() -> None:
    budget = SkipBudget(0.1)
    for _ in range(5):
        budget.add(1, 10)
    with pytest.raises(TrainingError, match="7 of 60 samples could not be decoded.* allows 6"):
        budget.add(2, 10)


def test_budget_forgives_one_sample_unless_it_is_zero() -> None:
    SkipBudget(0.001).add(1, 4)
    with pytest.raises(TrainingError, match="2 of 4"):
        SkipBudget(0.001).add(2, 4)
    SkipBudget(0.0).add(0, 4)
    with pytest.raises(TrainingError, match="1 of 4 .* allows 0"):
        SkipBudget(0.0).add(1, 4)
