"""Evaluation material, and what of it turns up in training data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nvlm_train.data.checking.duplicates import Describe, differing_bits, places
from nvlm_train.data.checking.findings import MAX_EXAMPLES, Example, Findings
from nvlm_train.data.checking.fingerprints import (
    hash_parts,
    perceptual_hash,
    sample_texts,
    text_grams,
)
from nvlm_train.data.checking.shard import (
    ImagePrint,
    ShardChecker,
    ShardJob,
    ShardPrints,
    TextPrint,
)
from nvlm_train.data.checking.spill import SpilledTable
from nvlm_train.data.images import decode_image
from nvlm_train.data.index.shard_index import load_index
from nvlm_train.data.samples.records import read_messages
from nvlm_train.data.shards.store import DIRECT
from nvlm_train.errors import SampleError, ShardError

SAME_IMAGE = "image of evaluation"
SIMILAR_IMAGE = "near-duplicate image of evaluation"
SAME_TEXT = "text of evaluation"

COMMON = 10
"""A run of words that more training samples than this share is an instruction, no leak. Our rule."""

_PAIRS = 1 << 22


@dataclass(frozen=True)
class EvaluationPrints:
    """The hashes of all evaluation samples, each with its owner: an index into `labels`."""

    labels: tuple[str, ...]
    images: NDArray[np.uint64]
    """Hashes of the bytes, ascending."""
    image_owners: NDArray[np.int64]
    looks: NDArray[np.uint64]
    """Perceptual hashes, in the order of `images`."""
    grams: NDArray[np.uint64]
    """Hashes of runs of words, ascending and different."""
    gram_owners: NDArray[np.int64]


class LeakedImage(NamedTuple):
    """A training row that shows an image of evaluation."""

    row: int
    owner: int
    is_same_file: bool
    """Else it only looks like it."""


class LeakedGram(NamedTuple):
    """A training row that holds a run of words of evaluation."""

    row: int
    owner: int
    gram: int
    """The hash of the run of words."""


@dataclass(frozen=True, slots=True)
class Leaks:
    """The training rows of one shard that hold evaluation material."""

    images: list[LeakedImage]
    grams: list[LeakedGram]


def read_evaluation(paths: Sequence[str], max_image_pixels: int) -> EvaluationPrints:
    """Hashes evaluation sets: tars, or JSON Lines whose `image`, `images` lie beside the file.

    Raises:
        ShardError, SampleError: a file or image that is missing or damaged.
    """
    prints, labels = ShardPrints(), list[str]()
    for path in paths:
        if path.endswith(".tar"):
            _read_tar(path, max_image_pixels, prints, labels)
        else:
            _read_lines(path, max_image_pixels, prints, labels)
    content = np.array([image.content for image in prints.images], dtype=np.uint64)
    order = np.argsort(content, kind="stable")
    empty = np.empty(0, dtype=np.uint64)
    grams = np.concatenate([empty, *(text.grams for text in prints.texts)])
    owners = np.repeat(
        np.array([text.row for text in prints.texts], dtype=np.int64),
        [len(text.grams) for text in prints.texts],
    )
    different, first = np.unique(grams, return_index=True)
    return EvaluationPrints(
        labels=tuple(labels),
        images=content[order],
        image_owners=np.array([image.row for image in prints.images], dtype=np.int64)[order],
        looks=np.array([image.looks for image in prints.images], dtype=np.uint64)[order],
        grams=different,
        gram_owners=owners[first],
    )


def find_leaks(prints: ShardPrints, evaluation: EvaluationPrints, distance: int) -> Leaks:
    """Finds what a shard holds of the evaluation sets."""
    images: list[LeakedImage] = []
    chunk = max(1, _PAIRS // max(1, len(evaluation.looks)))
    for start in range(0, len(prints.images) if len(evaluation.images) else 0, chunk):
        part = prints.images[start : start + chunk]
        looks = np.array([image.looks for image in part], dtype=np.uint64)
        bits = differing_bits(looks[:, None], evaluation.looks[None, :])
        for image, own_bits in zip(part, bits, strict=True):
            place = int(np.searchsorted(evaluation.images, np.uint64(image.content)))
            nearest = int(own_bits.argmin())
            if place < len(evaluation.images) and int(evaluation.images[place]) == image.content:
                images.append(LeakedImage(image.row, int(evaluation.image_owners[place]), True))
            elif own_bits[nearest] <= distance:
                owner = int(evaluation.image_owners[nearest])
                images.append(LeakedImage(image.row, owner, False))
    grams: list[LeakedGram] = []
    for text in prints.texts:
        _, own, known = np.intersect1d(
            text.grams, evaluation.grams, assume_unique=True, return_indices=True
        )
        grams += [
            LeakedGram(text.row, int(evaluation.gram_owners[k]), int(text.grams[o]))
            for o, k in zip(own, known, strict=True)
        ]
    return Leaks(images, grams)


class LeakTables:
    """Keeps the leaks of all shards on disk until it is known which runs of words are common."""

    def __init__(self, directory: Path, labels: Sequence[str]) -> None:
        self._labels = labels
        self._images = SpilledTable(directory, "leaked-images")
        self._grams = SpilledTable(directory, "leaked-grams")
        self._texts = SpilledTable(directory, "leaked-texts")

    def add(self, leaks: Leaks, shard: int) -> None:
        """Adds the leaks of one shard."""
        where = places([image.row for image in leaks.images], shard)
        owners = np.array([image.owner for image in leaks.images], dtype=np.uint64)
        is_same = np.array([image.is_same_file for image in leaks.images], dtype=np.uint64)
        self._images.add(where.astype(np.uint64), where, value=owners, other=is_same)
        where = places([gram.row for gram in leaks.grams], shard)
        owners = np.array([gram.owner for gram in leaks.grams], dtype=np.uint64)
        grams = np.array([gram.gram for gram in leaks.grams], dtype=np.uint64)
        self._grams.add(grams, where, value=owners)

    def report(self, findings: Findings, describe: Describe) -> None:
        """Adds what was found to the findings."""
        for rows in self._images.buckets():
            is_same = rows["other"] == 1
            self._count(findings, SAME_IMAGE, rows[is_same], describe)
            self._count(findings, SIMILAR_IMAGE, rows[~is_same], describe)
        for rows in self._grams.buckets():
            _, owners, counts = np.unique(rows["key"], return_inverse=True, return_counts=True)
            rare = rows[counts[owners] <= COMMON]
            self._texts.add(rare["place"].astype(np.uint64), rare["place"], value=rare["value"])
        for rows in self._texts.buckets():
            self._count(findings, SAME_TEXT, rows, describe)

    def _count(
        self, findings: Findings, kind: str, rows: NDArray[np.void], describe: Describe
    ) -> None:
        """Counts each sample of a bucket once."""
        _, first = np.unique(rows["place"], return_index=True)
        examples = [
            Example(*describe(int(row["place"])), f"also in {self._labels[int(row['value'])]}")
            for row in rows[first[:MAX_EXAMPLES]]
        ]
        findings.add(kind, len(first), examples)


def _read_tar(path: str, max_image_pixels: int, prints: ShardPrints, labels: list[str]) -> None:
    findings, found = ShardChecker(None, max_image_pixels).check(ShardJob(0, path, path))
    for name in findings.kinds:
        example = findings.kinds[name].examples[0]
        if not example.key:
            raise ShardError(f"evaluation shard={path}: {name}: {example.reason}")
    offset = len(labels)
    index = load_index(DIRECT.open(path))
    labels += [f"{key} in {path}" for key in index.keys.tolist()]
    prints.images += [image._replace(row=image.row + offset) for image in found.images]
    prints.texts += [text._replace(row=text.row + offset) for text in found.texts]


def _read_lines(path: str, max_image_pixels: int, prints: ShardPrints, labels: list[str]) -> None:
    for number, record in _records(path):
        where = f"line {number} of {path}"
        owner = len(labels)
        labels.append(where)
        named = record.get("image", record.get("images")) or []
        files = [named] if isinstance(named, str) else list(named)
        try:
            for file in files:
                data = (Path(path).parent / str(file)).read_bytes()
                looks = perceptual_hash(decode_image(data, max_image_pixels))
                prints.images.append(ImagePrint(hash_parts(data), looks, owner))
            text = json.dumps(record).encode()
            messages = read_messages(text, where, len(files), "sft")
        except (OSError, ValueError) as error:
            raise SampleError(path, f"line {number}", str(error)) from error
        prints.texts.append(TextPrint(text_grams(sample_texts(text, messages)), owner))


def _records(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _object(json.loads(line))
    except (OSError, ValueError) as error:
        raise ShardError(
            f"evaluation={path} cannot be read: {error}; give tars, or JSON Lines of records"
        ) from error


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a line holds a {type(value).__name__}, not an object")
    return value


def expand(patterns: Iterable[str]) -> list[str]:
    """Returns the paths of brace patterns. Raises ValueError: unbalanced braces."""
    from nvlm_train.data.shards.tar import expand_pattern

    return [path for pattern in patterns for path in expand_pattern(pattern)]
