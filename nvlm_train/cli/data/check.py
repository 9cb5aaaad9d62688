"""`nvlm data check`: damage, unusable samples, duplicates and evaluation material in shards."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from nvlm_train.errors import ConfigError

if TYPE_CHECKING:
    from nvlm_train.config.schema import LoaderConfig
    from nvlm_train.data.checking.check import CheckSettings
    from nvlm_train.data.checking.findings import Findings
    from nvlm_train.data.checking.shard import ShardJob

EXIT_FOUND = 1
_MAX_DISTANCE = 7
_MAX_IMAGE_PIXELS = 178_956_970


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command with its arguments."""
    command = commands.add_parser("check", help="look for damage, duplicates and leaks")
    command.add_argument(
        "what", nargs="*", metavar="KEY=VALUE | SHARDS", help="Hydra overrides, or tars by name"
    )
    command.add_argument("--stage", help="default: the schedule's last")
    command.add_argument(
        "--against", nargs="+", default=[], metavar="FILE", help="evaluation tars or .jsonl"
    )
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    command.add_argument(
        "--image-distance", type=int, default=3, metavar="BITS",
        help="bits of 64 in which the hashes of near-duplicate images may differ",
    )  # fmt: skip
    command.add_argument(
        "--ignore", action="append", default=[], metavar="KIND", help="report, but exit with 0"
    )
    command.add_argument("--json", metavar="FILE", help="write the findings there, too")
    command.add_argument("--recipes", metavar="DIR", help="your own recipes")
    command.set_defaults(run=check)


def check(options: argparse.Namespace) -> int:
    """Prints what was found; the exit code is 1 when that is anything.

    Raises:
        NvlmError: arguments, the recipe, or evaluation material that cannot be read.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from nvlm_train.data.checking.check import run_check

    jobs, settings = _plan(options)
    columns = (
        TextColumn("checking shards"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("shards", total=len(jobs))
        findings = run_check(jobs, settings, lambda: progress.advance(task))
    _print(findings, options.ignore)
    if options.json:
        Path(options.json).write_text(json.dumps(asdict(findings), indent=2) + "\n")
    return EXIT_FOUND if set(findings.kinds) - set(options.ignore) else 0


def _plan(options: argparse.Namespace) -> tuple[list[ShardJob], CheckSettings]:
    """Returns the shards and how to look at them.

    Raises:
        ConfigError: everything that is wrong with the arguments.
    """
    from nvlm_train.data.checking.check import CheckSettings
    from nvlm_train.data.checking.evaluation import expand
    from nvlm_train.data.checking.shard import ShardJob

    overrides = [each for each in options.what if "=" in each]
    patterns = [each for each in options.what if "=" not in each]
    problems = []
    if bool(overrides) == bool(patterns):
        problems.append(f"arguments={options.what}: give a recipe's overrides, or names of shards")
    if options.workers < 1:
        problems.append(f"--workers={options.workers} must be at least 1")
    if not 0 <= options.image_distance <= _MAX_DISTANCE:
        problems.append(
            f"--image-distance={options.image_distance} must be 0 to {_MAX_DISTANCE}; "
            "with more, different images count as alike"
        )
    try:
        against = tuple(expand(options.against))
        names = expand(patterns)
    except ValueError as error:
        problems.append(f"shards: {error}; balance the braces")
    if problems:
        raise ConfigError(problems)
    if patterns:
        jobs = [ShardJob(number, name, name) for number, name in enumerate(names)]
        recipe, stage, pixels = None, "", _MAX_IMAGE_PIXELS
    else:
        from nvlm_train.recipe.load import load_recipe

        recipe = load_recipe(overrides, options.recipes)
        stage = options.stage or recipe.schedule[-1]
        if stage not in recipe.stages:
            raise ConfigError([f"stage={stage}: the recipe has {', '.join(recipe.stages)}"])
        jobs = _jobs(recipe.stages[stage].blend, recipe.loader)
        pixels = recipe.loader.max_image_pixels
    settings = CheckSettings(
        recipe, stage, pixels, options.image_distance, against, min(options.workers, len(jobs))
    )
    return jobs, settings


def _jobs(blend_name: str, loader: LoaderConfig) -> list[ShardJob]:
    """Returns every shard of the blend once for each field mapping."""
    from nvlm_train.config.paths import data_recipes_dir
    from nvlm_train.data.checking.shard import ShardJob
    from nvlm_train.data.plan.data_recipe import list_shards, read_blend
    from nvlm_train.data.shards.store import Store

    store = Store(loader.data_root)
    blend = list_shards(read_blend(blend_name, str(data_recipes_dir())), store)
    remedies = {
        (name, source.fields): source.remedy for source in blend.sources for name in source.shards
    }
    return [
        ShardJob(number, name, store.path(name), remedy, fields, loader.index_dir)
        for number, ((name, fields), remedy) in enumerate(remedies.items())
    ]


def _print(findings: Findings, ignored: Collection[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(
        f"samples: {findings.num_samples:,}, images: {findings.num_images:,}, shards: "
        f"{findings.num_shards:,}; samples that show the same image file as an earlier one: "
        f"{findings.shared_images:,}"
    )
    if not findings.kinds:
        console.print("[green]nothing found[/]")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("found")
    table.add_column("count", justify="right")
    table.add_column("examples", overflow="fold")
    for name, kind in sorted(findings.kinds.items(), key=lambda item: -item[1].count):
        style = "dim" if name in ignored else "red"
        lines = [
            f"[bold]{escape(each.shard)}[/] {escape(each.key)}\n  {escape(_rest(each.reason, name))}"
            for each in kind.examples[:3]
        ]
        table.add_row(f"[{style}]{escape(name)}[/]", f"{kind.count:,}", "\n".join(lines))
    console.print(table)


def _rest(reason: str, kind: str) -> str:
    """Returns the reason without the kind, which stands in the first column."""
    return reason.removeprefix(f"{kind}: ")
