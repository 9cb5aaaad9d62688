"""What a check found: kinds, how often, and a few examples of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

MAX_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Example:
    """One place where something is wrong."""

    shard: str
    key: str
    """Empty where the whole shard is meant."""
    reason: str


@dataclass(slots=True)
class Kind:
    """Everything found of one kind."""

    count: int = 0
    examples: list[Example] = field(default_factory=list)

    def add(self, count: int, examples: Iterable[Example]) -> None:
        """Counts all of them and keeps the first few examples."""
        self.count += count
        self.examples += list(examples)[: MAX_EXAMPLES - len(self.examples)]


@dataclass(slots=True)
class Findings:
    """Everything that is wrong, by kind, and what is only worth knowing."""

    num_shards: int = 0
    num_samples: int = 0
    num_images: int = 0
    kinds: dict[str, Kind] = field(default_factory=dict)
    shared_images: int = 0
    """Samples whose image file another sample has, too: usual where questions share an image."""

    def add(self, kind: str, count: int, examples: Iterable[Example]) -> None:
        """Adds some more of a kind; a count of 0 adds nothing."""
        if count:
            self.kinds.setdefault(kind, Kind()).add(count, examples)

    def merge(self, other: Findings) -> None:
        """Adds what another part of the data showed."""
        self.num_shards += other.num_shards
        self.num_samples += other.num_samples
        self.num_images += other.num_images
        for name, kind in other.kinds.items():
            self.add(name, kind.count, kind.examples)
