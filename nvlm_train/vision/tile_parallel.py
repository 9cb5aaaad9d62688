"""Tile-parallel encoding: the ranks of a model replica share the tiles of a round (docs/architecture.md).

Each rank encodes its contiguous share with a whole encoder; one all-to-all brings the features to
the first pipeline stage, whose tensor-parallel ranks each need all of them.
"""

from __future__ import annotations

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
    # Replica ranks 0 .. TP - 1 are the first stage's; each receives every rank's share, in order.
    receivers = topology.tensor_size
    send = own.new_empty((receivers * len(own), *own.shape[1:]))
    send.view(receivers, *own.shape).copy_(own)
    send_split = [len(own)] * receivers + [0] * (topology.replica_size - receivers)
    receive_split = list(tile_split) if topology.is_first_pp_stage else [0] * len(tile_split)
    received = own.new_empty((sum(receive_split), *own.shape[1:]))
    dist.all_to_all_single(received, send, receive_split, send_split, group=topology.features_group)
    return received if topology.is_first_pp_stage else None
