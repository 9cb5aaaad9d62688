"""docs/performance.md: its tables are what the results say, and the results are what their pages show."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "docs" / "reference" / "performance_tables.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


made = load_script()
PAGE = made.PAGE.read_text(encoding="utf-8")
CPU = made.read("cpu.json")
GPU = made.read("gpu.json")


def test_the_tables_are_what_the_results_say() -> None:
    """After new results: python docs/reference/performance_tables.py."""
    assert made.replaced(PAGE, made.tables()) == PAGE, f"run: {made.COMMAND}"
    assert set(made.tables()) == {"targets", "gpu", "cpu"}


def test_a_changed_result_changes_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = json.loads(json.dumps({"gpu.json": GPU, "cpu.json": CPU}))
    changed["gpu.json"]["rows"]["d"]["mfu"] = 0.456
    changed["cpu.json"]["llava"]["figures"]["cpu"]["ratio"] = 1.23
    monkeypatch.setattr(made, "read", changed.__getitem__)
    page = made.replaced(PAGE, made.tables())
    assert "| D, MFU (0.50 is hoped for) | at least 0.45 | 0.46 |" in page
    assert "45.6%" in page and "| 1.23 | at least 1.5 |" in page


@pytest.mark.parametrize("name", CPU)
def test_a_figure_is_in_the_output_that_its_page_shows(name: str) -> None:
    result = CPU[name]
    page = (made.RESULTS / result["page"]).read_text(encoding="utf-8")
    outputs = [json.loads(text) for text in re.findall(r"^\{.*\}$", page, re.MULTILINE)]
    assert result["figures"] in outputs
    assert result["date"] in page
    assert (ROOT / "benchmarks" / f"{name}.py").is_file()


def test_every_benchmark_with_figures_is_on_the_page() -> None:
    assert {figure.benchmark for figure in made.FIGURES} == set(CPU)


def test_the_gpu_s_page_has_the_rows_of_its_result() -> None:
    page = (made.RESULTS / "gpu.md").read_text(encoding="utf-8")
    assert GPU["commit"] in page and GPU["date"] in page
    for name, row in GPU["rows"].items():
        assert re.search(rf"^\| {name} \|.*\b{row.get('mfu')}\b", page, re.MULTILINE), name


def test_figures_of_an_older_commit_say_so_until_they_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made, "RESULTS", tmp_path)
    result: dict[str, Any] = GPU | {"commit": "1234567"}
    pending = tmp_path / "PENDING.md"
    pending.write_text("| the rows | `python -m benchmarks.gpu --judged` |")
    assert "figures of commit 1234567, not of the code as it is now" in " ".join(
        made.origin(result).split()
    )
    pending.write_text("Nothing waits.")
    assert made.origin(result).endswith("commit 1234567.")


def test_the_script_imports_no_torch() -> None:
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
