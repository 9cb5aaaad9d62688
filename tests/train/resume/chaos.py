"""Kills a real TP2 x PP2 run under torchrun at chosen kinds of moments, and checks what is left each time.

    python -m tests.train.resume.chaos --kills 50 --seed 0        # `make chaos`

Moments are awaited in what the run shows (its log, its directories) and varied by seeded delays. The same
command is then started again; when it is through, every byte of weights, optimizer and RNG in the last
checkpoint and every number of metrics.jsonl must be that of a run that was never disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from nvlm_train.train.checkpoint import directory as files
from nvlm_train.train.checkpoint.manifest import damage, read_manifest
from tests.train.layouts import layout
from tests.train.smoke import make_smoke_data, overrides, read_metrics

STEPS = 6
"""Of each stage, with a checkpoint every second."""
PATIENCE_S = 300


@dataclass(frozen=True)
class Life:
    """Watches one start of the command from outside."""

    run_dir: Path
    log: Path
    log_start: int
    metrics_size: int
    process: subprocess.Popen

    def said(self, text: str) -> bool:
        """Returns whether the log of this life has a text."""
        return text.encode() in self.log.read_bytes()[self.log_start :]


@dataclass(frozen=True)
class Moment:
    """Describes a kind of moment: when it has come, and how long it may last."""

    has_come: Callable[[Life], bool]
    seconds: float


def _is_saving(life: Life) -> bool:
    return any((life.run_dir / "checkpoints").glob("writing-*"))


def _has_saved(life: Life) -> bool:
    """Returns whether a checkpoint has just got its name; the next one is some steps away."""
    return life.said(": saved ")


def _is_handing_over(life: Life) -> bool:
    return life.said(f"pretrain-{STEPS:08d}")


def _is_loading_data(life: Life) -> bool:
    """Returns whether rank 0 reads data. The caches beside the shards were removed before."""
    return bool(_caches(life.run_dir.parent))


def _is_logging(life: Life) -> bool:
    path = life.run_dir / "metrics.jsonl"
    return path.exists() and path.stat().st_size > life.metrics_size


def _is_anywhere(life: Life) -> bool:
    return life.said(f" of {STEPS}\n")


def _caches(root: Path) -> list[Path]:
    return [
        path for path in (root / "data").glob("*") if ".tar" in path.name and path.suffix != ".tar"
    ]


MOMENTS = {
    "save": Moment(_is_saving, 0.15),
    "saved": Moment(_has_saved, 0.5),
    "hand-over": Moment(_is_handing_over, 1.0),
    "data": Moment(_is_loading_data, 2.0),
    "log": Moment(_is_logging, 0.002),
    "any": Moment(_is_anywhere, 3.0),
}


@dataclass
class Chaos:
    """Holds a directory with data and an undisturbed run, and kills runs in it.

    Args:
        root: everything goes there.
        seed: of delays and victims.
        overrides: of the recipe, for all runs.
    """

    root: Path
    seed: int = 0
    overrides: tuple[str, ...] = ()
    done: Counter = field(default_factory=Counter)
    """Kills by kind."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        make_smoke_data(self.root / "data")
        self._lives = 0
        self._whole = self.root / "whole"
        self._finish(self._whole)

    def kill(self, kinds: list[str]) -> None:
        """Kills once at each kind of moment, in this order; then lets the run end and compares it."""
        run_dir = self._new_run()
        for kind in kinds:
            run_dir = self._kill_once(kind, run_dir)
        self._finish(run_dir)
        self.compare(run_dir)

    def move(self, kind: str, name: str) -> tuple[Path, Path]:
        """Kills once, and lets the run end in another layout. The undisturbed run and this one."""
        run_dir = self._kill_once(kind, self._new_run())
        self._finish(run_dir, name)
        return self._whole, run_dir

    def _kill_once(self, kind: str, run_dir: Path) -> Path:
        """Returns the run that was killed."""
        while not self._kill_at(kind, run_dir):
            # The run was through before the moment came: look at it and take another.
            self.compare(run_dir)
            run_dir = self._new_run()
        self.done[kind] += 1
        return run_dir

    def _finish(self, run_dir: Path, name: str = "TP2 PP2") -> None:
        code = self._start(run_dir, name).process.wait(PATIENCE_S)
        assert code == 0, self._log(run_dir).read_text()

    def compare(self, run_dir: Path) -> None:
        """Compares a finished run with the undisturbed one."""
        assert (run_dir / "metrics.jsonl").read_bytes().endswith(b"\n")
        assert read_metrics(run_dir) == read_metrics(self._whole)
        assert _names(run_dir) == _names(self._whole)
        mine, undisturbed = (_tensor_digests(each) for each in (run_dir, self._whole))
        assert mine == undisturbed

    def _new_run(self) -> Path:
        self._lives += 1
        return self.root / f"run{self._lives:03d}"

    def _log(self, run_dir: Path) -> Path:
        return run_dir.with_suffix(".log")

    def _start(self, run_dir: Path, name: str = "TP2 PP2") -> Life:
        world, parallel = layout(name)
        own = [f"stages.{name}.steps={STEPS}" for name in ("pretrain", "sft")]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        arguments = overrides(self.root / "data", run_dir, *parallel, *own, *self.overrides)
        log, metrics = self._log(run_dir), run_dir / "metrics.jsonl"
        start = log.stat().st_size if log.exists() else 0
        with log.open("a") as stream:
            process = subprocess.Popen(
                [sys.executable, *torchrun, "-m", "nvlm_train", "train", *arguments],
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        size = metrics.stat().st_size if metrics.exists() else 0
        return Life(run_dir, log, start, size, process)

    def _kill_at(self, kind: str, run_dir: Path) -> bool:
        """Kills at a moment. Returns whether it came before the run was over."""
        if kind == "data":
            for cache in _caches(self.root):
                cache.unlink()
        moment, life = MOMENTS[kind], self._start(run_dir)
        deadline = time.monotonic() + PATIENCE_S
        while not moment.has_come(life):
            if life.process.poll() is not None:
                assert life.process.returncode == 0, life.log.read_text()[life.log_start :]
                return False
            assert time.monotonic() < deadline, f"{kind} did not come: {life.log.read_text()}"
            time.sleep(0.001)
        time.sleep(self._random.uniform(0, moment.seconds))
        before = files.complete_checkpoints(run_dir)
        family = _family(life.process)
        _kill(self._victims(family))
        life.process.wait(PATIENCE_S)
        _await_end(family)
        look_at_remains(run_dir, before)
        return True

    def _victims(self, family: list[psutil.Process]) -> list[psutil.Process]:
        """Returns torchrun and its ranks, as when a node dies, or one rank alone."""
        torchrun = family[0]
        ranks = [each for each in family if _parent(each) == torchrun.pid]
        alone = ranks and self._random.random() < 0.5
        return [self._random.choice(ranks)] if alone else [torchrun, *ranks]


def look_at_remains(run_dir: Path, before: list[Path]) -> None:
    """Checks what must hold at any moment: checkpoints are complete, none is lost, no step is there twice."""
    checkpoints = files.named_checkpoints(run_dir)
    for checkpoint in checkpoints:
        manifest = read_manifest(checkpoint)
        assert damage(checkpoint, manifest, manifest.files) == []
    # With keep_last=2 a save may have replaced the older of two, never the newest.
    assert set(before[-1:]) <= set(checkpoints)
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    steps = [json.loads(line)["global_step"] for line in lines]
    assert steps == list(range(1, len(steps) + 1))


def _family(process: subprocess.Popen) -> list[psutil.Process]:
    """Returns torchrun first, then all processes below it."""
    try:
        torchrun = psutil.Process(process.pid)
        return [torchrun, *torchrun.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _parent(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def _kill(processes: list[psutil.Process]) -> None:
    for each in processes:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue


def _await_end(family: list[psutil.Process]) -> None:
    """Waits until all ranks have ended, because they lost their peers."""
    _, alive = psutil.wait_procs(family, timeout=60)
    assert alive == [], [each.cmdline() for each in alive]


def _names(run_dir: Path) -> list[str]:
    return sorted(str(path.relative_to(run_dir)) for path in run_dir.rglob("*"))


def _tensor_digests(run_dir: Path) -> dict[str, str]:
    """Returns digests of the last checkpoint's shards: weights, fp32 copies, moments, RNG."""
    content = read_manifest(files.complete_checkpoints(run_dir)[-1])
    return {name: each.sha256 for name, each in content.files.items() if name.endswith(".distcp")}


def main() -> int:
    """Runs `make chaos`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = [list(MOMENTS)[number % len(MOMENTS)] for number in range(options.kills)]
    random.Random(options.seed).shuffle(kinds)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        chaos = Chaos(Path(directory), options.seed)
        for first in range(0, len(kinds), 5):
            chaos.kill(kinds[first : first + 5])
            sys.stderr.write(f"{sum(chaos.done.values())} kills: {dict(chaos.done)}\n")
    kills = {kind: chaos.done[kind] for kind in MOMENTS}
    seconds = round(time.monotonic() - started)
    sys.stdout.write(json.dumps({"kills": kills, "seed": options.seed, "seconds": seconds}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
