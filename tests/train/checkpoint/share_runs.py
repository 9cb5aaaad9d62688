"""Runs on the workers: what each rank copies, exchanges, writes and reads of a checkpoint."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.model.global_weights import shards_by_parameter
from nvlm_train.train.checkpoint import sharded_state
from nvlm_train.train.checkpoint.manifest import Manifest, write_manifest
from nvlm_train.train.checkpoint.mcore_fixes import keep_results_in_the_process
from nvlm_train.train.checkpoint.sharded_state import Plans, write_request
from nvlm_train.train.checkpoint.shares import optimizer_pieces, weight_pieces
from nvlm_train.train.checkpoint.writer_threads import WriterThreads
from nvlm_train.train.engine import Engine
from nvlm_train.train.optimizer import make_moments
from tests.parallel.calls import RecordedCalls
from tests.parity import cross_gradients
from tests.parity.gradients import start_engine
from tests.train.checkpoint import adam_moments
from tests.train.checkpoint.direct_save import save_directly

COLLECTIVES = ("all_gather", "all_gather_into_tensor", "gather", "all_reduce", "broadcast")
OBJECTS = ("all_gather_object", "gather_object", "scatter_object_list")


@dataclass
class Found:
    """Counts of one rank."""

    own_bytes: int
    """Of its share: weights and moments."""
    written: int
    """Bytes of its files."""
    all_written: int
    """Bytes of all ranks' files."""
    exchanged: list[int]
    """Numbers of floating point that each save exchanged."""
    plans: list[int]
    """Objects that each save exchanged."""
    copies: dict[str, int]
    """Operators of ATen that a save called, those that copy."""
    pieces: int
    """Tensors of its share."""
    read: int
    """Bytes that a load asks of all files."""


@dataclass
class _Exchanges:
    numbers: int = 0
    objects: int = 0
    patches: list[Any] = field(default_factory=list)


@contextlib.contextmanager
def _counted() -> Iterator[_Exchanges]:
    """Counts what goes through torch's collectives."""
    found = _Exchanges()

    def counting(original: Any, is_object: bool) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            found.objects += is_object
            found.numbers += sum(each.numel() for each in tensors if each.is_floating_point())
            return original(*args, **kwargs)

        return collective

    with contextlib.ExitStack() as stack:
        for names, is_object in ((COLLECTIVES, False), (OBJECTS, True)):
            for name in names:
                patched = counting(getattr(dist, name), is_object)
                stack.enter_context(mock.patch.object(dist, name, patched))
        yield found


def save_and_load(parallel: ParallelConfig, directory: Path, saves: int = 3) -> Found:
    """Trains the small model, saves it several times and loads the last."""
    engine = adam_moments.trained(parallel)
    keep_results_in_the_process()
    plans, exchanged, objects, copies = Plans(), [], [], {}
    queue = AsyncCallsQueue(persistent=True)
    queue.persistent_caller = writers = WriterThreads()
    for number in range(saves):
        where = directory / str(number)
        if dist.get_rank() == 0:
            where.mkdir(parents=True)
        dist.barrier()
        with _counted() as exchanges, RecordedCalls() as calls:
            request = write_request(engine, where, plans)
        copies = {
            name: calls.names.count(name) for name in ("aten.clone.default", "aten.copy_.default")
        }
        exchanged.append(exchanges.numbers)
        objects.append(exchanges.objects)
        queue.schedule_async_request(request)
        queue.maybe_finalize_async_calls(blocking=True)
        assert writers.digests
    if dist.get_rank() == 0:
        write_manifest(Manifest(1, {}), where)
    dist.barrier()
    pieces = _pieces(engine)
    files = {path: path.stat().st_size for path in where.glob("*.distcp")}
    own = f"__{dist.get_rank()}_"
    read = bytes_asked_for(lambda: sharded_state.load(start_engine(parallel), where, True))
    return Found(
        own_bytes=sum(each.numel() * each.element_size() for each in pieces),
        written=sum(size for path, size in files.items() if path.name.startswith(own)),
        all_written=sum(files.values()),
        exchanged=exchanged,
        plans=objects,
        copies=copies,
        pieces=len(pieces),
        read=read,
    )


def bytes_asked_for(load: Callable[[], None]) -> int:
    """Adds up the parts of files that torch's reader asks for."""
    original, lengths = FileSystemReader._slice_file, []

    def counting(self: Any, file: Any, place: Any) -> Any:
        lengths.append(place.length)
        return original(self, file, place)

    with mock.patch.object(FileSystemReader, "_slice_file", counting):
        load()
    return sum(lengths)


def _pieces(engine: Engine) -> list[Tensor]:
    module = engine.model.module
    shares = [*weight_pieces(module), *optimizer_pieces(engine.optimizer, module)]
    return [each.data for each in shares if not any(each.replica_id)]  # type: ignore[arg-type]


# ---- numbers that say where they belong ----


@dataclass(frozen=True)
class Kind:
    """What is saved: a model of `recipes` ("d") or `cross_recipes`, and what trains of it."""

    model: str = "d"
    trainable: tuple[str, ...] | None = None
    precision: str = "fp32"

    def engine(self, parallel: ParallelConfig) -> Engine:
        changes: dict[str, Any] = {"precision": self.precision}
        if self.trainable is not None:
            changes["trainable"] = self.trainable
        if self.model == "d":
            return start_engine(parallel, **changes)
        return cross_gradients.start_engine(self.model, parallel, **changes)


def save(kind: Kind, parallel: ParallelConfig, directory: Path) -> None:
    """Saves weights and moments whose numbers are a function of name and place."""
    save_directly(_filled(kind, parallel), directory)


def save_as_before(kind: Kind, parallel: ParallelConfig, directory: Path) -> None:
    """Saves in the form that ours had until format 3, by megatron-core alone: `fully_reshardable`."""
    engine = _filled(kind, parallel)
    module, metadata = engine.model.module, {"non_homogeneous_layers": True}
    state = {
        "model": module.sharded_state_dict(metadata=dict(metadata)),
        "optimizer": engine.optimizer.sharded_state_dict(
            module.sharded_state_dict(metadata=dict(metadata)),
            metadata=metadata | {"distrib_optim_sharding_type": "fully_reshardable"},
        ),
    }
    with mock.patch.object(sharded_state, "sharded_state", lambda engine: state):
        save_directly(engine, directory)


def wrong_after_load(kind: Kind, parallel: ParallelConfig, directory: Path) -> list[str]:
    """Loads into a layout. Names what is not the function of name and place that was saved."""
    engine = kind.engine(parallel)
    sharded_state.load(engine, directory, same_layout=False)
    weights = [each for own in shards_by_parameter(engine.model.module).values() for each in own]
    moments = optimizer_pieces(engine.optimizer, engine.model.module)
    return [
        each.key
        for each in (*weights, *moments)
        if not torch.equal(each.data, _function(each).to(each.dtype))
    ]


def wrong_without_spreading(kind: Kind, parallel: ParallelConfig, directory: Path) -> list[str]:
    """Does the same with the deliberate bug that ranks keep what they have not read themselves."""
    with mock.patch.object(sharded_state, "spread_weights", lambda module: None):
        return wrong_after_load(kind, parallel, directory)


def _filled(kind: Kind, parallel: ParallelConfig) -> Engine:
    engine = kind.engine(parallel)
    make_moments(engine.optimizer)
    for shards in shards_by_parameter(engine.model.module).values():
        for each in shards:
            each.data.copy_(_function(each))
    for each in optimizer_pieces(engine.optimizer, engine.model.module):
        each.data.copy_(_function(each))
    return engine


def _function(shard: ShardedTensor) -> Tensor:
    rows, *columns = (
        torch.arange(start, start + size, dtype=torch.float64)
        for start, size in zip(shard.global_offset, shard.local_shape, strict=True)
    )
    place = rows[:, None] * shard.global_shape[1] + columns[0] if columns else rows
    return (place * 0.37 + zlib.crc32(shard.key.encode()) % 1000).sin()
