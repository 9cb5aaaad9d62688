"""One shard: every record parsed and encoded, every image decoded in full, everything hashed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.checking.findings import Example, Findings
from nvlm_train.data.checking.fingerprints import (
    hash_parts,
    perceptual_hash,
    sample_texts,
    split_words,
    text_grams,
)
from nvlm_train.data.images import decode_image
from nvlm_train.data.index.files import IndexFiles
from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.index.shard_index import load_index
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.samples.messages import Message
from nvlm_train.data.samples.records import read_messages
from nvlm_train.data.shards.fields import OWN_FIELDS, FieldMapping
from nvlm_train.data.shards.store import DIRECT
from nvlm_train.errors import ShardError

TORN = "torn or refused shard"
MISSING = "missing shard"
_NO_LABELS = "every label is masked: the conversation has no assistant turn"


@dataclass(frozen=True, slots=True)
class ShardJob:
    """A shard that is to be checked."""

    number: int
    name: str
    """The name as the data recipe writes it."""
    path: str
    remedy: str = "correct the name"
    """What somebody who lacks the shard can do."""
    fields: FieldMapping = OWN_FIELDS
    index_dir: str | None = None

    def open(self) -> ShardReader:
        """Opens the shard. Raises FileNotFoundError, ShardError, OSError: it cannot be read."""
        shard = DIRECT.open(self.path)
        index = load_index(shard, IndexFiles(self.index_dir), self.fields)
        return ShardReader(self.name, shard, index, self.fields)


class SamplePrint(NamedTuple):
    """A hash of a sample."""

    hash: int
    row: int


class ImagePrint(NamedTuple):
    """The hashes of an image."""

    content: int
    """Hash of the file's bytes."""
    looks: int
    """Perceptual hash."""
    row: int
    """The row of its sample."""


class TextPrint(NamedTuple):
    """The hashes of a sample's text."""

    grams: NDArray[np.uint64]
    """[G]: hashes of its runs of words."""
    row: int


@dataclass(slots=True)
class ShardPrints:
    """The hashes of a shard's samples and images, in order; rows count from 0."""

    exact: list[SamplePrint] = field(default_factory=list)
    """Hashes of texts and image bytes."""
    near: list[SamplePrint] = field(default_factory=list)
    """Hashes of words and of the images' looks."""
    images: list[ImagePrint] = field(default_factory=list)
    texts: list[TextPrint] = field(default_factory=list)


class ShardChecker:
    """Checks shards by a stage's own encoding, or by what holds for every stage.

    Args:
        encoder: the stage's; without one (shards given by name) only the record's own form counts.
        max_image_pixels: larger images are findings.
    """

    def __init__(self, encoder: SampleEncoder | None, max_image_pixels: int) -> None:
        self._encoder = encoder
        self._max_pixels = max_image_pixels

    def check(self, job: ShardJob) -> tuple[Findings, ShardPrints]:
        """Returns what is wrong inside the shard, and the hashes of what is in it."""
        findings, prints = Findings(num_shards=1), ShardPrints()
        try:
            reader = job.open()
        except FileNotFoundError:
            findings.add(MISSING, 1, [Example(job.name, "", f"{job.path}: {job.remedy}")])
            return findings, prints
        except (ShardError, OSError) as error:
            findings.add(TORN, 1, [Example(job.name, "", str(error))])
            return findings, prints
        for row in range(len(reader.index)):
            findings.num_samples += 1
            reasons = dict.fromkeys(self._sample(reader, row, findings, prints))
            for kind in dict.fromkeys(reason.partition(":")[0] for reason in reasons):
                first = next(reason for reason in reasons if reason.startswith(kind))
                findings.add(kind, 1, [Example(job.name, reader.key(row), first)])
        return findings, prints

    def _sample(
        self, reader: ShardReader, row: int, findings: Findings, prints: ShardPrints
    ) -> Iterator[str]:
        """Yields the reasons why the sample cannot be used; adds the hashes of one that can."""
        found: list[ImagePrint] = []
        images = reader.index.image_rows(row)
        for number in range(len(images)):
            findings.num_images += 1
            data = reader.image(row, number)
            try:
                pixels_CHW = decode_image(data, self._max_pixels)
            except ValueError as error:
                yield str(error)
                continue
            found.append(ImagePrint(hash_parts(data), perceptual_hash(pixels_CHW), row))
        prints.images += found
        try:
            record = reader.record(row)
            messages = self._messages(reader, row, record)
        except ValueError as error:
            yield str(error)
            return
        texts = sample_texts(record, messages)
        words = [" ".join(split_words(text)).encode() for text in texts]
        contents = [image.content.to_bytes(8, "big") for image in found]
        looks = [image.looks.to_bytes(8, "big") for image in found]
        exact = hash_parts(*(text.encode() for text in texts), *contents)
        prints.exact.append(SamplePrint(exact, row))
        prints.near.append(SamplePrint(hash_parts(*words, *looks), row))
        prints.texts.append(TextPrint(text_grams(texts), row))

    def _messages(self, reader: ShardReader, row: int, record: bytes) -> tuple[Message, ...]:
        """Returns the sample's messages. Raises ValueError: the sample cannot be trained on."""
        key, sizes = reader.key(row), reader.index.image_sizes(row)
        if self._encoder is not None:
            self._encoder.encode(key, record, sizes)
            return self._encoder.messages(key, record, sizes)
        messages = read_messages(record, key, len(sizes), "sft")
        if not any(message.role == "assistant" for message in messages):
            raise ValueError(_NO_LABELS)
        return messages
