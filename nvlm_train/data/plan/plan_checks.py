"""What a plan refuses: other data than a run began with, too many unusable samples, too large ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nvlm_train.data.plan.sources import Source, UnusableKind
from nvlm_train.errors import ShardError, TrainingError

PLAN_DIGEST = "(plan)"
"""Name of the plan's own entry among the shards' digests."""


def check_digests(recorded: Mapping[str, str], now: Mapping[str, str], first_plan: str) -> None:
    """Compares the digests of the run that is continued with those of today's data.

    Args:
        recorded: of the checkpoint.
        now: today's.
        first_plan: the plan's digest as checkpoints of format 1 have it.

    Raises:
        ShardError: other contents, a shard more or less, or another order of the samples.
    """
    remedy = "or start a new run"
    for name, digest in recorded.items():
        if name not in now:
            raise ShardError(
                f"shard={name} was in the blend when the run began and is not any more; "
                f"put it back, {remedy}"
            )
        if name != PLAN_DIGEST and now[name] != digest:
            raise ShardError(
                f"changed shard={name}: digest={now[name][:12]}, the run began with "
                f"{digest[:12]}; restore the shard, {remedy}"
            )
    for name in now:
        if name not in recorded:
            raise ShardError(
                f"shard={name} was not in the blend when the run began; take it out, {remedy}"
            )
    if recorded[PLAN_DIGEST] not in (now[PLAN_DIGEST], first_plan):
        raise ShardError(
            "the shards are those the run began with, but seed, batch, weights, order of the "
            "sources or encoding (tokenizer, tiling, prompts, nvlm-train's own version) are not; "
            f"restore them, {remedy}"
        )


def check_tiles(sources: Sequence[Source], limit: int | None) -> None:
    """Raises TrainingError: a sample of more tiles than `batch.max_tiles_per_pack`."""
    for source in sources:
        if limit is not None and source.table.max_tiles > limit:
            raise TrainingError(
                f"batch.max_tiles_per_pack={limit}: source={source.name} has a sample of "
                f"{source.table.max_tiles} tiles, which no pack could hold; use at least that, "
                "or fewer tiling.max_tiles"
            )


def check_skipped(
    sources: Sequence[Source], unusable: Sequence[UnusableKind], max_skipped_fraction: float
) -> None:
    """Compares the unusable share of what would be drawn with the recipe's tolerance.

    Raises:
        TrainingError: it is larger, or a source has no usable sample.
    """
    examples = "\n".join(f"  {text}" for kind in unusable for text in kind.examples)
    for source in sources:
        if source.num_unusable == source.num_samples:
            raise TrainingError(
                f"source={source.name} has no usable sample, for example\n{examples}"
            )
    total = sum(source.weight for source in sources)
    share = sum(s.weight / total * s.num_unusable / s.num_samples for s in sources)
    if share > max_skipped_fraction:
        raise TrainingError(
            f"{share:.2%} of the samples drawn cannot be used, more than "
            f"loader.max_skipped_fraction={max_skipped_fraction}; mend them or raise the "
            f"limit:\n{examples}"
        )
