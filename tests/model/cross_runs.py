"""Runs on a worker: the real cross path beside the dense reference, and under changed pixels."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nvlm_train.batch import Microbatch
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.pipeline.placing import place_packs, relayed_rows
from nvlm_train.pipeline.round import run_features
from nvlm_train.train.engine import Engine
from nvlm_train.vision.tile_parallel import encode_tiles
from tests.model import dense
from tests.parity import cross_gradients, cross_recipes, gradients
from tests.parity.cross_recipes import Sample


def sight(name: str, samples: Sequence[Sample], seed: int) -> Tensor:
    """Who may see which tile of `cross_recipes.pack(name, samples, seed)`: bool [S, T]."""
    encoder: SampleEncoder = cross_recipes.encoder(name)
    pieces_of, images_of = [], []
    for number, (words, sizes) in enumerate(samples):
        record = cross_recipes.record((words, sizes), 10 * seed + number)
        messages = encoder.messages("", json.dumps(record).encode(), sizes)
        layout = next(encoder.layouts(messages, sizes))
        pieces_of.append([(piece, len(encoder.ids(piece))) for piece in layout.pieces])
        images_of.append(layout.images)
    return dense.allowed_tiles(pieces_of, images_of, cross_recipes.SEQUENCE_LENGTH)


def real_and_dense(name: str) -> tuple[list[float], dict[str, tuple[Tensor, Tensor]]]:
    """Losses, and every gradient, of the mixed packs: the model's and the dense reference's."""
    engine = cross_gradients.start_engine(name, ParallelConfig())
    model = cross_recipes.MODELS[name]
    packs = [
        cross_recipes.pack(name, samples, seed) for seed, samples in enumerate(cross_recipes.MIXED)
    ]
    batch = cross_recipes.step_batch(name, cross_recipes.MIXED, engine.topology.share, 0, 1)
    loss, found = gradients.of_batch(engine, batch)
    weights = gradients.gather(engine, lambda parameter: parameter.data)
    weights = {key: value.requires_grad_() for key, value in weights.items()}
    total, count = torch.zeros(()), 0
    for seed, (microbatch, pixels) in enumerate(packs):
        logits = dense.forward(
            model, weights, microbatch, encode_tiles(engine.encoder, pixels),
            sight(name, cross_recipes.MIXED[seed], seed),
        )  # fmt: skip
        positions = microbatch.label_positions_L
        total = total + F.cross_entropy(logits[positions], microbatch.label_ids_L, reduction="sum")
        count += len(positions)
    (total / count).backward()
    dense_gradients = {key: value.grad for key, value in weights.items()}
    pairs = zip(together(found).items(), together(dense_gradients).values(), strict=True)
    return [loss, float(total / count)], {key: (own, other) for (key, own), other in pairs}


def together(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gates as one vector, if there are any: a scalar's gradient is a sum that may cancel to rounding."""
    gates = sorted(key for key in gradients if key.endswith("alpha"))
    others = {key: gradients[key] for key in sorted(gradients) if key not in gates}
    if not gates:
        return others
    return others | {"gates": torch.cat([gradients[key] for key in gates])}


def who_notices(name: str, num_packs: int) -> list[str]:
    """Differences between the rule and the tokens whose cross-attention output a tile changes."""
    engine = cross_gradients.start_engine(name, ParallelConfig())
    engine.model.module.eval()
    problems: list[str] = []
    for seed in range(num_packs):
        samples = _random_samples(random.Random(f"{name}/{seed}"))
        microbatch, pixels = cross_recipes.pack(name, samples, seed)
        if microbatch.context is None:
            continue
        allowed_ST = sight(name, samples, seed)
        before = _cross_output(engine, microbatch, pixels)
        seen = allowed_ST[:, microbatch.context.cross_tiles].any(dim=1)
        if before[~seen].any():
            problems.append(f"{samples}: a token that sees nothing gets something")
        for tile in microbatch.context.cross_tiles.tolist():
            changed = pixels.clone()
            changed[tile] = 255 - changed[tile]
            after = _cross_output(engine, microbatch, changed)
            noticed = (before != after).any(dim=1)
            if not torch.equal(noticed, allowed_ST[:, tile]):
                problems.append(f"{samples}: tile {tile}")
    return problems


def _random_samples(rng: random.Random) -> list[Sample]:
    sizes = [cross_recipes.SMALL, cross_recipes.TALL, (64, 32), (64, 96)]
    return [
        (rng.randint(1, 6), rng.choices(sizes, k=rng.choice([0, 1, 1, 2])))
        for _ in range(rng.randint(1, 3))
    ]


@torch.no_grad()
def _cross_output(engine: Engine, microbatch: Microbatch, pixels: Tensor) -> Tensor:
    """What the first cross-attention adds, [S, H]."""
    outputs: list[Tensor] = []
    layer = engine.model.module.language_model.decoder.layers[1]
    # A copy: in evaluation megatron-core adds the residual in place.
    hook = layer.cross_attention.register_forward_hook(
        lambda module, inputs, output: outputs.append(output[0].clone())
    )
    features = encode_tiles(engine.encoder, pixels)
    (pack,) = place_packs([microbatch], [np.array([0])])
    engine.model.module(pack, features, relayed=0)
    hook.remove()
    return outputs[0][:, 0]


def gates_at_zero(name: str, parallel: ParallelConfig) -> bool | None:
    """Whether X or H with gates at zero and D without cross-routed tiles have the same logits, bit for bit.

    D gets the same tokens, and of the tiles only those that the decoder sees: none in X, thumbnails
    in H. None on ranks that have no logits.
    """
    engine = cross_gradients.start_engine(name, parallel)
    for key, parameter in engine.model.module.named_parameters():
        if key.endswith("alpha"):
            parameter.data.zero_()
    plain = cross_gradients.start_engine(f"d beside {name}", parallel)
    microbatches, plain_ones, features, plain_features = [], [], [], []
    for seed, samples in enumerate(cross_recipes.MIXED):
        microbatch, pixels = cross_recipes.pack(name, samples, seed)
        tiles = encode_tiles(engine.encoder, pixels)
        microbatches.append(microbatch)
        plain_ones.append(replace(microbatch, context=None))
        context = microbatch.context
        features.append(tiles)
        plain_features.append(tiles if context is None else tiles[context.decoder_tiles])
    found = logits(engine, microbatches, features)
    expected = logits(plain, plain_ones, plain_features)
    if not found:
        return None
    assert any(microbatch.context is not None for microbatch in microbatches)
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def logits(engine: Engine, microbatches: list[Microbatch], features: list[Tensor]) -> list[Tensor]:
    """Every position's logits of each pack, on the last pipeline stage."""
    engine.model.module.eval()
    first = engine.topology.is_first_pp_stage
    known = features if first else [None] * len(features)
    return run_features(
        engine.replica,
        place_packs(microbatches, [np.arange(len(each.token_ids_S)) for each in microbatches]),
        known,
        relayed_rows(microbatches, engine.topology),
        lambda pack, logits: (logits.sum(), logits.detach().clone()),
        forward_only=True,
    )
