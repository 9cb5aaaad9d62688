"""Explains an out-of-memory error, of the GPU or the host, by the recipe's values to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from nvlm_train.config.layouts import recomputed_parts
from nvlm_train.config.schema import ParallelConfig, Recipe, Recompute, StageConfig
from nvlm_train.costs import activation_bytes
from nvlm_train.errors import TrainingError
from nvlm_train.geometry import encoder_batch
from nvlm_train.train.tracking.step_record import peak_memory_gib

_SIGNS = (
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "cuda out of memory",
    "cublas_status_alloc_failed",
)
"""Parts of the messages of plain RuntimeErrors: torch's CPU allocator, mmap, NCCL and cuBLAS."""


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether torch, the interpreter or a library says that there is no more memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(sign in text for sign in _SIGNS)


@contextmanager
def explained(recipe: Recipe, stage: str) -> Iterator[None]:
    """Turns an out-of-memory error of the block into one that says what to change.

    Raises:
        TrainingError: memory was not enough for the stage.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(advice(recipe, stage, error)) from error


def advice(recipe: Recipe, stage_name: str, error: BaseException) -> str:
    """Lists the values to change, the cheapest first: free ones, then those that cost time or ranks."""
    stage = recipe.stages[stage_name]
    path, parallel = f"stages.{stage_name}", stage.parallel
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    lines = [
        f"out of memory in stage {stage_name}: {first_line}",
        f"this rank's peak was {peak_memory_gib():.1f} GiB; change one of these, the cheapest first:",
    ]
    if not parallel.distributed_optimizer:
        lines.append(
            f"  {path}.parallel.distributed_optimizer=false: with true, replicas share optimizer state "
            "(in a new run, or from the next stage on)"
        )
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        lines.append(
            f"  {path}.parallel.sequence_parallel=false: with true, tensor-parallel ranks share activations"
        )
    lines += [
        f"  {path}.parallel.max_tiles_in_flight={parallel.max_tiles_in_flight}: fewer tiles are encoded "
        "before a round; results stay the same",
        f"  model.vision.batch_tiles={encoder_batch(recipe.model.vision)}: fewer tiles in one "
        "forward pass of the encoder",
    ]
    if choices := _better_recompute(parallel):
        saved = ", ".join(_saving(recipe, stage, choice) for choice in choices)
        lines.append(
            f"  {path}.parallel.recompute={_written(parallel.recompute)}: {saved}; full costs up to a third "
            "more time, the others less"
        )
    if stage.pack_length is not None and stage.pack_length > stage.sequence_length:
        lines.append(
            f"  {path}.pack_length={stage.pack_length}: fewer samples a pack, which keeps fewer activations; "
            f"{path}.sequence_length={stage.sequence_length} is the least "
            "(in a new run, or from the next stage on)"
        )
    lines += [
        f"  {path}.parallel.tensor={parallel.tensor}, {path}.parallel.pipeline={parallel.pipeline}: larger "
        "values share weights and activations over more ranks",
        f"  {path}.sequence_length={stage.sequence_length}: shorter; it must still hold the longest sample",
        f"  loader.prefetch_steps={recipe.loader.prefetch_steps}: fewer, where it is the host that is full",
    ]
    return "\n".join(lines)


def _better_recompute(parallel: ParallelConfig) -> list[Recompute]:
    """Returns what keeps fewer activations, the cheapest in time first."""
    if parallel.recompute == "full":
        return []
    smaller: list[Recompute] = [("norms",), ("mlp", "norms")]
    own = set(recomputed_parts(parallel))
    return [each for each in smaller if not own.issuperset(each)] + ["full"]


def _saving(recipe: Recipe, stage: StageConfig, choice: Recompute) -> str:
    """Says what another choice saves, of the first pipeline stage's activations."""

    def needed(parallel: ParallelConfig) -> int:
        own = replace(stage, parallel=parallel)
        return activation_bytes(recipe.model, own, recipe.precision)

    least = needed(replace(stage.parallel, recompute=choice))
    return f"{_written(choice)} saves {(needed(stage.parallel) - least) / 2**30:.1f} GiB"


def _written(recompute: Recompute) -> str:
    """Writes the value as a recipe has it."""
    return recompute if isinstance(recompute, str) else f"[{','.join(recompute)}]"
