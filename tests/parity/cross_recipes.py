"""X and H for parity tests: made-up conversations through the real encoder, cut into real packs.

A sample is (words of text, image sizes in pixels): several images, one-tile images and none.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import cache

import torch

from nvlm_train.batch import Microbatch, RankShare, SampleInfo, StepBatch
from nvlm_train.config.model_schema import (
    CrossAttentionConfig,
    ModelConfig,
    ProjectorConfig,
    ResamplerConfig,
    TokenizerConfig,
)
from nvlm_train.config.schema import TilingConfig
from nvlm_train.data.loading.collate import pack_samples
from nvlm_train.data.samples.encoded import EncodedSample
from nvlm_train.data.samples.encoder import EncodingSpec, SampleEncoder
from nvlm_train.geometry import context_tokens_per_tile, tokens_per_tile
from nvlm_train.routes import ROUTES
from nvlm_train.tokens import Tokenizer
from tests.demo.test_assets import ASSETS
from tests.parity import recipes

SEQUENCE_LENGTH = 384
TOKENIZER = TokenizerConfig(path=str(ASSETS / "language_model"))
LANGUAGE = replace(recipes.LANGUAGE, vocab_size=640)
CROSS = CrossAttentionConfig(every=2)
MODELS: dict[str, ModelConfig] = {
    "x": ModelConfig("x", recipes.VISION, ProjectorConfig(None), LANGUAGE, TOKENIZER, CROSS),
    "h": ModelConfig("h", recipes.VISION, ProjectorConfig(96), LANGUAGE, TOKENIZER, CROSS),
    "x with feed-forward": ModelConfig(
        "x", recipes.VISION, ProjectorConfig(None), LANGUAGE, TOKENIZER,
        CrossAttentionConfig(every=2, feed_forward="gated"),
    ),
    "flamingo": ModelConfig(
        "x", recipes.VISION, ProjectorConfig(None), LANGUAGE, TOKENIZER, CROSS,
        ResamplerConfig(num_latents=3),
    ),
}  # fmt: skip

PLAIN: dict[str, ModelConfig] = {
    f"d beside {name}": replace(model, architecture="d", cross_attention=None, resampler=None)
    for name, model in MODELS.items()
}
"""What X and H are when nothing crosses."""

LARGE_HEADS: dict[str, ModelConfig] = {
    f"{name} with large heads": replace(
        MODELS[name], language=replace(LANGUAGE, head_dim=24, qk_norm=True, qkv_bias=False)
    )
    for name in ("x", "h", "flamingo")
}
"""Heads whose channels do not add up to the hidden size, as Qwen3 has them."""

HEADS_OF_64: dict[str, ModelConfig] = {
    f"{name} with heads of 64": replace(model, language=replace(LANGUAGE, head_dim=64))
    for name, model in (("d", PLAIN["d beside h"]), ("x", MODELS["x"]), ("h", MODELS["h"]))
}
"""Heads that the attention kernels of GPUs are made for."""
ALL = MODELS | PLAIN | LARGE_HEADS | HEADS_OF_64

WIDE, TALL, SMALL = (96, 64), (32, 96), (32, 32)
"""Seven tiles, four, and one."""
Sample = tuple[int, list[tuple[int, int]]]
MIXED: list[list[Sample]] = [
    [(8, [WIDE]), (5, [SMALL]), (9, [])],  # seven tiles, one tile, text only, in one pack
    [(12, [TALL, SMALL])],  # two images in one sample
    [(12, []), (9, [])],  # a text-only pack between packs with images
    [(6, [SMALL, TALL]), (10, [TALL])],
]
TEXT_ONLY: list[list[Sample]] = [[(9, []), (12, [])], [(20, [])], [(14, [])], [(9, [])]]


@cache
def encoder(name: str) -> SampleEncoder:
    """Returns the encoder of a model, with 1-D tags and up to six tiles."""
    model = ALL[name]
    spec = EncodingSpec(
        tile_size=recipes.VISION.tile_size,
        tokens_per_tile=tokens_per_tile(recipes.VISION),
        context_tokens_per_tile=context_tokens_per_tile(model),
        routes=ROUTES[model.architecture],
        tiling=TilingConfig(),
        sequence_length=SEQUENCE_LENGTH,
        prompts="sft",
        system_message=None,
        max_image_pixels=10**6,
    )
    return SampleEncoder(Tokenizer(TOKENIZER), spec)


def record(sample: Sample, seed: int) -> dict[str, object]:
    """Makes a record with a question around each image and a longer answer at the end."""
    num_words, sizes = sample
    words = random.Random(seed).choices(
        ["red", "seven", "Paris", "below", "tree", "9"], k=num_words
    )
    question = "look " + " then <image> and".join(["", *[" this" for _ in sizes]]) + " what?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": " ".join(words)}]
    return {"conversations": turns}


def encode(name: str, sample: Sample, seed: int) -> EncodedSample:
    """Returns `record` as the stage's encoder reads it."""
    raw = json.dumps(record(sample, seed)).encode()
    return encoder(name).encode(str(seed), raw, sample[1])


def pack(name: str, samples: list[Sample], seed: int) -> tuple[Microbatch, torch.Tensor]:
    """Returns a pack, and the pixels of its tiles."""
    encoded = [encode(name, sample, 10 * seed + n) for n, sample in enumerate(samples)]
    infos = [SampleInfo(n % 2, "made-up", str(n)) for n in range(len(samples))]
    microbatch = pack_samples(encoded, infos, SEQUENCE_LENGTH, pad_id=0)
    edge, generator = recipes.VISION.tile_size, torch.Generator().manual_seed(seed)
    shape = (microbatch.num_tiles, 3, edge, edge)
    return microbatch, torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def step_batch(
    name: str, packs: list[list[Sample]], share: RankShare, step: int, rounds: int
) -> StepBatch:
    """Returns this rank's view of a step made of the given packs, cut into rounds."""
    made = [pack(name, samples, 100 * step + n) for n, samples in enumerate(packs)]
    return recipes.deal(made, share, step, rounds)
