"""Judgements of the health package that need no run, and its files."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nvlm_train.config.schema import HealthConfig
from nvlm_train.errors import ConfigError, TrainingError
from nvlm_train.train.health import memory
from nvlm_train.train.health.activity import Activity, patience
from nvlm_train.train.health.heartbeat import Heartbeat
from nvlm_train.train.health.left_out import (
    LeftOut,
    append_left_out,
    around,
    indices,
    read_left_out,
)
from nvlm_train.train.health.losses import LossWatch
from nvlm_train.train.health.stragglers import RankTimes, describe, slowest
from nvlm_train.train.health.watchdog import RankReport
from nvlm_train.train.health.watchdog import describe as describe_hang
from tests.train.smoke import smoke_recipe

FINITE = st.floats(0.5, 3.0)


@given(st.lists(FINITE, min_size=40, max_size=80), st.integers(0, 39))
def test_resumed_watch_judges_as_the_uninterrupted_one(losses: list[float], cut: int) -> None:
    config = HealthConfig(spike_window=16, spike_threshold=2)
    whole = LossWatch(config)
    found = [whole.add(loss, True) for loss in losses]
    resumed = LossWatch(config, [(loss, True) for loss in losses[:cut]])
    assert [resumed.add(loss, True) for loss in losses[cut:]] == found[cut:]


def test_spike_is_a_leap_and_not_a_step_of_noise() -> None:
    config = HealthConfig(spike_window=32, spike_threshold=10)
    watch = LossWatch(config, [(2.0 + 0.01 * (number % 5), True) for number in range(32)])
    assert watch.add(2.3, True) is None, "twenty percent is the least that can be a spike"
    spike = watch.add(4.0, True)
    assert spike is not None and spike.median == pytest.approx(2.02, abs=0.02)
    assert watch.add(2.0, True) is None
    assert watch.add(4.0, True) is not None, "one spike does not make the next one usual"


def test_falling_losses_at_the_start_are_no_spikes() -> None:
    watch = LossWatch(HealthConfig(spike_window=32))
    assert not any(watch.add(10.0 * 0.9**number, True) for number in range(200))


def test_steps_in_a_row_are_counted_over_a_resume() -> None:
    watch = LossWatch(HealthConfig(), [(2.0, True), (float("nan"), False)])
    watch.add(float("inf"), False)
    assert watch.not_finite_in_a_row == 2
    watch.add(2.0, True)
    assert watch.not_finite_in_a_row == 0


def test_what_the_checkpoint_has_learned_is_not_left_out(tmp_path: Path) -> None:
    assert around(100, 10, 50, 1000) == (90, 110)
    assert around(100, 10, 95, 1000) == (96, 110)
    assert around(100, 10, 50, 100) is None, "the last step ends the stage"
    assert around(99, 10, 50, 100) == (89, 99)
    append_left_out(tmp_path, LeftOut("sft", 3, 4, "spike"))
    append_left_out(tmp_path, LeftOut("pretrain", 9, 9, "spike"))
    assert indices(read_left_out(tmp_path), "sft") == {2, 3}


def test_patience_follows_what_is_usual() -> None:
    config = HealthConfig(hang_factor=10, hang_floor_seconds=5, hang_grace_seconds=100)
    activity = Activity()
    activity.start_stage("sft", 0)
    assert patience(config, activity) == 100
    for step in range(1, 4):
        assert activity.doing == "starting"
        activity.stepped(step, 2.0)
    assert patience(config, activity) == 5
    activity.durations.extend([2.0] * 60)
    assert patience(config, activity) == 20
    with activity.busy("saving"):
        assert patience(config, activity) == 100
    assert (activity.doing, patience(config, activity)) == ("training", 20)
    activity.start_stage("next", 0)
    assert patience(config, activity) == 100


def test_heartbeat_is_whole_whenever_it_is_read(tmp_path: Path) -> None:
    activity = Activity()
    heart = Heartbeat(tmp_path, activity, every=0.001)
    seen = set()
    deadline = time.monotonic() + 10
    while len(seen) < 20 and time.monotonic() < deadline:
        activity.stepped(len(seen), float("nan"))
        if (tmp_path / "heartbeat.json").exists():
            seen.add(json.loads((tmp_path / "heartbeat.json").read_text())["time"])
    activity.end("ended")
    heart.close()
    last = json.loads((tmp_path / "heartbeat.json").read_text())
    assert len(seen) == 20
    assert (last["doing"], last["loss"]) == ("ended", None)
    assert {"stage", "step", "host", "pid", "seconds_since_progress"} <= set(last)


def test_slow_rank_is_compared_with_its_own_pipeline_stage() -> None:
    times = [RankTimes(0, 0, 0.1, 1.0, 1), RankTimes(1, 0, 0.1, 1.0, 1),
             RankTimes(2, 1, 0.1, 2.0, 0), RankTimes(3, 1, 0.1, 2.0, 0)]  # fmt: skip
    assert slowest(times).ratio == pytest.approx(1.0)
    times[1] = RankTimes(1, 0, 0.9, 1.0, 0.2)
    worst = slowest(times)
    assert (worst.times.rank, round(worst.ratio, 2)) == (1, 1.73)
    message = describe(worst, 3, HealthConfig())
    assert message.startswith("straggler: rank 1 needs 1.9 s a step of its own, 1.73 x")
    assert "it waits for its data" in message


def test_hang_message_names_the_rank_that_waits_for_nobody(tmp_path: Path) -> None:
    def report(rank: int, waits_in: str | None) -> RankReport:
        return RankReport(rank, f"node{rank}", 7, "training", 9.0, f"file.py:{rank} f", waits_in)

    found = [report(0, "gloo:all_reduce #5 of tp"), report(1, None)]
    message = describe_hang("no progress", tmp_path, found, 3)
    assert "rank 1 on node1 is the one to look at: it is in file.py:1 f" in message
    assert "rank 0 on" not in message
    assert (
        "ranks 2 could run no Python, or are dead (without a stack)" in message
        and "exit code 76" in message
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        ),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_out_of_memory_is_explained(tmp_path: Path, error: Exception) -> None:
    recipe = smoke_recipe(
        tmp_path, tmp_path, "stages.sft.parallel.tensor=2", "stages.sft.parallel.recompute=full"
    )
    with pytest.raises(TrainingError) as caught, memory.explained(recipe, "sft"):
        raise error
    message = str(caught.value)
    assert "stages.sft.sequence_length=128" in message
    assert "stages.sft.parallel.max_tiles_in_flight=256" in message
    assert "stages.sft.parallel.sequence_parallel=false" in message
    assert "recompute" not in message, "there is nothing left to recompute"
    assert "pack_length" not in message, "packs are as short as samples"
    longer = smoke_recipe(tmp_path, tmp_path, "stages.sft.pack_length=512")
    advice = memory.advice(longer, "sft", error)
    assert "stages.sft.pack_length=512: fewer samples a pack" in advice
    with pytest.raises(RuntimeError, match="shapes"), memory.explained(recipe, "sft"):
        raise RuntimeError("shapes do not fit")


def test_advice_says_what_recomputation_would_save(tmp_path: Path) -> None:
    """Of the stage's full packs, in the recipe's own words."""
    for stated, offered in {
        "none": ["[norms] saves", "[mlp,norms] saves", "full saves"],
        "[norms]": ["[mlp,norms] saves", "full saves"],
        "[mlp,norms]": ["full saves"],
    }.items():
        setting = f"stages.sft.parallel.recompute={stated}"
        recipe = smoke_recipe(tmp_path, tmp_path, setting)
        (line,) = [
            each
            for each in memory.advice(recipe, "sft", MemoryError()).splitlines()
            if "recompute" in each
        ]
        assert f"{setting}: " in line and line.count("saves") == len(offered)
        assert all(each in line for each in offered)


def test_unusable_health_is_refused(tmp_path: Path) -> None:
    wrong = ["health.hang_grace_seconds=1", "health.spike_window=2", "health.straggler_threshold=1"]
    with pytest.raises(ConfigError) as caught:
        smoke_recipe(tmp_path, tmp_path, *wrong)
    assert len(caught.value.problems) == 3
