"""One wandb run over several starts, read back by wandb's own reader and uploaded by wandb's own client;
and what a server that is down, or never answers, does to training: nothing.

The server is a stand-in that keeps lines by offset (wandb_server.py): no real one is reached.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nvlm_train.train.tracking import wandb_run
from nvlm_train.train.tracking.examples import lay_out
from tests.train.tracking.wandb_server import serving

KEY = {"WANDB_API_KEY": "0" * 40, "OMP_NUM_THREADS": "1"}


def start(
    run_dir: Path, mode: str, run_id: str, done: int, first: int, last: int, **environment: str
) -> tuple[dict, str]:
    """Starts a run once, in a process. Returns what it printed, and its warnings."""
    arguments = [str(each) for each in (run_dir, mode, run_id, done, first, last)]
    found = subprocess.run(
        [sys.executable, "-m", "tests.train.tracking.wandb_part", *arguments],
        env={**os.environ, **KEY, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1]), found.stderr


def parts(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


def records(path: Path) -> list[dict]:
    """Returns what a .wandb file holds, by wandb's own reader."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    offline = {**os.environ, "WANDB_MODE": "offline"}
    found = subprocess.run(command, env=offline, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in found.stdout.splitlines()]


def read(path: Path) -> list[dict]:
    """Returns the history of a .wandb file."""
    return [each["history"]["item"] for each in records(path) if each["type"] == "history"]


def steps(path: Path) -> list[int]:
    return [each["global_step"] for each in read(path)]


def sync(run_dir: Path, url: str) -> None:
    paths = [str(path.parent) for path in parts(run_dir)]
    command = [sys.executable, "-m", "wandb", "sync", *paths]
    subprocess.run(
        command,
        env={**os.environ, **KEY, "WANDB_BASE_URL": url},
        cwd=run_dir,  # it keeps a log of its own in ./wandb
        check=True,
        timeout=100,
        capture_output=True,
    )


@pytest.mark.slow
def test_offline_starts_are_parts_of_one_run_and_sync_as_one(tmp_path: Path) -> None:
    first, _ = start(tmp_path, "offline", "", 0, 1, 5)
    # Killed after step 5; the checkpoint is of step 3, so 4 and 5 come again.
    second, _ = start(tmp_path, "offline", first["id"], 3, 4, 8)
    assert second["id"] == first["id"]
    assert {path.name for path in parts(tmp_path)} == {f"run-{first['id']}.wandb"}
    assert [steps(path) for path in parts(tmp_path)] == [[1, 2, 3, 4, 5], [6, 7, 8]]
    assert [item["_step"] for item in read(parts(tmp_path)[1])] == [6, 7, 8]
    with serving() as server:
        sync(tmp_path, server.url)
        assert list(server.history) == [first["id"]]
        assert server.steps(first["id"]) == list(range(1, 9))


@pytest.mark.slow
def test_steps_that_a_killed_start_did_not_write_are_sent_again(tmp_path: Path) -> None:
    first, _ = start(tmp_path, "offline", "", 0, 1, 6)
    whole = parts(tmp_path)[0]
    # What a power cut leaves of a file: it breaks off inside the steps.
    content, size = whole.read_bytes(), whole.stat().st_size
    while wandb_run.last_step(whole) == 6:
        size -= len(content) // 16
        whole.write_bytes(content[:size])
    start(tmp_path, "offline", first["id"], 6, 7, 8)
    before, after = (steps(path) for path in parts(tmp_path))
    assert 0 < len(before) < 6 and before + after == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["refuses", "hangs"])
def test_an_outage_is_a_warning_and_an_offline_part(tmp_path: Path, answers: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answers == "hangs":
            listener.listen(50)  # takes connections and never says a word
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        found, warnings = start(
            tmp_path, "online", "", 0, 1, 40, WANDB_BASE_URL=url, UNTIL_OFFLINE="1"
        )
    # A step hands over its record and goes on; 0.2 s is a scheduler's pause on a crowded machine.
    assert found["log"] < 0.2
    assert found["close"] < wandb_run.CLOSE_SECONDS
    assert warnings.count("WARNING") == 1 and "is not reachable" in warnings
    assert steps(parts(tmp_path)[0]) == list(range(1, found["last"] + 1))


@pytest.mark.slow
def test_online_starts_after_an_outage_fill_the_gap(tmp_path: Path) -> None:
    with serving() as server:
        up, down = {"WANDB_BASE_URL": server.url}, {"WANDB_BASE_URL": "http://127.0.0.1:9"}
        first, _ = start(tmp_path, "online", "", 0, 1, 4, **up)
        second, _ = start(tmp_path, "online", first["id"], 4, 5, 8, **down, UNTIL_OFFLINE="1")
        last = second["last"]
        start(tmp_path, "online", first["id"], last, last + 1, last + 2, **up)
        assert server.steps(first["id"]) == list(range(1, last + 3))
        (part,) = parts(tmp_path)
        assert part.with_name(f"{part.name}.synced").exists(), "sync would send 5 to 8 again"


@pytest.mark.slow
def test_a_server_that_dies_under_a_run(tmp_path: Path) -> None:
    with serving() as server:
        arguments = [str(each) for each in (tmp_path, "online", "", 0, 1, 1500)]
        environment = {**os.environ, **KEY, "WANDB_BASE_URL": server.url}
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.tracking.wandb_part", *arguments],
            env=environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not server.history:
            assert process.poll() is None
    output, _ = process.communicate(timeout=200)
    found = json.loads(output.splitlines()[-1])
    assert found["log"] < 0.2 and found["close"] < wandb_run.CLOSE_SECONDS + 5
    (path,) = tmp_path.glob("wandb/run-*/*.wandb")
    assert steps(path) == list(range(1, 1501))


def test_example_shows_tiles_where_they_lie() -> None:
    tiles = torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in range(1, 5)])
    # Two tiles and their thumbnail, then an image of one tile.
    shown = lay_out(tiles, [(2, 1), (1, 1)], [3, 1])
    assert shown.shape == (2 * 12 - 4, 3 * 12 - 4, 3)
    assert [int(shown[0, x, 0]) for x in (0, 12, 24)] == [1, 2, 3]
    assert int(shown[12, 0, 0]) == 4 and int(shown[12, 12, 0]) == 255 == int(shown[0, 9, 0])
    assert lay_out(tiles[:0], [], []).size == 0
    assert shown.dtype == np.uint8
