"""Runs on the workers: what a forward pass keeps for its backward pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.config.schema import ParallelConfig, Recompute
from nvlm_train.train.placing import place
from tests.parity import gradients, recipes

LANGUAGE = replace(
    recipes.LANGUAGE, hidden_size=256, num_heads=16, num_kv_heads=4, ffn_hidden_size=768
)
"""Wide enough for a layer's small numbers (angles, scales of norms) to be small."""


def numbers_of_a_layer(recompute: Recompute) -> float:
    """Counts the fp32 numbers for each token of a pack that one layer more adds to what is kept."""
    more, fewer = (
        _kept_bytes(replace(LANGUAGE, num_layers=number), recompute) for number in (6, 4)
    )
    return (more - fewer) / 2 / 4 / recipes.SEQUENCE_LENGTH


def _kept_bytes(language: LanguageConfig, recompute: Recompute) -> int:
    """Adds up the storages that autograd holds after a forward pass, without weights."""
    model = replace(recipes.MODEL, language=language)
    engine = gradients.start_engine(ParallelConfig(recompute=recompute), model=model)
    batch = recipes.step_batch([[(40, 2), (12, 0)]], engine.topology.share, 0)
    (round_,) = place(batch, engine.topology).rounds
    features = engine.features.of(round_)
    assert features is not None
    (pack,) = round_.packs
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        engine.model(pack, features[0], round_.relayed)
    weights = {each.untyped_storage().data_ptr() for each in engine.model.parameters()}
    # A norm's output that was freed is a storage of no bytes.
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in saved
    }
    return sum(size for place, size in storages.items() if place not in weights)
