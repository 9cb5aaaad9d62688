"""A thousand damaged inputs through index, lengths, plan and loader: no crash, no hang, none uncounted."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from nvlm_train.batch import RankShare
from nvlm_train.config.schema import BatchConfig, LoaderConfig
from nvlm_train.data.loading.loader import Loader
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.sources import open_sources
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.store import Store
from nvlm_train.data.shards.tar import write_shards
from nvlm_train.errors import ShardError, TrainingError
from nvlm_train.train.step import SkipBudget
from tests.data.conftest import LENGTH, chat, draw_image, encoded, mixed_samples

NUM_IMAGES, NUM_RECORDS, NUM_TARS = 600, 200, 200
NUM_GOOD = 40
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
MakeEncoder = Callable[..., SampleEncoder]
Member = tuple[str, bytes]


def damage(data: bytes, draw: random.Random) -> bytes:
    """Bytes overwritten, a piece cut out, doubled, or zeroed, or the end missing."""
    found = bytearray(data)
    kind = draw.choice(("bytes", "bytes", "cut", "double", "zero", "end"))
    start = draw.randrange(len(found))
    stop = min(len(found), start + draw.randrange(1, 64))
    if kind == "bytes":
        for _ in range(draw.randrange(1, 12)):
            # Half of them in the first bytes, where the headers are.
            where = draw.choice((draw.randrange(min(64, len(found))), draw.randrange(len(found))))
            found[where] = draw.randrange(256)
    elif kind == "cut":
        del found[start:stop]
    elif kind == "double":
        found[start:start] = found[start:stop]
    elif kind == "zero":
        found[start:stop] = bytes(stop - start)
    else:
        del found[start:]
    return bytes(found)


def damaged_shards(root: Path, draw: random.Random) -> list[str]:
    """Shards of good samples among damaged images and records. Returns the damaged keys."""
    samples: list[tuple[str, Any, list[Member]]] = mixed_samples(NUM_GOOD, "good")
    for number in range(NUM_IMAGES):
        suffix = draw.choice(sorted(FORMATS))
        intact = encoded(draw_image(60 + number % 50, 40, number), FORMATS[suffix])
        samples.append(
            (f"image{number:04d}", chat("<image>", "a"), [(suffix, damage(intact, draw))])
        )
    for number in range(NUM_RECORDS):
        samples.append((f"record{number:04d}", chat("what?", f"answer {number}"), []))
    draw.shuffle(samples)
    for shard in write_shards(samples, str(root / "d-%06d.tar"), 120):
        _damage_records(Path(shard.path), draw)
    return [key for key, _, _ in samples if not key.startswith("good")]


def _damage_records(path: Path, draw: random.Random) -> None:
    """Overwrites bytes inside the members `record*.json`; the tar itself stays intact."""
    data = bytearray(path.read_bytes())
    at = data.find(b"record")
    while at >= 0:
        size = int(data[at + 124 : at + 135], 8)
        body = at + 512
        mutated = damage(bytes(data[body : body + size]), draw)[:size].ljust(size)
        data[body : body + size] = mutated
        at = data.find(b"record", body + size)
    path.write_bytes(data)


def make_plan(root: Path, encoder: SampleEncoder, tolerance: float) -> DataPlan:
    shards = tuple(sorted(path.name for path in root.glob("d-*.tar")))
    blend = Blend("b", (SourceConfig("s", shards),))
    sources = open_sources(blend, Store(str(root)), encoder)
    return DataPlan(sources, BatchConfig(size=32), LENGTH, 3, tolerance)


def run(plan: DataPlan, encoder: SampleEncoder, tolerance: float) -> tuple[list[str], Counter[str]]:
    """An epoch, to the end of its last step. Returns the keys drawn, and how often each failed."""
    (source,) = plan.sources
    usable = source.num_samples - source.num_unusable
    budget, drawn, failed = SkipBudget(tolerance), list[str](), Counter[str]()
    config = LoaderConfig(workers=2, max_image_pixels=10**6)
    with Loader(plan, encoder, RankShare(), config, 64, count()) as loader:
        for batch in loader:
            packs = [part.microbatches for part in batch.rounds]
            keys = [sample.key for part in packs for pack in part for sample in pack.samples]
            for failure in batch.failures:
                sample = packs[failure.round][failure.microbatch].samples[failure.sample]
                assert sample.shard.startswith("d-") and failure.reason.startswith("image ")
                failed[sample.key] += 1
            budget.add(len(batch.failures), len(keys))
            drawn += keys
            if len(drawn) >= usable:
                break
    return drawn, failed


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("damaged")
    return root, damaged_shards(root, random.Random(20240917))


def test_damaged_samples_are_counted_with_key_and_reason(
    damaged: tuple[Path, list[str]], make_encoder: MakeEncoder
) -> None:
    root, bad = damaged
    encoder = make_encoder()
    plan = make_plan(root, encoder, 1.0)
    (source,) = plan.sources
    refused = {
        reader.key(row): reason
        for reader, lengths in zip(source.readers, source.lengths, strict=True)
        for row, reason in lengths.reasons.items()
    }
    drawn, failed = run(plan, encoder, 1.0)
    # Every sample is accounted for: refused by the index, failed while decoding, or trained on.
    everything = {f"good{number:04d}" for number in range(NUM_GOOD)} | set(bad)
    assert set(refused) | set(drawn) == everything and not set(refused) & set(drawn)
    assert set(failed) <= set(drawn)
    # A damaged sample may be readable still (a changed pixel, another letter); a good one must be.
    assert not any(key.startswith("good") for key in {*refused, *failed})
    assert len(refused) > 200 and len(failed) > 50
    assert all(": " in reason for reason in refused.values())
    assert sum(kind.count for kind in plan.unusable) == len(refused)


def test_the_run_stops_with_one_message_at_the_recipes_tolerance(
    damaged: tuple[Path, list[str]], make_encoder: MakeEncoder
) -> None:
    root, _ = damaged
    encoder = make_encoder()
    with pytest.raises(
        TrainingError, match=r"of the samples drawn cannot be used, more than loader.max_skipped"
    ):
        make_plan(root, encoder, 0.05)
    plan = make_plan(root, encoder, 1.0)
    with pytest.raises(
        TrainingError,
        match=r"samples could not be decoded, loader.max_skipped_fraction=0.05 allows \d+; the warn",
    ):
        run(plan, encoder, 0.05)


def test_damaged_tar_headers_name_the_shard(tmp_path: Path, make_encoder: MakeEncoder) -> None:
    draw = random.Random(7)
    write_shards(mixed_samples(4, "k"), str(tmp_path / "s-%06d.tar"))
    intact = (tmp_path / "s-000000.tar").read_bytes()
    headers = [at for at in range(0, len(intact), 512) if intact[at + 257 : at + 262] == b"ustar"]
    encoder, outcomes = make_encoder(), Counter[str]()
    for number in range(NUM_TARS):
        data = bytearray(intact)
        at = draw.choice(headers)
        for _ in range(draw.randrange(1, 8)):
            data[at + draw.randrange(512)] = draw.randrange(256)
        if number % 2:  # with a valid checksum the damaged fields are believed
            header = bytes(data[at : at + 148]) + b" " * 8 + bytes(data[at + 156 : at + 512])
            data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
        root = tmp_path / str(number)
        root.mkdir()
        (root / "d-000000.tar").write_bytes(data)
        try:
            drawn, failed = run(make_plan(root, encoder, 1.0), encoder, 1.0)
        except (ShardError, TrainingError) as error:
            assert str(root / "d-000000.tar") in str(error) or "source=s" in str(error), error
            outcomes[type(error).__name__] += 1
        else:
            outcomes["read"] += 1
            assert drawn and len(failed) <= len(drawn)
    assert outcomes["ShardError"] > 100 and sum(outcomes.values()) == NUM_TARS


def test_hostile_records_have_reasons(tmp_path: Path, make_encoder: MakeEncoder) -> None:
    deep = "[" * 100_000
    hostile = ["", "null", "{}", deep, '{"conversations": {}}', '{"text": "\\ud800"}', "NaN", "\0"]
    write_shards(
        [(f"k{n}", chat("q", "x" * 200_000), []) for n in range(len(hostile))],
        str(tmp_path / "d-%06d.tar"),
    )
    path = tmp_path / "d-000000.tar"
    data, at = bytearray(path.read_bytes()), 0
    size = len(json.dumps(chat("q", "x" * 200_000)))
    for text in hostile:
        at = data.index(b'{"conversations"', at)
        data[at : at + size] = text.encode().ljust(size)
        at += size
    path.write_bytes(data)
    encoder = make_encoder()
    with pytest.raises(TrainingError, match="source=s"):
        make_plan(tmp_path, encoder, 1.0)
