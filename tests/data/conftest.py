"""Fixtures: a tiny byte-level tokenizer, images made on the spot, and shards of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nvlm_train.config.model_schema import TokenizerConfig
from nvlm_train.config.schema import BatchConfig, TilingConfig
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.sources import open_sources
from nvlm_train.data.samples.encoder import EncodingSpec, SampleEncoder
from nvlm_train.data.shards.store import Store
from nvlm_train.data.shards.tar import Sample, write_shards
from nvlm_train.routes import ROUTES
from nvlm_train.tokens import Tokenizer

TILE = 32
SLOTS = 4
LENGTH = 128


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level BPE with a few merges, the ChatML specials, and Qwen-like splitting."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator(
        ["<Image><tile_1> </Image> user assistant system question answer cat dog"] * 20, trainer
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    fast.save(str(path))
    return Tokenizer(TokenizerConfig(path=str(path)))


@pytest.fixture(scope="session")
def make_encoder(tokenizer: Tokenizer) -> Callable[..., SampleEncoder]:
    """An encoder with small tiles; keywords replace fields of its EncodingSpec."""

    def make(**changes: Any) -> SampleEncoder:
        fields: dict[str, Any] = {
            "tile_size": TILE,
            "routes": ROUTES["d"],
            "tokens_per_tile": SLOTS,
            "context_tokens_per_tile": SLOTS,
            "tiling": TilingConfig(),
            "sequence_length": LENGTH,
            "prompts": "sft",
            "system_message": None,
            "max_image_pixels": 1_000_000,
        }
        return SampleEncoder(tokenizer, EncodingSpec(**(fields | changes)))

    return make


def draw_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colourful image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Pillow's bicubic filter to (width, height), across before down, as one call of Pillow 10 to 12.

    Pillow 13 makes the pass down first where that is cheaper, and rounds in between.
    """
    across = image.resize((size[0], image.height), Image.Resampling.BICUBIC)
    return across.resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    """The image as a file of this format."""
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def chat(question: str, answer: str) -> dict[str, Any]:
    """A LLaVA-style record of one exchange."""
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    }


def mixed_samples(count: int, prefix: str, seed: int = 0) -> list[Sample]:
    """Text-only, one-tile, many-tile and two-image samples in turn."""
    samples: list[Sample] = []
    for number in range(count):
        key = f"{prefix}{number:04d}"
        question, answer = "what? " * (1 + number % 5), f"a{number} " * (1 + number % 3)
        images: list[tuple[str, bytes]] = []
        if number % 4 == 1:
            images = [("jpg", encoded(draw_image(20, 20, seed + number), "JPEG"))]
        elif number % 4 == 2:
            images = [("png", encoded(draw_image(96, 40, seed + number), "PNG"))]
        elif number % 4 == 3:
            images = [
                (f"{i}.jpg", encoded(draw_image(64 + 40 * i, 33, seed + number + i), "JPEG"))
                for i in range(2)
            ]
        samples.append((key, chat(question, answer), images))
    return samples


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources of the mixed samples: `a` with 5 shards of 12 samples, `b` with 2 of 9."""
    root = tmp_path_factory.mktemp("data")
    write_shards(mixed_samples(57, "a"), str(root / "a-%06d.tar"), 12)
    write_shards(mixed_samples(18, "b", seed=1000), str(root / "b-%06d.tar"), 9)
    return root


BLEND = Blend(
    "mix",
    (
        SourceConfig("a", tuple(f"a-{n:06d}.tar" for n in range(5)), 0.7),
        SourceConfig("b", ("b-000000.tar", "b-000001.tar"), 0.3),
    ),
)


@pytest.fixture(scope="session")
def make_plan(
    data_root: Path, make_encoder: Callable[..., SampleEncoder]
) -> Callable[..., DataPlan]:
    """A plan over the two sources."""

    def make(batch: BatchConfig, seed: int = 7) -> DataPlan:
        encoder = make_encoder()
        return DataPlan(
            open_sources(BLEND, Store(str(data_root)), encoder), batch, LENGTH, seed, 0.0
        )

    return make
