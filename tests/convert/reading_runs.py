"""Runs on the workers: what a rank asks of the files, and how much memory that takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.config.schema import ParallelConfig, Recipe
from nvlm_train.convert.weight_files import WeightFiles
from nvlm_train.model import global_weights
from nvlm_train.model.build import build_model
from nvlm_train.model.nvlm import NVLM
from nvlm_train.parallel import kernels
from nvlm_train.parallel.topology import build_topology, device
from nvlm_train.train.start import initial_weights
from nvlm_train.vision.build import build_vision_encoder
from tests.parity import recipes

Asked = list[tuple[str, tuple[slice, ...]]]
"""Names of stored tensors, and the slices of them that safetensors was asked for."""


def what_is_asked(parallel: ParallelConfig, weights: Path, **fields: Any) -> tuple[Asked, int]:
    """Every slice that this rank asks for, and the bytes as they are counted."""
    recipe = _recipe(parallel, replace(recipes.LANGUAGE, weights=str(weights), **fields))
    model = _model(recipe)
    with recorded() as (asked, files):
        initial_weights(recipe, model)
    (opened,) = files
    return asked, opened.bytes_asked


@contextmanager
def recorded() -> Iterator[tuple[Asked, list[WeightFiles]]]:
    """Notes what safetensors is asked for."""
    import safetensors

    asked: Asked = []
    files: list[WeightFiles] = []
    opened, start = safetensors.safe_open, WeightFiles.__init__

    class Noted:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.handle = opened(*args, **options)

        def __enter__(self) -> Noted:
            self.handle.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.handle.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.handle, name)

        def get_slice(self, name: str) -> Any:
            return NotedSlice(name, self.handle.get_slice(name))

    class NotedSlice:
        def __init__(self, name: str, part: Any) -> None:
            self.name, self.part = name, part

        def __getattr__(self, name: str) -> Any:
            return getattr(self.part, name)

        def __getitem__(self, index: Any) -> Any:
            asked.append((self.name, index))
            return self.part[index]

    def noted(self: WeightFiles, *args: Any) -> None:
        files.append(self)
        start(self, *args)

    with (
        mock.patch.object(safetensors, "safe_open", Noted),
        mock.patch.object(WeightFiles, "__init__", noted),
    ):
        yield asked, files


@dataclass(frozen=True)
class Memory:
    """What a fresh process took, in bytes."""

    own: int
    """Of the weights that it holds at the end."""
    peak: int
    """Over what it had before."""
    asked: int
    """Of the files."""
    replicated: int
    """Of `own`, what every tensor-parallel rank has alike."""
    sample: dict[str, tuple[global_weights.GlobalSlice, torch.Tensor]]
    """The first numbers of every weight."""


def memory_of(parallel: ParallelConfig, language: LanguageConfig) -> Memory:
    """Builds the model and reads its weights, in a process that has done nothing else."""
    recipe = _recipe(parallel, language)
    topology = build_topology(parallel, recipe.seed)
    before = resident()
    model = build_model(recipe, recipe.stages["sft"], topology, kernels.detect())
    with recorded() as (_, files):
        initial_weights(recipe, model)
    peak = peak_resident() - before
    shards = [
        shard
        for shard in global_weights.shards(model, lambda parameter: parameter.data)
        if shard.key.startswith("language_model.")
    ]
    alike = [each for each in shards if each.local_shape == each.global_shape]
    sample = {
        f"{shard.key} {shard.global_offset}": (
            global_weights.slice_of(shard),
            shard.data.flatten()[:64].clone(),
        )
        for shard in shards
    }
    return Memory(
        own=sum(shard.data.nbytes for shard in shards),
        peak=peak,
        asked=sum(each.bytes_asked for each in files),
        replicated=sum(shard.data.nbytes for shard in alike),
        sample=sample,
    )


def memory_of_encoder(weights: Path, config: Any) -> tuple[int, int]:
    """The encoder's bytes in bf16, and what reading it took over what there was before."""
    vision = replace(config, weights=str(weights))
    before = resident()
    encoder = build_vision_encoder(vision, torch.bfloat16, device(), 1)
    return sum(each.nbytes for _, each in encoder.named_parameters()), peak_resident() - before


def resident() -> int:
    """What this process has in memory, with the pages of files that it has mapped."""
    return _status("VmRSS")


def peak_resident() -> int:
    """The most that this process ever had in memory."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def _recipe(parallel: ParallelConfig, language: LanguageConfig) -> Recipe:
    precision = "bf16" if language.hidden_size > 1000 else "fp32"
    recipe = recipes.recipe(parallel, precision=precision)
    return replace(recipe, model=replace(recipe.model, language=language))


def _model(recipe: Recipe) -> NVLM:
    stage = recipe.stages["sft"]
    return build_model(recipe, stage, build_topology(stage.parallel, recipe.seed), kernels.detect())
