"""Runs on a worker: what of a model in bf16 is not a weight, and in which precision it is kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nvlm_train.config.schema import ParallelConfig
from tests.parity import cross_gradients, gradients

CASTS = {"none": lambda module: module, "bfloat16": nn.Module.bfloat16, "half": nn.Module.half}


def constants(name: str, precision: str, cast: str) -> tuple[dict[str, Tensor], set[torch.dtype]]:
    """Floating-point buffers and tensors that modules of model and encoder hold; dtypes of their weights."""
    start = gradients.start_engine if name == "d" else cross_gradients.start_engine
    engine = start(*([] if name == "d" else [name]), ParallelConfig(), precision=precision)
    found: dict[str, Tensor] = {}
    dtypes: set[torch.dtype] = set()
    for root, module in (("model", engine.model.module), ("encoder", engine.encoder)):
        CASTS[cast](module)
        dtypes |= {parameter.dtype for parameter in module.parameters()}
        for path, part in module.named_modules():
            held = {**vars(part), **dict(part.named_buffers(recurse=False))}
            for key, value in held.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    found[f"{root}.{path}.{key}"] = value.clone()
    return found, dtypes


def angles(precision: str, cast: str) -> Tensor:
    """Of the rotary embedding, [positions, channels]."""
    engine = gradients.start_engine(ParallelConfig(), precision=precision)
    rotary = CASTS[cast](engine.model.module).language_model.rotary
    table: Tensor = rotary(100_000, packed_seq=True)
    return table[:, 0, 0]
