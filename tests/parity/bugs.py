"""Deliberate bugs, each of which a loss test would let through or nearly so. Run on the workers."""

from __future__ import annotations

from unittest import mock

from torch import Tensor

from nvlm_train.config.schema import ParallelConfig

_SP = ParallelConfig(tensor=2, sequence_parallel=True)
BUGS = {
    "norm gradients not summed under sequence parallelism": (2, _SP),
    "gather before the output layer sums its gradient twice": (2, _SP),
    "samples of a pack attend to each other": (2, ParallelConfig(tensor=2)),
    "tiles arrive in the wrong order": (2, ParallelConfig(pipeline=2)),
    "loss divided by the rank's own tokens": (2, ParallelConfig()),
    "positions are stretched": (2, ParallelConfig(tensor=2)),
    "gradients of an earlier step are left in the buffer": (1, ParallelConfig()),
}


def gradients_with_bug(bug: str, parallel: ParallelConfig, steps: list) -> tuple:
    """Returns `gradients_of_step` while the named bug is in place."""
    from tests.parity import gradients

    with _PATCHES[bug]():
        return gradients.gradients_of_step(parallel, steps)


def _unmarked_norms():
    from nvlm_train.model.layers import RMSNorm

    original = RMSNorm.__init__

    def broken(self, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    return mock.patch.object(RMSNorm, "__init__", broken)


def _double_sum():
    from megatron.core import tensor_parallel

    original = tensor_parallel.gather_from_sequence_parallel_region

    def broken(hidden: Tensor, **kwargs) -> Tensor:
        return original(hidden, tensor_parallel_output_grad=True)

    return mock.patch.object(tensor_parallel, "gather_from_sequence_parallel_region", broken)


def _leaking_packs():
    from nvlm_train.model import language

    original = language.pack_for_layers

    def broken(*args):
        packed = original(*args)
        packed.lengths = (sum(packed.lengths),)
        return packed

    return mock.patch.object(language, "pack_for_layers", broken)


def _wrong_tile_order():
    from nvlm_train.vision import tile_parallel

    original = tile_parallel._to_first_stage

    def broken(own, tile_split, topology):
        features = original(own, tile_split, topology)
        return None if features is None else features.flip(0)

    return mock.patch.object(tile_parallel, "_to_first_stage", broken)


def _own_tokens():
    from tests.parity import gradients

    def broken(batch, topology) -> Tensor:
        own = [pack.labels.weights_L.sum() for round_ in batch.rounds for pack in round_.packs]
        return sum(own) * topology.data_size

    return mock.patch.object(gradients, "count_trained_tokens", broken)


def _stretched_positions():
    from nvlm_train.model import language

    original = language.angles

    def broken(*args) -> Tensor:
        # Stretched positions: the distance between two tokens of a sample counts double.
        return 2 * original(*args)

    return mock.patch.object(language, "angles", broken)


def _stale_gradients():
    from nvlm_train.train.engine import DataParallel

    return mock.patch.object(DataParallel, "zero_grad_buffer", lambda self: None)


_PATCHES = dict(
    zip(
        BUGS,
        (
            _unmarked_norms,
            _double_sum,
            _leaking_packs,
            _wrong_tile_order,
            _own_tokens,
            _stretched_positions,
            _stale_gradients,
        ),
        strict=True,
    )
)
