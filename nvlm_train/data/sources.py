"""The sources of a blend, opened: their shards, what is in them, and what cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from nvlm_train.data.lengths import ShardLengths
from nvlm_train.data.reader import ShardReader

_EXAMPLES = 3


@dataclass(frozen=True)
class Source:
    """A source of the blend with all its shards open."""

    name: str
    weight: float
    readers: tuple[ShardReader, ...]
    lengths: tuple[ShardLengths, ...]

    @property
    def num_samples(self) -> int:
        return sum(len(reader.index) for reader in self.readers)

    @property
    def num_unusable(self) -> int:
        return sum(len(lengths.reasons) for lengths in self.lengths)

    @property
    def num_truncated(self) -> int:
        return sum(int(lengths.is_truncated.sum()) for lengths in self.lengths)


@dataclass(frozen=True)
class UnusableKind:
    """Samples of a blend that cannot be used for one kind of reason."""

    kind: str
    count: int
    examples: tuple[str, ...]
    """`sample=... in shard=...: reason`, a few."""


def unusable_kinds(sources: Sequence[Source]) -> tuple[UnusableKind, ...]:
    """Reasons grouped by the text before their first colon, most frequent first."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for source in sources:
        for reader, lengths in zip(source.readers, source.lengths, strict=True):
            for row, reason in lengths.reasons.items():
                kind = reason.partition(":")[0]
                counts[kind] += 1
                shown = examples.setdefault(kind, [])
                if len(shown) < _EXAMPLES:
                    shown.append(f"sample={reader.key(row)} in shard={reader.name}: {reason}")
    return tuple(
        UnusableKind(kind, count, tuple(examples[kind])) for kind, count in counts.most_common()
    )
