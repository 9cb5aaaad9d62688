"""`nvlm launch`: what is wrong with a run is said before it is queued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nvlm_train.cli import main
from nvlm_train.cli.submission import Submission, check
from nvlm_train.errors import ConfigError, LaunchError
from tests.train.smoke import overrides

Make = Callable[..., Submission]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Returns a submission of the smoke recipe on two nodes of four, on a machine without sbatch."""
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setattr("shutil.which", lambda name: None)

    def submission(*more: str, **changed) -> Submission:
        fields = {"nodes": 2, "gpus_per_node": 4, "ranks_per_node": 4, **changed}
        return Submission(tuple(overrides(tmp_path, tmp_path / "run", *more)), **fields)

    return submission


def test_what_was_checked(make: Make) -> None:
    recipe, script, sbatch = check(make("stages.sft.parallel.tensor=2"))
    assert "smoke on 8 ranks: pretrain TP 1 x PP 1 x DP 8, sft TP 2 x PP 1 x DP 4" in recipe
    assert script == "bash -n: the script parses"
    assert sbatch == "no sbatch on this machine: options were not tested"


def test_ranks_that_do_not_fit_the_layout(make: Make) -> None:
    one = make("stages.sft.parallel.tensor=2", nodes=3, gpus_per_node=1, ranks_per_node=1)
    with pytest.raises(ConfigError, match="do not divide the world of 3"):
        list(check(one))


def test_a_recipe_that_does_not_load(make: Make) -> None:
    with pytest.raises(ConfigError, match="sede=1 is an unknown key"):
        list(check(make("sede=1")))


def test_cpu_nodes_need_a_number_of_ranks(make: Make) -> None:
    with pytest.raises(LaunchError, match="ranks_per_node=0: nothing would run"):
        list(check(make(gpus_per_node=0, ranks_per_node=0)))


def test_the_exact_command(make: Make, tmp_path: Path) -> None:
    one = make(image="image.sqsh", extra=("--partition=long",), recipes=str(tmp_path))
    command = one.command()
    assert command[:5] == [
        "sbatch", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--partition=long",
    ]  # fmt: skip
    assert Path(command[5]).is_file()
    assert command[6:] == ["--recipes", str(tmp_path), *one.overrides]
    assert one.environment == {"NVLM_IMAGE": "image.sqsh"}
    assert not any("gpus" in each for each in make(gpus_per_node=0).command())


@pytest.mark.parametrize(
    ("limit", "is_refused"),
    [("10", True), ("10:00", True), ("11", False), ("1:00:00", False), ("0-1", False)],
)
def test_a_limit_that_leaves_no_time(make: Make, limit: str, is_refused: bool) -> None:
    one = make(extra=(f"--time={limit}",))
    if is_refused:
        with pytest.raises(LaunchError, match="--time=10 min leaves no time"):
            list(check(one))
    else:
        list(check(one))


def test_ablations_are_an_array(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "ablations.txt"
    file.write_text(f"# two\nseed=1 run_dir={tmp_path}/1\n\nseed=2 run_dir={tmp_path}/2\n")
    one = make(ablations=str(file))
    assert "--array=0-1" in one.command()
    assert len([line for line in check(one) if line.startswith("recipe")]) == 2
    assert one.environment == {"NVLM_ABLATIONS": str(file)}


def test_ablations_with_one_directory_are_refused(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "ablations.txt"
    file.write_text("seed=1\nseed=2\nsede=3\n")
    with pytest.raises(ConfigError) as caught:
        list(check(make(ablations=str(file))))
    assert "is that of 2 runs" in str(caught.value) and "sede=3" in str(caught.value)


def test_ablations_that_are_not_there(make: Make) -> None:
    with pytest.raises(LaunchError, match="no such file"):
        list(check(make(ablations="nowhere.txt")))


def test_dry_run_prints_script_and_command(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--nodes=2", "--gpus-per-node=4", *make().overrides]
    assert main(["launch", "--dry-run", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "#SBATCH --requeue" in printed
    assert "sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4" in printed
    assert main(["launch", "--dry-run", "--nodes=0", *make().overrides]) == 2
