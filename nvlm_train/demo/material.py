"""Writes the demo's raw material to disk, and makes shards of it as `nvlm data prepare` does."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvlm_train.data.prepare.inputs.entries import InputSpec
from nvlm_train.data.prepare.preparation import prepare_input
from nvlm_train.data.prepare.staging import Target
from nvlm_train.demo.captions import (
    CAPTION_PROMPT,
    READ_PROMPT,
    read_captions,
    read_image_paths,
    read_questions,
)
from nvlm_train.demo.chats import draw_chat
from nvlm_train.demo.corpus import Split
from nvlm_train.demo.pages import render_page, render_strip

logger = logging.getLogger(__name__)

NUM_STRIPS, NUM_PAGES, NUM_CHATS = 3000, 2400, 6000
SAMPLES_PER_SHARD = 5000
JPEG_QUALITY = 90
_PAGES_PER_JOB = 100
ALL = ("captions", "strips", "vqa", "pages", "chats")
"""The sources that there are."""


@dataclass(frozen=True)
class _Job:
    """Names pages that one process renders."""

    kind: str
    split: Split
    start: int
    stop: int
    directory: Path


def prepare_material(directory: Path, names: Collection[str] = ALL) -> None:
    """Renders pages and writes the shards that the demo's data recipes name, unless they are there.

    Args:
        directory: where the shards are written.
        names: those of `ALL` that are wanted.
    """
    raw = directory / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, records, images in (
        ("captions", _captions(), "/"),
        ("strips", _readings("strip", NUM_STRIPS, raw), str(raw)),
        ("vqa", _questions(), "/"),
        ("pages", _readings("page", NUM_PAGES, raw), str(raw)),
        ("chats", _chats(), str(raw)),
    ):
        if name not in names or (directory / f"{name}.manifest.json").is_file():
            continue
        _write_jsonl(raw / f"{name}.jsonl", records)
        spec = InputSpec("jsonl", (str(raw / f"{name}.jsonl"),), images)
        target = Target(str(directory), name, SAMPLES_PER_SHARD)
        manifest = prepare_input(spec, target, num_workers=2)
        logger.info("%s: %d samples in %s", name, manifest.num_samples, manifest.pattern)


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    """Returns one question about one image, in the shards' form."""
    return [
        {"from": "human", "value": f"<image>\n{question}"},
        {"from": "gpt", "value": answer},
    ]


def _captions() -> Iterator[dict[str, Any]]:
    paths = read_image_paths("train")
    for image_id, caption in read_captions().items():
        yield {
            "image": str(paths[image_id]),
            "conversations": conversation(CAPTION_PROMPT, caption),
        }


def _questions() -> Iterator[dict[str, Any]]:
    paths = read_image_paths("train")
    for question in read_questions("train"):
        yield {
            "image": str(paths[question.image_id]),
            "conversations": conversation(question.text, question.answer),
        }


def _chats() -> Iterator[dict[str, Any]]:
    for index in range(NUM_CHATS):
        yield {"conversations": draw_chat(index, "train").conversations()}


def _readings(kind: str, count: int, raw: Path) -> Iterator[dict[str, Any]]:
    starts = range(0, count, _PAGES_PER_JOB)
    jobs = [_Job(kind, "train", start, min(start + _PAGES_PER_JOB, count), raw) for start in starts]
    with ProcessPoolExecutor(max_workers=2) as pool:
        for job, texts in zip(jobs, pool.map(_render, jobs), strict=True):
            for index, text in enumerate(texts, job.start):
                yield {
                    "image": f"{kind}-{index:05d}.jpg",
                    "conversations": conversation(READ_PROMPT, text),
                }


def _render(job: _Job) -> list[str]:
    draw = render_page if job.kind == "page" else render_strip
    texts = []
    for index in range(job.start, job.stop):
        page = draw(index, job.split)
        page.image.save(job.directory / f"{job.kind}-{index:05d}.jpg", quality=JPEG_QUALITY)
        texts.append(page.text)
    return texts


def _write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as lines:
        for record in records:
            lines.write(json.dumps(record) + "\n")
