"""A planned step as lanes: which data-parallel rank gets which packs, and what is in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from nvlm_train.batch import SampleRef, StepPlan
from nvlm_train.data.plan.attention_cost import AttentionCost
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.viewing.samples import SampleView, view_ref
from nvlm_train.errors import SampleError


@dataclass(frozen=True)
class PlacedSample:
    """A sample of a step and where it stands."""

    ref: SampleRef
    key: str
    source: str
    dp_rank: int
    pack: int
    """The number of the pack on its rank."""
    offset: int
    """The position of its first token in the pack."""
    view: SampleView | None
    """The sample in full; None where the page only counts it."""


@dataclass(frozen=True)
class StepView:
    """A step, and some of its samples in full."""

    plan: StepPlan
    attention: AttentionCost
    samples: tuple[PlacedSample, ...]
    """All samples, in the order of rank, pack and offset."""

    def pack(self, dp_rank: int, pack: int) -> list[PlacedSample]:
        """Returns what stands in one pack."""
        return [each for each in self.samples if (each.dp_rank, each.pack) == (dp_rank, pack)]


def view_step(
    plan: DataPlan,
    encoder: SampleEncoder,
    step: int,
    dp_size: int,
    keys: Collection[str],
    count: int,
) -> StepView:
    """Returns step `step`; the samples with these keys, or the first `count`, are shown in full.

    The first ones are taken from all sources in turn, so that a small source is seen, too.

    Raises:
        SampleError: a key that is not in the step.
    """
    planned = plan.step(step, dp_size)
    placed = list(_place(plan, planned))
    if keys:
        chosen = [n for n, each in enumerate(placed) if each.key in keys]
        _check_keys(keys, placed, step)
    else:
        chosen = _sources_in_turn(placed)[:count]
    shown = {n: view_ref(plan, placed[n].ref, encoder) for n in chosen}
    samples = tuple(
        PlacedSample(
            each.ref, each.key, each.source, each.dp_rank, each.pack, each.offset, shown.get(n)
        )
        for n, each in enumerate(placed)
    )
    return StepView(planned, plan.packing.attention, samples)


def _check_keys(keys: Collection[str], placed: Sequence[PlacedSample], step: int) -> None:
    there = {each.key for each in placed}
    for key in keys:
        if key not in there:
            raise SampleError(
                f"step {step}", key, f"the step has no such key; its {len(placed)} samples are on "
                "its page without --key"
            )  # fmt: skip


def _sources_in_turn(placed: Sequence[PlacedSample]) -> list[int]:
    """Returns each source's first sample, then each one's second, and so on, by their places."""
    seen: Counter[str] = Counter()
    turns: list[tuple[int, int]] = []
    for n, each in enumerate(placed):
        turns.append((seen[each.source], n))
        seen[each.source] += 1
    return [n for _, n in sorted(turns)]


def _place(plan: DataPlan, planned: StepPlan) -> Iterator[PlacedSample]:
    for dp_rank, packs in enumerate(planned.packs):
        for number, pack in enumerate(packs):
            offset = 0
            for ref in pack.samples:
                key, source = plan.info(ref).key, plan.source_names[ref.source]
                yield PlacedSample(ref, key, source, dp_rank, number, offset, None)
                offset += ref.num_tokens
