"""Compares training steps with those of another checkout: in turns, on this machine, in the same run.

    git worktree add ../before main
    OMP_NUM_THREADS=1 python -m benchmarks.before ../before

Both sides run the step of `benchmarks/step_time.py` (`step_fp32`, `step_bf16`) and those of
`benchmarks/architectures.py` (`d`, `x`, `h`; `d_tp2_pp2` and so on with two tensor-parallel ranks in each of
two pipeline stages), each in processes of its own that wait while the other side works. A repeat gives
one ratio, seconds before over seconds now; the result is their median, smallest and largest. Beside wall
seconds stand CPU seconds, summed over a side's ranks: they say more on a machine that does other work too.

This file runs in the other checkout too, which has none: it uses what both have, and places a batch
where placing exists.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

CASES = ("step_fp32", "step_bf16", "d", "x", "h", "d_tp2_pp2", "x_tp2_pp2", "h_tp2_pp2")
PARALLEL = "_tp2_pp2"


def ranks_of(case: str) -> int:
    """Processes that a side has."""
    return 4 if case.endswith(PARALLEL) else 1


# ---- a process of one side ----


def work(case: str, root: Path) -> None:
    """Takes a step for each line on stdin; rank 0 answers with wall seconds and CPU seconds."""
    import benchmarks
    from nvlm_train.parallel.topology import start_process_group

    assert Path(benchmarks.__file__).is_relative_to(root), f"{benchmarks.__file__}: not of {root}"
    start_process_group()
    step = _make_step(case)
    step()
    is_first = torch.distributed.get_rank() == 0
    _answer("ready", is_first)
    for _ in sys.stdin:
        torch.distributed.barrier()
        started, used = time.perf_counter(), time.process_time()
        step()
        cpu_seconds = torch.tensor(time.process_time() - used, dtype=torch.float64)
        torch.distributed.all_reduce(cpu_seconds)
        _answer(f"{time.perf_counter() - started} {cpu_seconds.item()}", is_first)


def _answer(line: str, is_first: bool) -> None:
    if is_first:
        sys.stdout.write(f"answer {line}\n")
        sys.stdout.flush()


def _make_step(case: str) -> Callable[[], object]:
    from benchmarks import step_time

    if case.startswith("step_"):
        with tempfile.TemporaryDirectory() as name:
            model = step_time.reference_models(Path(name))
            return step_time.own_step(model, Path(name), case.removeprefix("step_"))
    return _architecture_step(case)


def _architecture_step(case: str) -> Callable[[], object]:
    from dataclasses import replace

    from benchmarks import architectures
    from nvlm_train.config.schema import ParallelConfig
    from nvlm_train.train.step import run_step

    if case.endswith(PARALLEL):
        as_written = architectures.make_recipe

        def make_recipe(*arguments: Any) -> Any:
            recipe = as_written(*arguments)
            stage = replace(recipe.stages["sft"], parallel=ParallelConfig(2, 2, True))
            return replace(recipe, stages={"sft": stage})

        architectures.make_recipe = make_recipe
    engine, batch, _ = architectures.prepare(case[0])  # type: ignore[arg-type]
    place = _placing()
    share = _own_share(batch, engine)
    return lambda: run_step(engine, place(share, engine.topology), num_sources=1)


def _own_share(batch: Any, engine: Any) -> Any:
    """The batch with the tiles that this rank encodes: a loader gives each rank of a replica its part."""
    from dataclasses import replace

    from nvlm_train.data.loading.loader import split_tiles

    topology, (round_,) = engine.topology, batch.rounds
    counts = split_tiles(len(round_.pixels_TCEE), topology.replica_size)
    own = round_.pixels_TCEE.split(list(counts))[topology.replica_rank]
    return replace(batch, rounds=(replace(round_, tile_split=counts, pixels_TCEE=own),))


def _placing() -> Callable[..., Any]:
    """How a batch becomes what `run_step` takes: older checkouts take it as it is."""
    try:
        from nvlm_train.train.placing import place
    except ImportError:
        return lambda batch, topology: batch
    return place


# ---- the one that asks ----


class Side:
    """The processes of one checkout for one case."""

    def __init__(self, root: Path, case: str) -> None:
        self.root, self._case = root.resolve(), case
        size, port = ranks_of(case), _free_port()
        self._processes = [self._start(rank, size, port) for rank in range(size)]
        self._read()

    def _start(self, rank: int, size: int, port: int) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PYTHONPATH": str(self.root), "RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        # With -P the folder of this file is not where imports start.
        command = [sys.executable, "-P", __file__, str(self.root), "--work", self._case]
        return subprocess.Popen(
            command, cwd=self.root, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def step(self) -> tuple[float, ...]:
        """Takes one step, and returns the first rank's wall seconds and all ranks' CPU seconds."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
        return tuple(map(float, self._read().split()))

    def _read(self) -> str:
        stdout = self._processes[0].stdout
        assert stdout is not None
        for line in stdout:
            if line.startswith("answer "):
                return line.removeprefix("answer ").strip()
        raise SystemExit(f"{self._case} in {self.root}: the first rank ended; its error is above")

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def sides(before: Path, now: Path, case: str) -> Iterator[tuple[Side, Side]]:
    """Both sides, ready, and ended at the end."""
    with contextlib.ExitStack() as stack:
        found = []
        for root in (before, now):
            found.append(side := Side(root, case))
            stack.callback(side.close)
        yield found[0], found[1]


def compare(before: Path, now: Path, case: str, repeats: int) -> dict[str, Any]:
    """Ratios and medians of wall and of CPU seconds; who begins takes turns as well."""
    seconds: dict[str, list[tuple[float, ...]]] = {"before": [], "now": []}
    with sides(before, now, case) as (first, second):
        for repeat in range(repeats):
            turns = [("before", first), ("now", second)]
            for name, side in turns if repeat % 2 else reversed(turns):
                seconds[name].append(side.step())
    return {
        clock: ratios(
            before=[each[place] for each in seconds["before"]],
            now=[each[place] for each in seconds["now"]],
        )
        for place, clock in enumerate(("wall", "cpu"))
    }


def ratios(**sides: list[float]) -> dict[str, float]:
    """Returns the median seconds of two sides, by their names, and the ratios of the first to the second."""
    first, second = sides.values()
    found = [slow / fast for slow, fast in zip(first, second, strict=True)]
    figures = {f"{name}_seconds": statistics.median(seconds) for name, seconds in sides.items()}
    figures |= {
        "ratio": statistics.median(found),
        "smallest_ratio": min(found),
        "largest_ratio": max(found),
    }
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> int:
    """Compares and prints one line of JSON; a case appears on the error stream when it is ready."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path, metavar="CHECKOUT", help="what to compare with")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--work", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.before)
        return 0
    now, found = Path(__file__).parent.parent, {}
    for case in options.cases:
        found[case] = compare(options.before, now, case, options.repeats)
        sys.stderr.write(json.dumps({case: found[case]}) + "\n")
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
