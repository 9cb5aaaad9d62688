"""Generates greedily with the trained model in its own layout, for many prompts at once.

Prompts are packed like training samples, each with room for its answer. Images are encoded once. Every
new token is one forward pass of the packs that still have an unfinished prompt. Keys and values are not
cached, so a token costs a whole forward, which packing shares among the prompts.

Shape legend: S tokens of a pack, L prompts of a pack, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from torch import Tensor

from nvlm_train.batch import Microbatch, SampleInfo
from nvlm_train.data.loading.collate import pack_samples
from nvlm_train.data.loading.loader import split_tiles
from nvlm_train.data.plan.packing import best_fit_decreasing
from nvlm_train.data.samples.encoded import EncodedSample
from nvlm_train.device_batch import DevicePack
from nvlm_train.errors import PromptError
from nvlm_train.geometry import length_for
from nvlm_train.parallel.topology import Topology, device
from nvlm_train.pipeline.placing import place_packs, relayed_rows
from nvlm_train.pipeline.round import Replica, run_features
from nvlm_train.vision.tile_parallel import encode_share


@dataclass(frozen=True)
class Prompt:
    """Holds a question that is encoded up to the assistant's header, and the tiles of its images."""

    encoded: EncodedSample
    tiles_TCEE: Tensor
    """uint8 [T, 3, E, E]."""


@dataclass
class _Slot:
    """Holds a prompt's place in a pack, and its answer so far."""

    prompt: int
    """Number of the prompt."""
    next: int
    """Position in the pack where the next token is written."""
    answer: list[int] = field(default_factory=list)
    is_done: bool = False


@dataclass
class _Pack:
    """Holds prompts that share a sequence."""

    microbatch: Microbatch
    features: Tensor | None
    slots: list[_Slot]

    @property
    def is_done(self) -> bool:
        return all(slot.is_done for slot in self.slots)


def generate(
    replica: Replica, prompts: Sequence[Prompt], max_new_tokens: int, end_id: int
) -> list[list[int]]:
    """Answers every prompt. Called by all ranks with the same prompts.

    Args:
        replica: the model, in evaluation mode.
        prompts: each with room for `max_new_tokens` within the stage's sequence length.
        max_new_tokens: length of the longest answer, in tokens.
        end_id: token that ends an answer, and is not part of it.

    Returns:
        Token ids of each answer, on every rank.

    Raises:
        PromptError: on all ranks, when a prompt leaves no room for its answer.
    """
    topology = replica.topology
    _check_room(prompts, max_new_tokens, replica.sequence_length)
    mine = range(topology.data_rank, len(prompts), topology.data_size)
    packs = _make_packs(replica, prompts, mine, max_new_tokens)
    for _ in range(max_new_tokens):
        unfinished = [pack for pack in packs if not pack.is_done]
        if not unfinished:
            break
        tokens = _next_tokens(replica, unfinished)
        for pack, pack_tokens in zip(unfinished, tokens, strict=True):
            _append(pack, pack_tokens, end_id)
    own = [(slot.prompt, slot.answer) for pack in packs for slot in pack.slots]
    everyone: list[list[tuple[int, list[int]]]] = [own] * topology.world_size
    dist.all_gather_object(everyone, own)
    answers = dict(pair for pairs in everyone for pair in pairs)
    return [answers[number] for number in range(len(prompts))]


def _check_room(prompts: Sequence[Prompt], max_new_tokens: int, sequence_length: int) -> None:
    for number, prompt in enumerate(prompts):
        length = len(prompt.encoded.token_ids)
        if length + max_new_tokens > sequence_length:
            raise PromptError(
                f"prompt={number}: {length} tokens and max_new_tokens={max_new_tokens} do not fit "
                f"sequence_length={sequence_length}; shorten the prompt or lower max_new_tokens"
            )


def _make_packs(
    replica: Replica, prompts: Sequence[Prompt], mine: range, max_new_tokens: int
) -> list[_Pack]:
    lengths = [len(prompts[number].encoded.token_ids) + max_new_tokens for number in mine]
    bins = best_fit_decreasing(lengths, replica.pack_lengths[-1])
    longest = max((sum(lengths[i] for i in numbers) for numbers in bins), default=0)
    length = length_for(longest, replica.pack_lengths)
    return [
        _make_pack(replica, prompts, [mine[i] for i in numbers], max_new_tokens, length)
        for numbers in bins
    ]


def _make_pack(
    replica: Replica,
    prompts: Sequence[Prompt],
    numbers: list[int],
    max_new_tokens: int,
    length: int,
) -> _Pack:
    encoded = [prompts[number].encoded for number in numbers]
    microbatch = pack_samples(
        [each.with_room(max_new_tokens) for each in encoded],
        [SampleInfo(0, "prompt", str(number)) for number in numbers],
        length,
        pad_id=0,
    )
    starts = microbatch.cu_seqlens.tolist()
    slots = [
        _Slot(number, start + len(each.token_ids))
        for number, start, each in zip(numbers, starts, encoded, strict=False)
    ]
    tiles = torch.cat([prompts[number].tiles_TCEE for number in numbers])
    return _Pack(microbatch, _encode(replica, tiles), slots)


def _encode(replica: Replica, tiles_TCEE: Tensor) -> Tensor | None:
    """Encodes a pack's tiles, of which every rank of the replica encodes a share.

    Returns:
        On the first pipeline stage [T, tokens per tile, feature size]; elsewhere None.
    """
    topology = replica.topology
    split = split_tiles(len(tiles_TCEE), topology.replica_size)
    own = tiles_TCEE.split(split)[topology.replica_rank]
    return encode_share(replica.features.encoder, own, split, topology)


def _next_tokens(replica: Replica, packs: list[_Pack]) -> list[list[int]]:
    """Returns the most likely next token of every slot by pack, on every rank of the replica."""

    def finish(pack: DevicePack, logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.sum(), vocab_parallel_argmax(logits[:, 0], replica.topology)

    microbatches = [pack.microbatch for pack in packs]
    wanted = [np.array([slot.next - 1 for slot in pack.slots]) for pack in packs]
    results = run_features(
        replica,
        place_packs(microbatches, wanted),
        [pack.features for pack in packs],
        relayed_rows(microbatches, replica.topology),
        finish,
        forward_only=True,
    )
    counts = [len(pack.slots) for pack in packs]
    joined = torch.zeros(sum(counts), dtype=torch.int64, device=device())
    if replica.topology.is_last_pp_stage:
        joined.copy_(torch.cat(results))
    dist.broadcast(
        joined,
        mpu.get_pipeline_model_parallel_last_rank(),
        group=mpu.get_pipeline_model_parallel_group(),
    )
    return [part.tolist() for part in joined.split(counts)]


def vocab_parallel_argmax(logits_LV: Tensor, topology: Topology) -> Tensor:
    """Returns the index of the largest logit over the whole vocabulary, on every tensor-parallel rank.

    Args:
        logits_LV: this rank's slice of the vocabulary, [L, V / TP].
        topology: this rank's place.

    Returns:
        int64 [L].
    """
    values_L, indices_L = logits_LV.max(dim=-1)
    indices_L = indices_L + topology.tensor_rank * logits_LV.shape[-1]
    group = mpu.get_tensor_model_parallel_group()
    all_values = [torch.empty_like(values_L) for _ in range(topology.tensor_size)]
    all_indices = [torch.empty_like(indices_L) for _ in range(topology.tensor_size)]
    dist.all_gather(all_values, values_L.contiguous(), group=group)
    dist.all_gather(all_indices, indices_L.contiguous(), group=group)
    best = torch.stack(all_values).argmax(dim=0)
    return torch.stack(all_indices).gather(0, best[None])[0]


def _append(pack: _Pack, tokens: list[int], end_id: int) -> None:
    """Writes each slot's token, so that the next pass reads it. An end token finishes the slot."""
    ids_S = pack.microbatch.token_ids_S
    for slot, token in zip(pack.slots, tokens, strict=True):
        if slot.is_done:
            continue
        if token == end_id:
            slot.is_done = True
            continue
        slot.answer.append(token)
        ids_S[slot.next] = token
        slot.next += 1
