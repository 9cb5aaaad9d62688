"""Runs on the workers: what the last layer computes, and for how many rows."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model.last_layer import SdpaOfWanted
from nvlm_train.model.layers import SdpaAttention
from nvlm_train.model.pack import Pack
from nvlm_train.pipeline.placing import place_packs, relayed_rows
from nvlm_train.pipeline.round import run_features
from nvlm_train.vision.tile_parallel import encode_tiles
from tests.parity import cross_gradients, cross_recipes

WANTED = (0, 5, 7)


def of_wanted_and_of_all(
    lengths: list[int], shares: list[float], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Wanted rows and their gradients of queries, keys and values: computed alone, and cut out of all."""
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    wanted = [
        int(start) + row
        for start, length, share in zip(bounds, lengths, shares, strict=False)
        for row in sorted(draw.sample(range(length), round(share * length)))
    ]
    pack = Pack(
        lengths=tuple(lengths),
        wanted=tuple(wanted),
        wanted_L=torch.tensor(wanted, dtype=torch.int64),
    )
    states = [
        torch.randn(sum(lengths), heads, 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    ]
    config = SimpleNamespace(attention_dropout=0.0)
    answers = []
    for kind in (SdpaOfWanted, SdpaAttention):
        leaves = [state.clone().requires_grad_() for state in states]
        attended = kind(config, 1, None, "self")(*leaves, None, packed_seq_params=pack)  # type: ignore[arg-type]
        if kind is SdpaAttention:
            attended = attended[wanted]
        attended.sin().sum().backward()
        answers.append([attended.detach(), *(leaf.grad for leaf in leaves)])
    return answers[0], answers[1]


def rows_of_layers(name: str, parallel: ParallelConfig) -> dict[int, tuple[int, int]]:
    """Layer number -> rows that its MLP and its QKV projection get, with three logits wanted."""
    engine = cross_gradients.start_engine(name, parallel)
    seen: dict[int, list[int]] = {}
    for layer in engine.model.module.language_model.decoder.layers:
        rows = seen.setdefault(layer.layer_number, [])
        for module in (layer.mlp, layer.self_attention.linear_qkv):
            module.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(len(args[0])))
    microbatch, pixels = cross_recipes.pack(name.rsplit(maxsplit=1)[-1], cross_recipes.MIXED[0], 0)
    features = encode_tiles(engine.encoder, pixels)
    if name.startswith("d "):
        assert microbatch.context is not None
        features = features[microbatch.context.decoder_tiles]
        microbatch = replace(microbatch, context=None)
    known = features if engine.topology.is_first_pp_stage else None
    lengths = run_features(
        engine.replica,
        place_packs([microbatch], [np.array(WANTED)]),
        [known],
        relayed_rows([microbatch], engine.topology),
        lambda pack, logits: (logits.sum(), len(logits)),
        forward_only=True,
    )
    assert lengths == ([len(WANTED)] if engine.topology.is_last_pp_stage else [])
    return {number: (mlp, qkv) for number, (qkv, mlp) in seen.items()}
