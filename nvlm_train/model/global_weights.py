"""Global weights: the unsharded tensors by name, whatever the layout.

megatron-core's sharded state dict says for every local tensor which slice of which global tensor it
is. Whoever has global tensors (an importer, a seeded initialiser) fills any layout through it, so
initial weights do not depend on TP, PP or DP; whoever wants them (an exporter, a parity test) reads
them back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from nvlm_train.config.model_schema import LanguageConfig
from nvlm_train.convert.names import GlobalSlice
from nvlm_train.errors import CheckpointError
from nvlm_train.parallel.topology import device

Source = Callable[[GlobalSlice, Tensor], bool]
"""Writes a slice of a global tensor into one of its shape; returns False, and does nothing, without it."""


def sharding_metadata() -> dict[str, bool]:
    """What megatron-core's sharded state dicts are asked for; a new dict, because they write into it.

    Layers keep names of their own, so that models with cross-attention in some layers share them.
    """
    return {"non_homogeneous_layers": True}


def part_of(name: str) -> str:
    """The part that a parameter belongs to, as a stage's `trainable` names it."""
    if ".cross_" in name or ".pre_cross_" in name:
        return "cross_attention"
    # The resampler is a part of how features are projected.
    return "projector" if name.startswith("resampler.") else name.split(".", 1)[0]


def shards(
    model: MegatronModule, of: Callable[[nn.Parameter], Tensor | None]
) -> Iterator[ShardedTensor]:
    """The local slices of something that every parameter has, such as its data or its gradient.

    Args:
        model: this rank's shard of the model.
        of: maps a parameter to a tensor of its shape, or to None to leave it out.
    """
    for entry in _entries(model):
        tensor = of(entry.data)
        if tensor is not None:
            yield from _of_entry(entry, tensor)


def shards_by_parameter(model: MegatronModule) -> Mapping[nn.Parameter, list[ShardedTensor]]:
    """The local slices of each parameter, in one order on all data-parallel ranks; views of its data.

    They are looked up once: a model's tensors stay where they are, and megatron-core takes longer for this
    than a save for all else.
    """
    found: dict[nn.Parameter, list[ShardedTensor]] = vars(model).get("known_shards", {})
    have_moved = any(shards[0].data.data_ptr() != own.data_ptr() for own, shards in found.items())
    if not found or have_moved:
        found = {entry.data: list(_of_entry(entry, entry.data.data)) for entry in _entries(model)}
        # With the model it goes: whoever held it elsewhere would keep an earlier stage's weights.
        vars(model)["known_shards"] = found
    return found


def _of_entry(
    entry: ShardedTensor | ShardedTensorFactory, tensor: Tensor
) -> Iterator[ShardedTensor]:
    if isinstance(entry, ShardedTensorFactory):
        built = entry.build_fn(entry.key, tensor, entry.replica_id, entry.flattened_range)
        yield from (built.values() if isinstance(built, dict) else built)
    else:
        entry.data = tensor
        yield entry


def _entries(model: MegatronModule) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    state = model.sharded_state_dict(prefix="", metadata=sharding_metadata())
    for entry in state.values():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and isinstance(
            entry.data, nn.Parameter
        ):
            yield entry


def slice_of(shard: ShardedTensor) -> GlobalSlice:
    """Says which part of which global tensor a shard is."""
    index = tuple(
        slice(start, start + size)
        for start, size in zip(shard.global_offset, shard.local_shape, strict=True)
    )
    return GlobalSlice(shard.key, tuple(shard.global_shape), index)


def slices(model: MegatronModule) -> Iterator[GlobalSlice]:
    """What `fill` asks for on this rank."""
    return map(slice_of, shards(model, lambda parameter: parameter.data))


def own_slice(wanted: GlobalSlice, full: Tensor) -> Tensor:
    """The wanted part of a global tensor.

    Raises:
        ValueError: the global shape is another one.
    """
    if tuple(full.shape) != wanted.shape:
        raise ValueError(
            f"{wanted.name} has shape {tuple(full.shape)}, the model's is {wanted.shape}"
        )
    return full[wanted.index]


@torch.no_grad()
def fill(model: MegatronModule, source: Source) -> list[str]:
    """Writes slices of global tensors into this rank's shard.

    Nothing but these slices is asked for, each once, and each is written where it stays.

    Args:
        model: this rank's shard.
        source: writes what is wanted of a global tensor, or says that it does not have it.

    Returns:
        Names that were left alone.
    """
    return [
        shard.key
        for shard in shards(model, lambda parameter: parameter.data)
        if not source(slice_of(shard), shard.data)
    ]


def cut(make: Callable[[str, tuple[int, ...]], Tensor | None]) -> Source:
    """Makes a source of what can only be made whole.

    Slices of one tensor that follow each other, as gate and up do, are cut from the same whole.

    Args:
        make: maps a global name and shape to the whole tensor, or to None to leave it alone.
    """
    made: dict[str, Tensor | None] = {}

    def source(wanted: GlobalSlice, into: Tensor) -> bool:
        if wanted.name not in made:
            made.clear()
            made[wanted.name] = make(wanted.name, wanted.shape)
        full = made[wanted.name]
        if full is not None:
            into.copy_(own_slice(wanted, full))
        return full is not None

    return source


def seeded_source(language: LanguageConfig, seed: int) -> Callable[[str, tuple[int, ...]], Tensor]:
    """Initial weights as a function of (seed, name): normal, norms one, biases zero.

    Projections back into the residual stream are scaled by 1 / sqrt(2 layers), as megatron-core does.
    """

    def source(name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith(("bias", "alpha")):
            return torch.zeros(shape)
        if "norm" in name:
            return torch.ones(shape)
        std = language.init_std
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")) and "decoder" in name:
            std /= (2 * language.num_layers) ** 0.5
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.empty(shape).normal_(std=std, generator=generator)

    return source


def fingerprint(model: MegatronModule) -> dict[str, float]:
    """Sum of magnitudes of each part's weights over the world, in fp64. Called by every rank."""
    parts = ("projector", "cross_attention", "language_model")
    sums = torch.zeros(len(parts), dtype=torch.float64, device=device())
    everything = shards_by_parameter(model).values()
    for shard in (each for own in everything for each in own):
        if is_main_replica(shard.replica_id):
            sums[parts.index(part_of(shard.key))] += shard.data.double().abs().sum()
    dist.all_reduce(sums)
    return dict(zip(parts, sums.tolist(), strict=True))


def check_fingerprint(model: MegatronModule, saved: dict[str, float]) -> None:
    """Compares loaded weights with the sums that were saved with them, in whatever layout.

    Raises:
        CheckpointError: a part adds up to something else: shards are missing or damaged.
    """
    for part, value in fingerprint(model).items():
        # The order of summation differs between layouts; fp64 leaves far less than this.
        if abs(value - saved[part]) > 1e-9 * max(abs(saved[part]), 1.0):
            raise CheckpointError(
                f"{part}: weights add up to {value!r}, {saved[part]!r} were saved; the checkpoint is damaged"
            )
