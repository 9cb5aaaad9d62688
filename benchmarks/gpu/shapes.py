"""Sizes of the GPU benchmarks: Qwen2.5 with untied tables, InternViT, and toys of both for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from nvlm_train.config.model_schema import (
    Architecture,
    CrossAttentionConfig,
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    TokenizerConfig,
    VisionConfig,
)
from nvlm_train.config.schema import (
    BatchConfig,
    OptimizerConfig,
    Recipe,
    StageConfig,
    TrainablePart,
)

SFT: tuple[TrainablePart, ...] = ("projector", "cross_attention", "language_model")
PRETRAIN: tuple[TrainablePart, ...] = ("projector", "cross_attention")

LANGUAGES = {
    "1.5b": LanguageConfig(28, 1536, 12, 2, 8960, 151_936),
    "3b": LanguageConfig(36, 2048, 16, 2, 11_008, 151_936),
    "toy": LanguageConfig(4, 64, 4, 2, 128, 1024),
}
"""Shapes of Qwen2.5; with untied tables the first has 1.78 B parameters."""

ENCODERS = {
    "300m": VisionConfig(24, 1024, 16, 4096, 448, 14, batch_tiles=16),
    "6b": VisionConfig(45, 3200, 25, 12_800, 448, 14, batch_tiles=16),
    "toy": VisionConfig(2, 64, 4, 128, 56, 14, batch_tiles=4),
}
"""InternViT-300M, InternViT-6B (the paper's), with 16 tiles a batch as the demo's recipe has."""

CROSS_LAYERS = {"1.5b": 7, "3b": 9, "toy": 2}
"""Every so many layers: four of them cross-attend, as 1 in 8 and 1 in 6 do in the paper's larger models."""


@dataclass(frozen=True)
class Sizes:
    """What a row trains: names of the tables above, the pack, and how many samples a step has."""

    language: str
    encoder: str
    pack_length: int
    samples: int

    @property
    def vision(self) -> VisionConfig:
        return ENCODERS[self.encoder]


LARGE = Sizes("1.5b", "300m", pack_length=8192, samples=37)
TOY = Sizes("toy", "toy", pack_length=256, samples=4)


def make_recipe(
    architecture: Architecture, sizes: Sizes, trainable: tuple[TrainablePart, ...] = SFT
) -> Recipe:
    """One stage named `sft` in bf16, whose packs are `sizes.pack_length` long."""
    language = LANGUAGES[sizes.language]
    model = ModelConfig(
        architecture,
        sizes.vision,
        ProjectorConfig(None if architecture == "x" else language.ffn_hidden_size),
        language,
        TokenizerConfig(path=str(files("nvlm_train.demo") / "assets" / "language_model")),
        None if architecture == "d" else CrossAttentionConfig(every=CROSS_LAYERS[sizes.language]),
    )
    stage = StageConfig(
        trainable=trainable,
        blend="made up",
        steps=1,
        sequence_length=sizes.pack_length,
        batch=BatchConfig(size=sizes.samples),
        optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-4, warmup_steps=0, clip_grad=1.0),
    )
    return Recipe(
        name=architecture, run_dir="unused", seed=0, precision="bf16", schedule=("sft",),
        stages={"sft": stage}, model=model,
    )  # fmt: skip
