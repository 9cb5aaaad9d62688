"""Preparation as a whole: any number of workers, kills at any moment, bad entries, what is there."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nvlm_train.cli import main
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig, list_shards
from nvlm_train.data.prepare.inputs.entries import InputSpec
from nvlm_train.data.prepare.preparation import PrepareProgress, prepare_input
from nvlm_train.data.prepare.staging import Target
from nvlm_train.data.shards.manifest import read_manifest
from nvlm_train.data.shards.store import Store
from nvlm_train.errors import ShardError
from tests.data.conftest import chat, draw_image, encoded


def make_input(path: Path, count: int) -> InputSpec:
    """Chats, every third with an image."""
    photos = path / "photos"
    photos.mkdir(parents=True)
    for number in range(4):
        (photos / f"{number}.jpg").write_bytes(encoded(draw_image(30, 20, number), "JPEG"))
    with (path / "x.jsonl").open("w") as lines:
        for number in range(count):
            image = {"image": f"{number % 4}.jpg"} if number % 3 == 0 else {}
            lines.write(json.dumps({"id": number, **chat("q", f"a{number}"), **image}) + "\n")
    return InputSpec("jsonl", (str(path / "x.jsonl"),), str(photos))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file by name; a directory would fail."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def results(staging: Path) -> list[Path]:
    return [path for path in staging.glob("*.json") if re.fullmatch(r"\d{6}", path.stem)]


@pytest.mark.slow
def test_any_number_of_workers_makes_the_same_bytes(tmp_path: Path) -> None:
    spec = make_input(tmp_path, 23)
    for workers in (1, 3):
        target = Target(str(tmp_path / f"out{workers}"), "x", 4)
        prepare_input(spec, target, workers)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")
    manifest = read_manifest(str(tmp_path / "out1"), "x")
    assert manifest is not None and [s.num_samples for s in manifest.shards] == [4] * 5 + [3]
    assert (manifest.num_samples, manifest.num_images, manifest.num_bad) == (23, 8, 0)


@pytest.mark.slow
@pytest.mark.parametrize("moments", [(10,), (1, 20, 40)])
def test_killed_at_any_moment_it_goes_on(tmp_path: Path, moments: tuple[int, ...]) -> None:
    """kill -9 of the command: its workers end too, and the same command makes the same bytes."""
    spec = make_input(tmp_path, 600)  # 60 shards
    prepare_input(spec, Target(str(tmp_path / "whole"), "x", 10))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "nvlm_train", "data", "prepare", "jsonl", *spec.paths]
    command += ["--images", spec.images, "--out", str(out), "--name", "x"]
    command += ["--samples-per-shard", "10", "--workers", "2"]
    kept = 0
    for wanted in moments:
        run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while len(results(out / "x.partial")) < max(kept + 2, wanted):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        family = psutil.Process(run.pid).children(recursive=True)
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        assert len(family) >= 2 and not psutil.wait_procs(family, timeout=20)[1]
        kept = len(results(out / "x.partial"))
        assert 0 < kept < 60 and not list(out.glob("*.tar")) and not list(out.glob("*.json"))
        assert run.stderr is not None
        run.stderr.close()
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{kept} of 60 shards are there from the run before" in ended.stderr
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("named", [0, 1, 3])
def test_killed_while_shards_get_their_names(tmp_path: Path, named: int) -> None:
    """What lies there after a kill between two renames, made by stopping before the first."""
    spec = make_input(tmp_path, 12)
    target = Target(str(tmp_path / "out"), "x", 4)

    def stop(progress: PrepareProgress) -> None:
        if progress.shards_done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_input(spec, target, report=stop)
    staging = tmp_path / "out" / "x.partial"
    (staging / "publishing").touch()
    for number in range(named):
        os.replace(staging / f"{number:06d}.tar", tmp_path / "out" / f"x-{number:06d}.tar")
    if named == 3:  # or even after the manifest, while the directory goes
        shutil.copytree(staging, tmp_path / "kept")
    prepare_input(spec, target)
    whole = Target(str(tmp_path / "whole"), "x", 4)
    prepare_input(spec, whole)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    if named == 3:
        shutil.copytree(tmp_path / "kept", staging)
        prepare_input(spec, target)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def break_lines(spec: InputSpec, *numbers: int) -> list[str]:
    path = Path(spec.paths[0])
    lines = path.read_text().splitlines()
    whole = list(lines)
    for number in numbers:
        lines[number] = lines[number][:-5]
    path.write_text("\n".join(lines) + "\n")
    return whole


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_entries_stop_or_are_listed(tmp_path: Path, workers: int) -> None:
    spec = make_input(tmp_path, 12)
    break_lines(spec, 1, 5, 11)
    out = tmp_path / "out"
    with pytest.raises(ShardError) as caught:
        prepare_input(spec, Target(str(out), "x", 3), workers)
    assert str(caught.value).startswith("max_bad=0: 1 or more entries cannot be used; repair them")
    assert f"  - {spec.paths[0]}: line 2 (entry 1): it is not JSON" in str(caught.value)
    with pytest.raises(ShardError, match=r"(?s)max_bad=2: 3 or more.*line 2 .*line 6 .*line 12 "):
        prepare_input(spec, Target(str(out), "x", 3, max_bad=2), workers)
    manifest = prepare_input(spec, Target(str(out), "x", 3, max_bad=3), workers)
    assert [shard.num_samples for shard in manifest.shards] == [2, 2, 3, 2]
    assert [each.key for each in manifest.bad] == ["000000001", "000000005", "000000011"]
    stored = json.loads((out / "x.manifest.json").read_text())
    assert stored["num_bad"] == 3 and stored["bad"][1]["place"].endswith("line 6 (entry 5)")
    assert "not JSON" in stored["bad"][2]["reason"]


def test_a_repaired_image_is_read_again(tmp_path: Path) -> None:
    spec = make_input(tmp_path, 12)
    data = (tmp_path / "photos" / "1.jpg").read_bytes()
    (tmp_path / "photos" / "1.jpg").unlink()
    target = Target(str(tmp_path / "out"), "x", 3)
    with pytest.raises(
        ShardError, match=r"line 10 \(entry 9\): image=.*photos/1.jpg does not exist"
    ):
        prepare_input(spec, target)
    (tmp_path / "photos" / "1.jpg").write_bytes(data)
    assert prepare_input(spec, target).num_samples == 12


def test_no_repaired_line_stays_left_out(tmp_path: Path) -> None:
    """Also not those in shards that were ready before the error was known."""
    spec = make_input(tmp_path, 12)
    photos, hidden = tmp_path / "photos", tmp_path / "hidden"
    hidden.mkdir()
    for name in ("1.jpg", "2.jpg", "3.jpg"):  # entries 9, 6 and 3
        (photos / name).rename(hidden / name)
    target = Target(str(tmp_path / "out"), "x", 1, max_bad=1)
    with pytest.raises(ShardError, match="max_bad=1: 2 or more"):
        prepare_input(spec, target, 2)
    for file in hidden.iterdir():
        file.rename(photos / file.name)
    assert prepare_input(spec, target, 2).num_bad == 0


def test_a_shard_of_bad_entries_leaves_no_gap(tmp_path: Path) -> None:
    spec = make_input(tmp_path, 9)
    break_lines(spec, 3, 4, 5)
    manifest = prepare_input(spec, Target(str(tmp_path / "out"), "x", 3, max_bad=3))
    assert [shard.file for shard in manifest.shards] == ["x-000000.tar", "x-000001.tar"]
    assert set(contents(tmp_path / "out")) == {"x-000000.tar", "x-000001.tar", "x.manifest.json"}
    break_lines(spec, 0, 1, 2, 6, 7, 8)
    with pytest.raises(ShardError, match="9 or more entries cannot be used"):
        prepare_input(spec, Target(str(tmp_path / "none"), "x", 3, max_bad=9))


def test_another_input_in_the_same_process(tmp_path: Path) -> None:
    """Nothing of the first input is remembered."""
    spec = make_input(tmp_path, 6)
    target = Target(str(tmp_path / "out"), "x", 3)
    prepare_input(spec, target)
    shutil.rmtree(tmp_path / "out")
    path = Path(spec.paths[0])
    path.write_text("\n" + path.read_text().replace("a5", "changed"))
    prepare_input(spec, target)
    assert b"changed" in (tmp_path / "out" / "x-000001.tar").read_bytes()


def test_what_is_there_already(tmp_path: Path) -> None:
    spec = make_input(tmp_path, 6)
    out, target = tmp_path / "out", Target(str(tmp_path / "out"), "x", 3)
    first = prepare_input(spec, target)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare_input(spec, target) == first
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(ShardError, match=r"x.manifest.json lists other shards"):
        prepare_input(spec, Target(str(out), "x", 2))
    (out / "x-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"x-000001.tar is not the one that .* lists"):
        prepare_input(spec, target)
    (out / "x.manifest.json").unlink()
    with pytest.raises(ShardError, match=r"x-000000.tar exists and no manifest lists it"):
        prepare_input(spec, target)


def test_another_input_does_not_mix_with_an_interrupted_one(tmp_path: Path) -> None:
    spec = make_input(tmp_path, 6)
    target = Target(str(tmp_path / "out"), "x", 2)

    def stop(_: PrepareProgress) -> None:
        with pytest.raises(ShardError, match="is being written by another process"):
            prepare_input(spec, target)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_input(spec, target, report=stop)
    whole = break_lines(spec, 5)
    with pytest.raises(ShardError, match=r"x.partial belongs to an interrupted run with another"):
        prepare_input(spec, target)
    Path(spec.paths[0]).write_text("\n".join(whole) + "\n")
    assert prepare_input(spec, target).num_samples == 6


def test_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = make_input(tmp_path, 6)
    base = ["data", "prepare", "jsonl", *spec.paths, "--images", spec.images, "--name", "x"]
    base += ["--out", str(tmp_path / "out")]
    assert main([*base, "--workers", "0", "--max-bad", "-1", "--split", "a", "--field", "b"]) == 2
    error = capfd.readouterr().err
    for message in ("--workers=0", "--max-bad=-1", "--split=a", "--field=b must be FIELD=PLACE"):
        assert message in error
    assert main(base) == 0
    shown = capfd.readouterr()
    assert f"in a data recipe: shards: {tmp_path}/out/x-000000.tar" in shown.out
    assert "x: 6/6 entries, 1/1 shards" in shown.err
    break_lines(spec, 2)
    assert main([*base[:-1], str(tmp_path / "two")]) == 2
    assert "line 3 (entry 2)" in capfd.readouterr().err


def test_fields_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"q": "what?", "a": "that"}')
    options = ["--field", "question=q", "--field", "answer=a", "--out", str(tmp_path / "out")]
    arguments = ["data", "prepare", "jsonl", str(tmp_path / "x.jsonl"), "--name", "x", *options]
    assert main(arguments) == 0
    assert (
        b'{"question": "what?", "answer": "that"}' in (tmp_path / "out/x-000000.tar").read_bytes()
    )


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    """By `prepare` and by a data recipe that names it; one without a format is of the first."""
    spec = make_input(tmp_path, 6)
    out = tmp_path / "out"
    prepare_input(spec, Target(str(out), "x", 4))
    path = out / "x.manifest.json"
    stored = json.loads(path.read_text())
    assert stored.pop("format") == 1
    path.write_text(json.dumps(stored))
    assert read_manifest(str(out), "x") is not None
    blend = Blend("b", (SourceConfig("x", ("x.manifest.json",)),))
    assert len(list_shards(blend, Store(str(out))).sources[0].shards) == 2
    path.write_text("[]")
    for read in (lambda: read_manifest(str(out), "x"), lambda: list_shards(blend, Store(str(out)))):
        with pytest.raises(ShardError, match="cannot be read"):
            read()
    path.write_text(json.dumps(stored | {"format": 2, "shards": "elsewhere"}))
    for read in (lambda: read_manifest(str(out), "x"), lambda: list_shards(blend, Store(str(out)))):
        with pytest.raises(ShardError, match="format=2, this version reads 1; use the nvlm-train"):
            read()
