"""The plan of the GPU benchmarks: samples of mixed lengths, the same for every row, packed.

A sample is an image of 1 to 7 tiles (thumbnail included) with a question and an answer, whose lengths
are drawn from a fixed seed. Each goes through the project's own encoder, so that D, X and H get the
same samples in their own form, and the project's packer fills packs with them. Pixels are noise.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from benchmarks.gpu.shapes import Sizes, make_recipe
from nvlm_train.batch import Microbatch, Round, SampleInfo, StepBatch
from nvlm_train.config.model_schema import Architecture, VisionConfig
from nvlm_train.data.dataset import build_encoder
from nvlm_train.data.loading.collate import pack_samples
from nvlm_train.data.plan.packing import best_fit_decreasing
from nvlm_train.data.samples.encoded import EncodedSample

GRIDS = ((1, 1), (2, 1), (3, 1), (2, 2), (5, 1), (3, 2))
"""(columns, rows): 1, 3, 4, 5, 6 and 7 tiles with the thumbnail."""

SEED = 49
"""With it the packs of D, X and H are 97, 93 and 99 percent full, and few are needed."""


@dataclass(frozen=True)
class Planned:
    """One sample of the plan."""

    columns: int
    rows: int
    question_words: int
    answer_words: int


def make_plan(sizes: Sizes) -> list[Planned]:
    """The same for the same sizes: text is a quarter question, and up to 1/12 of a pack in words."""
    draw = random.Random(SEED)
    plan = []
    for _ in range(sizes.samples):
        columns, rows = draw.choice(GRIDS)
        words = draw.randint(sizes.pack_length // 100, sizes.pack_length // 12)
        plan.append(Planned(columns, rows, words // 4, words - words // 4))
    return plan


def digest(plan: Sequence[Planned]) -> str:
    """Of every number in it: results with other digests are not of the same work."""
    numbers = json.dumps([asdict(planned) for planned in plan])
    return hashlib.sha256(numbers.encode()).hexdigest()[:16]


def encode(
    architecture: Architecture, sizes: Sizes, plan: Sequence[Planned]
) -> list[EncodedSample]:
    """The plan's samples as an architecture reads them."""
    recipe = make_recipe(architecture, sizes)
    encoder = build_encoder(recipe.stages["sft"], recipe)
    edge = sizes.vision.tile_size
    return [
        encoder.encode(
            str(number), record_of(planned), [(planned.columns * edge, planned.rows * edge)]
        )
        for number, planned in enumerate(plan)
    ]


def record_of(planned: Planned) -> bytes:
    """A sample's record, as JSON."""
    return json.dumps({"conversations": turns_of(planned)}).encode()


def turns_of(planned: Planned) -> list[dict[str, str]]:
    """A question about an image, and its answer, of so many words as planned."""
    return [
        {"from": "human", "value": "<image>\n" + "word " * planned.question_words},
        {"from": "gpt", "value": "word " * planned.answer_words},
    ]


def without_images(sample: EncodedSample) -> EncodedSample:
    """A sample of D with words where its tiles stood: as long, with the same labels, and text only."""
    return replace(sample, image_positions=np.empty(0, dtype=np.int64), images=())


def pack(samples: Sequence[EncodedSample], length: int) -> tuple[Microbatch, ...]:
    """Packs of `length` tokens, filled by the project's packer."""
    groups = best_fit_decreasing([len(sample.token_ids) for sample in samples], length)
    return tuple(
        pack_samples(
            [samples[index] for index in group],
            [SampleInfo(0, "made up", str(index)) for index in group],
            length,
            pad_id=0,
        )
        for group in groups
    )


def step_batch(microbatches: tuple[Microbatch, ...], vision: VisionConfig) -> StepBatch:
    """One round of all packs, with the noise of its tiles."""
    tiles = sum(microbatch.num_tiles for microbatch in microbatches)
    return StepBatch(0, (Round(microbatches, (tiles,), noise(tiles, vision)),), ())


def noise(tiles: int, vision: VisionConfig) -> torch.Tensor:
    """uint8 [tiles, 3, E, E] from a fixed seed."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (tiles, 3, vision.tile_size, vision.tile_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def segment_lengths(microbatch: Microbatch) -> list[int]:
    """Tokens of each sample, and of the padding where there is any."""
    return [int(length) for length in microbatch.cu_seqlens.diff()]
