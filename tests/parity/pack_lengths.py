"""Runs on the workers: the same samples in packs of one length or another."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm_train.batch import RankShare, SampleInfo, StepBatch
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.data.loading.collate import pack_samples
from nvlm_train.data.plan.packing import best_fit_decreasing
from nvlm_train.data.samples.encoded import EncodedSample
from nvlm_train.geometry import length_for, pack_lengths
from tests.parity import cross_gradients, cross_recipes, gradients, recipes

SAMPLES = [sample for pack in [*cross_recipes.MIXED, *cross_recipes.TEXT_ONLY] for sample in pack]


@cache
def encoded(name: str) -> list[EncodedSample]:
    return [cross_recipes.encode(name, sample, seed) for seed, sample in enumerate(SAMPLES)]


def pixels(seed: int, num_tiles: int) -> Tensor:
    """Returns the tiles of a sample, whatever pack it is in."""
    edge, generator = recipes.VISION.tile_size, torch.Generator().manual_seed(seed)
    shape = (num_tiles, 3, edge, edge)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def step_batch(name: str, lengths: tuple[int, ...], share: RankShare, rounds: int) -> StepBatch:
    """Packs all samples as a plan does, filled up to the shortest of the lengths that holds them."""
    samples = encoded(name)
    sizes = [len(sample.token_ids) for sample in samples]
    groups = best_fit_decreasing(sizes, lengths[-1])
    length = length_for(max(sum(sizes[i] for i in group) for group in groups), lengths)
    packs = []
    for group in groups:
        infos = [SampleInfo(i % 2, "made-up", str(i)) for i in group]
        microbatch = pack_samples([samples[i] for i in group], infos, length, pad_id=0)
        tiles = [pixels(i, samples[i].num_tiles) for i in group]
        packs.append((microbatch, torch.cat(tiles)))
    return recipes.deal(packs, share, 0, rounds)


def num_packs(name: str, pack_length: int | None) -> int:
    """Returns how many packs a step is."""
    recipe = recipes.recipe(
        ParallelConfig(),
        sequence_length=cross_recipes.SEQUENCE_LENGTH,
        pack_length=pack_length,
    )
    batch = step_batch(name, pack_lengths(recipe.stages["sft"]), RankShare(), 1)
    return len(batch.rounds[0].microbatches)


def gradients_of_step(
    name: str, parallel: ParallelConfig, pack_length: int | None, rounds: int = 1
) -> tuple[float, dict[str, Tensor]]:
    """Returns the step's loss, and on rank 0 its canonical gradients."""
    engine = cross_gradients.start_engine(name, parallel, pack_length=pack_length)
    batch = step_batch(name, engine.replica.pack_lengths, engine.topology.share, rounds)
    loss, found = gradients.of_batch(engine, batch)
    return loss, found if dist.get_rank() == 0 else {}


def gradients_of_one_segment(name: str, pack_length: int) -> tuple[float, dict[str, Tensor]]:
    """The same with a deliberate bug: all samples of a pack are one segment."""
    engine = cross_gradients.start_engine(name, ParallelConfig(), pack_length=pack_length)
    batch = step_batch(name, engine.replica.pack_lengths, engine.topology.share, 1)
    (round_,) = batch.rounds
    microbatches = tuple(
        replace(each, cu_seqlens=each.cu_seqlens[[0, -1]]) for each in round_.microbatches
    )
    return gradients.of_batch(
        engine, replace(batch, rounds=(replace(round_, microbatches=microbatches),))
    )
