"""Tile-parallel encoding: the ranks of a model replica share the tiles of a round (docs/architecture.md).

Each rank encodes its contiguous share with a whole encoder. One all-to-all brings the features to the
first pipeline stage, to each of its tensor-parallel ranks a block, and these ranks gather the blocks.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from nvlm_train.device_batch import DeviceRound
from nvlm_train.geometry import encoder_batch, tile_feature_size, tokens_per_tile
from nvlm_train.parallel.topology import Topology
from nvlm_train.vision.encoder import VisionEncoder


def encode_round(
    encoder: VisionEncoder, round_: DeviceRound, topology: Topology
) -> list[Tensor] | None:
    """Features of each pack of a round. Called by every rank of the replica.

    Returns:
        On the first pipeline stage, per pack [T, tokens per tile, feature size] in the encoder's dtype;
        None on the other stages.
    """
    features = encode_share(encoder, round_.pixels_TCEE, round_.tile_split, topology)
    if features is None:
        return None
    return list(features.split([pack.num_tiles for pack in round_.packs]))


def encode_share(
    encoder: VisionEncoder, own_TCEE: Tensor, tile_split: tuple[int, ...], topology: Topology
) -> Tensor | None:
    """Encodes this rank's tiles and brings all ranks' to the first stage. Called by the whole replica.

    Args:
        encoder: whole, on every rank.
        own_TCEE: this rank's tiles.
        tile_split: tiles of each rank of the replica.
        topology: this rank's place.

    Returns:
        On the first pipeline stage [T, tokens per tile, feature size]; None on the other stages.
    """
    return _to_first_stage(encode_tiles(encoder, own_TCEE), tile_split, topology)


def encode_tiles(encoder: VisionEncoder, tiles_TCEE: Tensor) -> Tensor:
    """Encodes uint8 tiles in batches of one fixed shape.

    The last batch is filled up with black tiles: matrix products of another shape may round
    differently, and a tile's features must not depend on which rank computed them.

    Args:
        encoder: a whole one.
        tiles_TCEE: uint8 [T, 3, E, E], on any device; pinned memory is copied while the host goes on.

    Returns:
        [T, tokens per tile, feature size], on the encoder's device. It is no inference tensor: what learns
        from it may keep it for its backward.
    """
    config = encoder.config
    shape = (len(tiles_TCEE), tokens_per_tile(config), tile_feature_size(config))
    features = torch.empty(shape, dtype=encoder.dtype, device=encoder.device)
    size = encoder_batch(config)
    for start in range(0, len(tiles_TCEE), size):
        own = tiles_TCEE[start : start + size].to(encoder.device, non_blocking=True)
        # All batches are tensors of one kind, or the encoder would be compiled once for each kind.
        batch = _filled(own, size)
        with torch.inference_mode():
            features[start : start + size] = encoder(batch)[: len(own)]
    return features


def _filled(batch_TCEE: Tensor, size: int) -> Tensor:
    """A batch of `size` tiles; one that has as many already is returned as it is."""
    if len(batch_TCEE) == size:
        return batch_TCEE
    filled = batch_TCEE.new_zeros((size, *batch_TCEE.shape[1:]))
    filled[: len(batch_TCEE)] = batch_TCEE
    return filled


def _to_first_stage(own: Tensor, tile_split: tuple[int, ...], topology: Topology) -> Tensor | None:
    if topology.replica_size == 1:
        return own
    # Replica ranks 0 .. TP - 1 are the first stage's. Blocks of the round's tiles are as contiguous as the
    # ranks' shares: each rank sends views of its own features, every one once, and nothing is copied.
    receivers, num_tiles = topology.tensor_size, sum(tile_split)
    block = -(-num_tiles // receivers)
    blocks = [range(start * block, (start + 1) * block) for start in range(receivers)]
    ends = list(accumulate(tile_split, initial=0))
    shares = [range(start, end) for start, end in pairwise(ends)]
    nobodys = [range(0)] * (topology.replica_size - receivers)
    mine, to_me = shares[topology.replica_rank], (blocks + nobodys)[topology.replica_rank]
    send_split = [_overlap(mine, each) for each in blocks + nobodys]
    receive_split = [_overlap(each, to_me) for each in shares]
    whole = own.new_empty((receivers * block if to_me else 0, *own.shape[1:]))
    received = whole[to_me.start : to_me.start + sum(receive_split)]
    dist.all_to_all_single(
        received, own, receive_split, send_split, group=topology.features.replica
    )
    if not topology.is_first_pp_stage:
        return None
    if receivers > 1:
        dist.all_gather_into_tensor(
            whole, whole[to_me.start : to_me.stop], group=topology.features.first_stage
        )
    return whole[:num_tiles]


def _overlap(one: range, other: range) -> int:
    """Counts what both contiguous ranges hold."""
    return max(0, min(one.stop, other.stop) - max(one.start, other.start))
