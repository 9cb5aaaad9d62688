"""wandb and SLURM as this machine has them, scripts that do not parse, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm_train.cli import main
from nvlm_train.config.schema import Recipe
from nvlm_train.doctor.services import check_slurm
from tests.doctor.test_ranks import free_port

Make = Callable[..., Recipe]


LOOK = """
import dataclasses, json, sys
from nvlm_train.recipe.load import load_recipe
from nvlm_train.doctor.services import check_wandb
(found,) = check_wandb(load_recipe(sys.argv[1:]))
print(json.dumps(dataclasses.asdict(found)))
"""


def wandb_finding(arguments: list[str], home: Path, **environment: str) -> dict[str, str]:
    """Returns what a process finds whose home has no login."""
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(home), **environment}
    command = [sys.executable, "-c", LOOK, *arguments, "tracking.wandb=online"]
    found = subprocess.run(command, env=clean, check=True, capture_output=True, timeout=200)
    return json.loads(found.stdout)


def test_wandb_online_without_login(recipe_arguments: list[str], tmp_path: Path) -> None:
    found = wandb_finding(recipe_arguments, tmp_path)
    assert found["level"] == "error" and "wandb login" in found["remedy"]


def test_wandb_with_a_server_that_is_down(recipe_arguments: list[str], tmp_path: Path) -> None:
    down = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    found = wandb_finding(recipe_arguments, tmp_path, **down)
    assert found["level"] == "warning" and "does not answer" in found["text"]


def test_a_script_that_does_not_parse(tmp_path: Path) -> None:
    script = tmp_path / "run.sbatch"
    script.write_text("#!/bin/bash\nif true; then\n")
    (found,) = check_slurm(str(script), "")
    assert found.level == "error" and "syntax error" in found.text
    script.write_text("#!/bin/bash\ntrue\n")
    assert next(check_slurm(str(script), "")).level == "ok"


def test_exit_code_json_and_every_problem(
    recipe_arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    report = tmp_path / "report.json"
    assert main(["doctor", *recipe_arguments, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["errors"] == 0
    broken = ["model.language.num_kv_heads=3", "checkpoint.keep_last=0"]
    assert main(["doctor", *recipe_arguments, *broken, "--json", str(report)]) == 1
    findings = json.loads(report.read_text())["findings"]
    wrong = [each["text"] for each in findings if each["check"] == "recipe"]
    assert len(wrong) == 2 and all(each["remedy"] for each in findings if each["level"] != "ok")
    assert "2 error(s)" in capsys.readouterr().out


def test_nothing_imports_torch_before_the_first_findings(recipe_arguments: list[str]) -> None:
    """The quick checks print before the seconds that torch takes."""
    program = (
        "import sys; from nvlm_train.recipe.load import load_recipe; recipe = load_recipe(sys.argv[1:]);"
        "from nvlm_train.doctor import checkup, storage, material, services;"
        "found = [*storage.check_run_dir(recipe), *storage.check_disk(recipe),"
        " *material.check_tokenizer(recipe), *material.check_shards(recipe),"
        " *material.check_labels(recipe, 1), *services.check_wandb(recipe)];"
        "assert len(found) > 10; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, *recipe_arguments], check=True, timeout=100)


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "0", "soon"])
def test_a_wait_ends(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "experiment=smoke", f"--timeout={seconds}"])
    assert f"{seconds} is no time to wait; give seconds above 0" in capsys.readouterr().err
