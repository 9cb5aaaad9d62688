"""`nvlm data index`: every shard read once, so that plans need none of them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nvlm_train.errors import ConfigError, NvlmError, ShardError

if TYPE_CHECKING:
    from nvlm_train.config.schema import Recipe
    from nvlm_train.data.index.build import Encoding, IndexedShard, WantedShard

_SECONDS_BETWEEN_LINES = 10.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command with its arguments."""
    command = commands.add_parser(
        "index",
        help="offsets, image sizes and lengths of shards, ahead of training",
        description="Indexes the shards of data recipes. With a recipe's overrides (KEY=VALUE, as "
        "`nvlm train` takes them) also the lengths of every sample under each stage's encoding, "
        "and of stages whose batch.unit is packs the table that finds their steps. Without a data "
        "recipe those of the recipe's stages are taken. Shard patterns are indexed alone.",
    )
    command.add_argument(
        "what",
        nargs="+",
        metavar="DATA_RECIPE|SHARDS|KEY=VALUE",
        help="names or files of data recipes, patterns like x-{000000..000009}.tar, overrides",
    )
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N")
    command.add_argument(
        "--data-root", metavar="DIR", help="where shards lie; default: loader.data_root, or ."
    )
    command.add_argument(
        "--index-dir", metavar="DIR", help="default: loader.index_dir, or beside the shards"
    )
    command.add_argument("--recipes", metavar="DIR", help="your own recipes")
    command.set_defaults(run=index)


def index(options: argparse.Namespace) -> int:
    """Indexes what the arguments name.

    Raises:
        ConfigError: the recipe, a data recipe or a pattern.
        ShardError: shards that cannot be indexed, all of them; the others are indexed.
    """
    from nvlm_train.data.index.build import WantedShard, index_shards
    from nvlm_train.data.index.files import IndexFiles
    from nvlm_train.recipe.load import load_recipe

    overrides = [each for each in options.what if "=" in each]
    names = [each for each in options.what if "=" not in each and not _is_shards(each)]
    recipe = load_recipe(overrides, options.recipes) if overrides else None
    loader = recipe.loader if recipe else None
    root = options.data_root or (loader.data_root if loader else ".")
    directory = options.index_dir or (loader.index_dir if loader else None)
    encodings = _encodings(recipe)
    shards = _shards_of_recipes(names, recipe, root, encodings)
    for path in _patterns([each for each in options.what if _is_shards(each)]):
        shards.setdefault(WantedShard(path), ())
    start = time.perf_counter()
    work = index_shards(shards, list(encodings.values()), IndexFiles(directory), options.workers)
    done = list(_shown(work, len(shards)))
    _say(done, time.perf_counter() - start)
    failed = [shard.error for shard in done if shard.error]
    if failed:
        raise ShardError(f"{len(failed)} shard(s) cannot be indexed:\n" + "\n".join(sorted(failed)))
    if recipe and not names:
        _count_packs(recipe, options.workers)
    return 0


def _is_shards(argument: str) -> bool:
    return "=" not in argument and (argument.endswith(".tar") or "{" in argument)


def _patterns(patterns: list[str]) -> list[str]:
    from nvlm_train.data.shards.tar import expand_pattern

    try:
        return [path for pattern in patterns for path in expand_pattern(pattern)]
    except ValueError as error:
        raise ConfigError([f"shards={patterns}: {error}; balance the braces"]) from error


def _encodings(recipe: Recipe | None) -> dict[str, Encoding]:
    """Returns the encoding of every scheduled stage."""
    if recipe is None:
        return {}
    from nvlm_train.data.dataset import encoding_spec
    from nvlm_train.data.index.build import Encoding

    return {
        name: Encoding(recipe.model.tokenizer, encoding_spec(recipe.stages[name], recipe))
        for name in recipe.schedule
    }


def _shards_of_recipes(
    names: list[str], recipe: Recipe | None, root: str, stages: dict[str, Encoding]
) -> dict[WantedShard, tuple[int, ...]]:
    """Returns for every shard the numbers of the encodings under which its lengths are wanted."""
    from nvlm_train.config.paths import data_recipes_dir
    from nvlm_train.data.index.build import WantedShard
    from nvlm_train.data.plan.data_recipe import list_shards, read_blend
    from nvlm_train.data.shards.store import Store

    wanted = [(name, tuple(range(len(stages)))) for name in names]
    if recipe and not names:
        wanted = [(recipe.stages[stage].blend, (n,)) for n, stage in enumerate(stages)]
    store = Store(root)
    found: dict[WantedShard, tuple[int, ...]] = {}
    for name, numbers in wanted:
        for source in list_shards(read_blend(name, str(data_recipes_dir())), store).sources:
            for shard in source.shards:
                wanted_shard = WantedShard(store.path(shard), source.fields)
                before = found.get(wanted_shard, ())
                found[wanted_shard] = tuple(dict.fromkeys((*before, *numbers)))
    return found


def _shown(work: Iterable[IndexedShard], total: int) -> Iterator[IndexedShard]:
    """Yields the same shards and shows progress: a bar on a terminal, now and then a line in a log."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    samples, last, start = 0, time.perf_counter(), time.perf_counter()
    columns = (
        TextColumn("indexing"), BarColumn(), MofNCompleteColumn(), TextColumn("shards"),
        TextColumn("{task.fields[samples]:,} samples"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("shards", total=total, samples=0)
        for number, shard in enumerate(work, 1):
            samples += shard.num_samples
            bar.update(task, advance=1, samples=samples)
            now = time.perf_counter()
            if not console.is_terminal and now - last > _SECONDS_BETWEEN_LINES:
                last = now
                sys.stderr.write(
                    f"indexed {number:,} of {total:,} shards, {samples:,} samples, "
                    f"{samples / (now - start):,.0f} samples/s\n"
                )
            yield shard


def _say(done: list[IndexedShard], seconds: float) -> None:
    samples = sum(shard.num_samples for shard in done)
    known = sum(shard.was_known for shard in done)
    print(
        f"{samples:,} samples in {len(done):,} shard(s) in {seconds:.1f} s; {known:,} shard(s) were "
        "indexed already"
    )


def _count_packs(recipe: Recipe, num_workers: int) -> None:
    """Fills the tables of the stages that count packs."""
    from nvlm_train.config.paths import data_recipes_dir
    from nvlm_train.data.counting import count_ahead
    from nvlm_train.data.dataset import build_data

    for name in recipe.schedule:
        stage, directory = recipe.stages[name], str(data_recipes_dir())
        if stage.batch.unit != "packs":
            continue
        plan, _ = build_data(stage, recipe, directory)
        needed = stage.steps * stage.batch.size
        for packs in count_ahead(plan, recipe, name, directory, num_workers):
            sys.stderr.write(f"stage={name}: {min(packs, needed):,} of {needed:,} packs counted\n")
        table = plan.packs_before
        if table.before(table.num_windows) < needed:
            raise NvlmError(
                f"stage={name}: its sources leave the blend after "
                f"{table.before(table.num_windows):,} packs, and steps={stage.steps} need "
                f"{needed:,}; make fewer steps, or raise the data recipe's epochs and max_samples"
            )
        print(f"stage={name}: packs of {table.num_windows:,} windows of draws are known")
