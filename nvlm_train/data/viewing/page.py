"""The whole page: figures, lanes of a step, samples. One file, no scripts, no outside links."""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template

from nvlm_train.batch import PackPlan
from nvlm_train.data.plan.statistics import budget, imbalance, rank_loads
from nvlm_train.data.viewing.cards import card
from nvlm_train.data.viewing.samples import SampleView
from nvlm_train.data.viewing.steps import PlacedSample, StepView

_COLOURS = 8
_NARROW = 0.05
"""Share of a pack below which a sample's bar has no room for its key."""
_CROSS_LEGEND = (
    '<span><span class="slots cross">&nbsp; tile</span>read through cross-attention</span>'
)


@dataclass(frozen=True)
class PageContext:
    """The facts of a page about where its samples come from."""

    recipe: str
    stage: str
    architecture: str
    blend: str
    sequence_length: int
    pack_length: int
    sources: tuple[str, ...]
    """All names of the blend: their order gives the colours."""
    command: str
    """The command that makes the page again."""

    @property
    def about(self) -> str:
        """One line under the heading."""
        return (
            f"NVLM-{self.architecture.upper()}, recipe {self.recipe}, stage {self.stage}, "
            f"blend {self.blend}, at most {self.sequence_length:,} tokens a sample and "
            f"{self.pack_length:,} a pack"
        )

    def colour(self, source: str) -> str:
        """Returns a CSS colour that stays the source's on every page of the blend."""
        return f"var(--s{self.sources.index(source) % _COLOURS})"


def source_page(context: PageContext, source: str, views: Sequence[SampleView]) -> str:
    """Returns a page of some samples of one source."""
    cards = [card(view, f"s{n}", context.colour(source), "") for n, view in enumerate(views)]
    encoded = [view.encoded for view in views if view.encoded is not None]
    tokens = sum(len(each.token_ids) for each in encoded)
    trained = sum(len(each.label_ids) for each in encoded)
    figures = [
        (f"{len(views)}", f"sample{_s(len(views))} shown"),
        (f"{tokens:,}", "tokens"),
        (f"{trained:,}", f"trained tokens, {_share(trained, tokens)}"),
        (f"{sum(each.num_tiles for each in encoded):,}", "tiles"),
    ]
    return _page(context, f"Samples of {source}", figures, "", "Samples", cards)


def step_page(context: PageContext, step: StepView) -> str:
    """Returns a page of a step with its ranks and packs, and of some of its samples."""
    shown = [(n, each) for n, each in enumerate(step.samples) if each.view is not None]
    cards = [
        card(each.view, f"s{n}", context.colour(each.source), _place(each))
        for n, each in shown
        if each.view is not None
    ]
    count = len(step.samples)
    title = "Samples" if len(shown) == count else f"{len(shown)} of its {count} samples"
    return _page(
        context,
        f"Step {step.plan.step}",
        _step_figures(step),
        _lanes(context, step),
        title,
        cards,
    )


def _page(
    context: PageContext,
    heading: str,
    figures: Sequence[tuple[str, str]],
    lanes: str,
    shown: str,
    cards: Sequence[str],
) -> str:
    template = importlib.resources.files("nvlm_train.data.viewing").joinpath("page.html")
    return Template(template.read_text(encoding="utf-8")).substitute(
        title=html.escape(f"{heading}: {context.recipe}, {context.stage}"),
        heading=html.escape(heading),
        about=html.escape(context.about),
        figures="".join(
            f'<div class="figure"><b>{value}</b><span>{html.escape(name)}</span></div>'
            for value, name in figures
        ),
        lanes=lanes,
        shown=html.escape(shown),
        crosslegend="" if context.architecture == "d" else _CROSS_LEGEND,
        cards="".join(cards),
        footer=f"made by <code>{html.escape(context.command)}</code>",
    )


def _step_figures(step: StepView) -> list[tuple[str, str]]:
    ranks = step.plan.packs
    packs = [pack for rank in ranks for pack in rank]
    tokens = sum(pack.num_tokens for pack in packs)
    figures = [
        (f"{len(step.samples):,}", f"sample{_s(len(step.samples))}"),
        (
            f"{len(packs)}",
            f"pack{_s(len(packs))} on {len(ranks)} data-parallel rank{_s(len(ranks))}",
        ),
        (
            _share(tokens, budget(step.plan)),
            f"of packs of {step.plan.pack_length:,} tokens used: {tokens:,}",
        ),
        (f"{sum(pack.num_tiles for pack in packs):,}", "tiles to encode"),
    ]
    if len(ranks) > 1:
        balance = [
            f"{imbalance(rank_loads(step.plan, load)):.2f}"
            for load in (_num_tokens, _num_tiles, step.attention.of_pack)
        ]
        figures.append((" / ".join(balance), "busiest rank over mean: tokens / tiles / attention"))
    return figures


def _num_tokens(pack: PackPlan) -> int:
    return pack.num_tokens


def _num_tiles(pack: PackPlan) -> int:
    return pack.num_tiles


def _lanes(context: PageContext, step: StepView) -> str:
    used = [name for name in context.sources if name in {each.source for each in step.samples}]
    legend = "".join(
        f'<span><i style="--c:{context.colour(name)}"></i>{html.escape(name)}</span>'
        for name in used
    )
    rows = [_rank(context, step, rank) for rank in range(len(step.plan.packs))]
    return (
        "<h2>Which rank gets what</h2>"
        f'<div class="legend">{legend}<span>a bar is a pack; samples shown below are solid and '
        f"link there; hatching is padding</span></div>{''.join(rows)}"
    )


def _rank(context: PageContext, step: StepView, rank: int) -> str:
    packs = step.plan.packs[rank]
    tokens, tiles = (
        sum(pack.num_tokens for pack in packs),
        sum(pack.num_tiles for pack in packs),
    )
    numbers = {id(each): n for n, each in enumerate(step.samples)}
    rows = []
    for number, pack in enumerate(packs):
        inside = step.pack(rank, number)
        bars = "".join(_bar(context, each, numbers[id(each)], step) for each in inside)
        note = f"{_share(pack.num_tokens, step.plan.pack_length)} · {pack.num_tiles} tile{_s(pack.num_tiles)}"
        rows.append(
            f'<div class="pack"><span>{number}</span><div class="bar">{bars}</div>'
            f"<span>{note}</span></div>"
        )
    return (
        f'<section class="rank"><header><b>rank {rank}</b><span>{len(packs)} pack{_s(len(packs))} · '
        f"{tokens:,} tokens · {tiles:,} tiles</span></header>{''.join(rows)}</section>"
    )


def _bar(context: PageContext, each: PlacedSample, number: int, step: StepView) -> str:
    share = each.ref.num_tokens / step.plan.pack_length
    style = f"--c:{context.colour(each.source)};width:{share:.3%}"
    title = html.escape(
        f"{each.source} {each.key}: {each.ref.num_tokens} tokens, {each.ref.num_tiles} tiles"
    )
    narrow = ' class="narrow"' if share < _NARROW else ""
    key = html.escape(each.key)
    if each.view is None:
        return f'<span{narrow} style="{style}" title="{title}">{key}</span>'
    return f'<a{narrow} href="#s{number}" style="{style}" title="{title}">{key}</a>'


def _place(each: PlacedSample) -> str:
    last = each.offset + each.ref.num_tokens - 1
    return f"rank {each.dp_rank} · pack {each.pack} · tokens {each.offset}–{last}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0%"


def _s(count: int) -> str:
    return "" if count == 1 else "s"
