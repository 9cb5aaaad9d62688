"""Samples per second of NVLM-X and NVLM-H over NVLM-D at equal shapes, one process.

    OMP_NUM_THREADS=2 python -m benchmarks.architectures

One sample of 6 tiles and a thumbnail with about 500 text tokens, SFT (everything but the encoder
trains), vision encoder 2 x 128, language model 8 x 512 with cross-attention in every fourth layer:
the language model dominates, as at real sizes. The three take turns; ratios are of medians. The
paper's Table 3 has 1.76 (X) and 1.26 (H) for the 34B models on 128 H100.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib.resources import files

import torch

from nvlm_train.batch import Round, SampleInfo, StepBatch
from nvlm_train.config.model_schema import (
    Architecture,
    CrossAttentionConfig,
    LanguageConfig,
    ModelConfig,
    ProjectorConfig,
    TokenizerConfig,
    VisionConfig,
)
from nvlm_train.config.schema import BatchConfig, OptimizerConfig, Recipe, StageConfig
from nvlm_train.data.dataset import build_encoder
from nvlm_train.data.loading.collate import pack_samples
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import build_topology, start_process_group
from nvlm_train.train.engine import Engine, build_engine
from nvlm_train.train.placing import place
from nvlm_train.train.start import initial_weights
from nvlm_train.train.step import run_step

VISION = VisionConfig(
    num_layers=2, hidden_size=128, num_heads=4, ffn_hidden_size=512, tile_size=448, patch_size=14,
    batch_tiles=7,
)  # fmt: skip
LANGUAGE = LanguageConfig(
    num_layers=8, hidden_size=512, num_heads=8, num_kv_heads=2, ffn_hidden_size=1408,
    vocab_size=32_000, rope_theta=10_000.0,
)  # fmt: skip
EVERY, WORDS = 4, 240
IMAGE_SIZE = (3 * 448, 2 * 448)
PAPER = {"x": 1.76, "h": 1.26}


def make_recipe(architecture: Architecture, sequence_length: int) -> Recipe:
    """Makes a recipe of one architecture. Shapes are equal; only routes and what follows from them differ."""
    assets = str(files("nvlm_train.demo") / "assets" / "language_model")
    model = ModelConfig(
        architecture,
        VISION,
        ProjectorConfig(None if architecture == "x" else LANGUAGE.ffn_hidden_size),
        LANGUAGE,
        TokenizerConfig(path=assets),
        None if architecture == "d" else CrossAttentionConfig(every=EVERY),
    )
    stage = StageConfig(
        trainable=("projector", "cross_attention", "language_model"),
        blend="made up",
        steps=1,
        sequence_length=sequence_length,
        batch=BatchConfig(size=1),
        optimizer=OptimizerConfig(lr=1e-4, min_lr=1e-4, warmup_steps=0, clip_grad=1.0),
    )
    return Recipe(
        name=architecture, run_dir="unused", seed=0, precision="fp32", schedule=("sft",),
        stages={"sft": stage}, model=model,
    )  # fmt: skip


def prepare(architecture: Architecture) -> tuple[Engine, StepBatch, int]:
    """Returns engine, the step's batch, and the sample's decoder tokens: the pack is exactly that long."""
    record = {
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is written here?"},
            {"from": "gpt", "value": "a word " * WORDS},
        ]
    }
    raw = json.dumps(record).encode()
    generous = make_recipe(architecture, 4096)
    encoder = build_encoder(generous.stages["sft"], generous)
    encoded = encoder.encode("sample", raw, [IMAGE_SIZE])
    length = len(encoded.token_ids)
    recipe = make_recipe(architecture, length)
    stage = recipe.stages["sft"]
    topology = build_topology(stage.parallel, recipe.seed)
    engine = build_engine(recipe, stage, topology, kernels.detect())
    initial_weights(recipe, engine.model.module)
    engine.reload_optimizer_weights()
    microbatch = pack_samples([encoded], [SampleInfo(0, "made up", "0")], length, pad_id=0)
    edge = VISION.tile_size
    generator = torch.Generator().manual_seed(1)
    tiles = torch.randint(0, 256, (7, 3, edge, edge), dtype=torch.uint8, generator=generator)
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-4
    return engine, StepBatch(0, (Round((microbatch,), (7,), tiles),), ()), length


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    start_process_group()
    runs = {name: prepare(name) for name in ("d", "x", "h")}  # type: ignore[arg-type]
    for engine, batch, _ in runs.values():
        run_step(engine, place(batch, engine.topology), num_sources=1)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, (engine, batch, _) in runs.items():
            started = time.perf_counter()
            run_step(engine, place(batch, engine.topology), num_sources=1)
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result: dict[str, float] = {}
    for name, (_, _, length) in runs.items():
        result[f"{name}_samples_per_second"] = 1 / medians[name]
        result[f"{name}_decoder_tokens"] = length
    for name, paper in PAPER.items():
        result[f"{name}_over_d"] = medians["d"] / medians[name]
        result[f"{name}_over_d_paper"] = paper
    sys.stdout.write(json.dumps({key: round(value, 3) for key, value in result.items()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
