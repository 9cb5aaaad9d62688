"""Runs on a worker: what a trained X or H makes of text without images, beside the backbone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from nvlm_train.batch import Microbatch, SampleInfo
from nvlm_train.config.schema import Recipe
from nvlm_train.data.dataset import build_encoder
from nvlm_train.data.loading.collate import pack_samples
from nvlm_train.geometry import tokens_per_tile
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import build_topology
from nvlm_train.train.engine import build_engine
from nvlm_train.train.start import initial_weights
from tests.model import cross_runs
from tests.train import runs
from tests.train.smoke import smoke_recipe


def trained_and_backbone(
    root: Path, run_dir: Path, *overrides: str
) -> tuple[Tensor, Tensor, float]:
    """Returns the run's and the backbone's logits of a text-only pack, and the smallest |alpha|."""
    trained = runs.open_checkpoint(root, run_dir, *overrides)
    gates = [
        float(parameter.abs())
        for name, parameter in trained.model.module.named_parameters()
        if name.endswith("alpha")
    ]
    recipe = smoke_recipe(root, run_dir)
    stage = recipe.stages["sft"]
    plain = build_engine(
        recipe, stage, build_topology(stage.parallel, recipe.seed), kernels.detect()
    )
    initial_weights(recipe, plain.model.module)
    pack = [text_pack(recipe)]
    vision = recipe.model.vision
    nothing = [torch.empty(0, tokens_per_tile(vision), 4 * vision.hidden_size)]
    (found,), (expected,) = (
        cross_runs.logits(engine, pack, nothing) for engine in (trained, plain)
    )
    return found, expected, min(gates)


def text_pack(recipe: Recipe) -> Microbatch:
    """Returns a pack of two conversations without images."""
    stage = recipe.stages["sft"]
    encoder = build_encoder(stage, recipe)
    turns = [{"from": "human", "value": "which tree is green?"}, {"from": "gpt", "value": "left"}]
    raw = json.dumps({"conversations": turns}).encode()
    encoded = [encoder.encode(name, raw, []) for name in "ab"]
    infos = [SampleInfo(0, "text", name) for name in "ab"]
    return pack_samples(encoded, infos, stage.sequence_length, pad_id=0)
