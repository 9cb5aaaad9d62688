"""Measures the loss on held-out text-only chats, which training on images must not raise."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist

from nvlm_train.batch import Round, SampleInfo, StepBatch
from nvlm_train.config.schema import Recipe
from nvlm_train.data.loading.collate import pack_samples
from nvlm_train.data.plan.packing import best_fit_decreasing
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.demo.chats import draw_chat
from nvlm_train.parallel.topology import device
from nvlm_train.pipeline.loss import training_loss
from nvlm_train.pipeline.placing import place_step
from nvlm_train.pipeline.round import Replica, run_round

NUM_CHATS = 400


def text_loss(
    recipe: Recipe, replica: Replica, encoder: SampleEncoder, num_chats: int = NUM_CHATS
) -> float:
    """Returns the mean loss over the trained tokens of held-out chats. Called by every rank."""
    samples = [
        encoder.encode(str(index), json.dumps({"conversations": turns}).encode(), [])
        for index in range(num_chats)
        for turns in [draw_chat(index, "heldout").conversations()]
    ]
    length, pad = replica.pack_lengths[-1], encoder.tokenizer.pad
    bins = best_fit_decreasing([len(sample.token_ids) for sample in samples], length)
    infos = [SampleInfo(0, "held-out chats", str(index)) for index in range(num_chats)]
    packs = tuple(
        pack_samples([samples[i] for i in pack], [infos[i] for i in pack], length, pad)
        for pack in bins
    )
    edge = recipe.model.vision.tile_size
    no_tiles = torch.zeros(0, 3, edge, edge, dtype=torch.uint8)
    round_ = Round(packs, (0,) * replica.topology.replica_size, no_tiles)
    sums = torch.zeros(2, dtype=torch.float64, device=device())
    step = place_step(StepBatch(0, (round_,), ()), (), replica.topology)
    finish = training_loss(torch.ones((), device=device()), step.failed)
    for report in run_round(replica, step.rounds[0], finish, forward_only=True):
        weights_L = report.weights_L.double()
        sums += torch.stack([(report.losses_L.double() * weights_L).sum(), weights_L.sum()])
    # Every tensor-parallel rank of the last stage, in every replica, adds the same two numbers.
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])
