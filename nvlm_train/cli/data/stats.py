"""`nvlm data stats`: a stage's blend on the terminal, and the same numbers as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nvlm_train.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from nvlm_train.config.schema import StageConfig
    from nvlm_train.data.plan.statistics import BlendStatistics, SourceStatistics

_LEVELS = " ▁▂▃▄▅▆▇█"
_BAR = 12


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command with its arguments."""
    command = commands.add_parser("stats", help="a stage's blend in numbers")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    command.add_argument("--stage", help="default: the schedule's last")
    command.add_argument("--steps", type=int, default=20, metavar="N", help="steps to plan")
    command.add_argument("--dp", type=int, default=1, metavar="N", help="data-parallel ranks")
    command.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    command.add_argument("--recipes", metavar="DIR", help="your own recipes")
    command.set_defaults(run=stats)


def stats(options: argparse.Namespace) -> int:
    """Prints the tables.

    Raises:
        NvlmError: the recipe or its shards.
    """
    from rich.console import Console
    from rich.markup import escape

    from nvlm_train.config.paths import data_recipes_dir
    from nvlm_train.data.dataset import build_data
    from nvlm_train.data.plan.data_recipe import read_blend
    from nvlm_train.data.plan.statistics import blend_statistics
    from nvlm_train.recipe.load import load_recipe

    recipe = load_recipe(options.overrides, options.recipes)
    name = options.stage or recipe.schedule[-1]
    problems = [
        f"--{each}={getattr(options, each)} must be at least 1"
        for each in ("steps", "dp")
        if getattr(options, each) < 1
    ]
    if name not in recipe.stages:
        problems.append(f"stage={name}: the recipe has {', '.join(recipe.stages)}")
    if problems:
        raise ConfigError(problems)
    stage = recipe.stages[name]
    # Looking is allowed where training would stop; the table says how much is unusable.
    looking = replace(recipe, loader=replace(recipe.loader, max_skipped_fraction=1.0))
    plan, _ = build_data(stage, looking, str(data_recipes_dir()))
    found = blend_statistics(plan, options.steps, options.dp, stage.steps)
    console = Console()
    console.print(f"\n[bold]{recipe.name}[/], stage {name}, blend {Path(stage.blend).stem}\n")
    blend = read_blend(stage.blend, str(data_recipes_dir()))
    if blend.note:
        console.print(f"[dim]{escape(blend.note)}[/]\n")
    tasks = {source.name: source.task for source in blend.sources}
    console.print(_held_table(found, tasks, stage.sequence_length))
    console.print(_drawn_table(found))
    console.print(_summary(found, stage))
    if options.json:
        Path(options.json).write_text(json.dumps(asdict(found), indent=2) + "\n")
    return 0


def _held_table(found: BlendStatistics, tasks: Mapping[str, str], sequence_length: int) -> Table:
    """Returns a table of what the shards hold, by task where the data recipe names tasks."""
    table = _table("What the sources hold")
    table.add_column("source", no_wrap=True)
    for heading in ("samples", "unusable", "cut", "tokens", "trained", "tiles"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"length, to {sequence_length:,}", no_wrap=True)
    task = ""
    for source in found.sources:
        held = source.held
        if tasks[source.name] != task:
            task = tasks[source.name]
            table.add_section()
            table.add_row(f"[dim]{task}[/]")
        table.add_row(
            source.name,
            f"{held.samples:,}",
            _warning(source.num_unusable),
            _warning(source.num_truncated),
            _short(held.tokens),
            _short(held.trained_tokens),
            _short(held.tiles),
            f"[cyan]{sparkline(source.lengths)}[/]",
        )
    return table


def _drawn_table(found: BlendStatistics) -> Table:
    """Returns a table of what the steps draw."""
    table = _table(f"What steps 0 to {found.num_steps - 1:,} draw")
    table.add_column("source", no_wrap=True)
    for heading in ("asked", "samples", "tokens", "trained", "tiles"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("trained tokens", no_wrap=True)
    table.add_column("epochs", justify="right", no_wrap=True)
    totals = _totals(found.sources)
    top = max(source.drawn.trained_tokens for source in found.sources) or 1
    for source in found.sources:
        drawn = source.drawn
        shares = [
            _share(part, whole)
            for part, whole in zip(
                (drawn.samples, drawn.tokens, drawn.trained_tokens, drawn.tiles),
                totals,
                strict=True,
            )
        ]
        filled = round(_BAR * drawn.trained_tokens / top)
        bar = f"[green]{'█' * filled}[/][dim]{'·' * (_BAR - filled)}[/]"
        table.add_row(
            source.name, f"{source.share_asked:.1%}", *shares, bar, f"{source.epochs:.2f}"
        )
    table.add_section()
    table.add_row("drawn in all", "", *(_short(total) for total in totals), "", "")
    return table


def _summary(found: BlendStatistics, stage: StageConfig) -> str:
    lines = [
        f"epochs: passes over a source's samples in all {stage.steps:,} steps, at this pace",
        f"packing: {found.packing_efficiency:.1%} of the token budget used, "
        f"{found.num_packs:,} packs of {_lengths(found.pack_lengths)} tokens",
    ]
    if found.dp_size > 1:
        tokens, tiles, attention = (
            f"{balance.mean:.3f} (worst step {balance.worst:.3f})"
            for balance in (found.balance_tokens, found.balance_tiles, found.balance_attention)
        )
        lines.append(
            f"{found.dp_size} data-parallel ranks, busiest over mean: tokens {tokens}, tiles {tiles}, "
            f"attention {attention}"
        )
    return "\n".join(lines) + "\n"


def _lengths(lengths: Sequence[int]) -> str:
    """
    >>> _lengths([3584, 4096]), _lengths([512])
    ('3,584 to 4,096', '512')
    """
    return " to ".join(f"{each:,}" for each in dict.fromkeys([lengths[0], lengths[-1]]))


def sparkline(counts: Sequence[int]) -> str:
    """Returns the counts as one line of bars; whatever is not zero shows.

    >>> sparkline([0, 1, 50, 100])
    ' ▁▄█'
    """
    top = max(counts) or 1
    return "".join(_LEVELS[-(-count * (len(_LEVELS) - 1) // top)] for count in counts)


def _totals(sources: Sequence[SourceStatistics]) -> tuple[int, int, int, int]:
    drawn = [source.drawn for source in sources]
    return (
        sum(each.samples for each in drawn),
        sum(each.tokens for each in drawn),
        sum(each.trained_tokens for each in drawn),
        sum(each.tiles for each in drawn),
    )


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _short(number: int) -> str:
    """
    >>> _short(950), _short(12_345), _short(2_500_000_000)
    ('950', '12.3k', '2.5G')
    """
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)


def _warning(count: int) -> str:
    return f"[yellow]{count:,}[/]" if count else "[dim]0[/]"
