"""Deliberate bugs in the cross path. Run on the workers."""

from __future__ import annotations

from unittest import mock

from torch import Tensor

from nvlm_train.config.schema import ParallelConfig

_SP = ParallelConfig(tensor=2, sequence_parallel=True)
BUGS = {
    "gate gradients not summed under sequence parallelism": (2, _SP),
    "the mask is shifted by one token": (2, ParallelConfig(tensor=2)),
    "the context norm is summed as if its input were sharded": (2, _SP),
    "the context's gradient stays on the last stage": (4, ParallelConfig(pipeline=4)),
    "the context's gradient is summed over ranks that hold it whole": (
        4,
        ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True),
    ),
}


def gradients_with_bug(bug: str, name: str, parallel: ParallelConfig) -> tuple:
    """Returns `gradients_of_steps` while the named bug is in place."""
    from tests.parity import cross_gradients

    with _PATCHES[bug]():
        return cross_gradients.gradients_of_steps(name, parallel)


def _unmarked_gate():
    from nvlm_train.model.cross_attention import Gate

    original = Gate.__init__

    def broken(self, config) -> None:
        original(self, config)
        self.alpha.sequence_parallel = False

    return mock.patch.object(Gate, "__init__", broken)


def _shifted_mask():
    from nvlm_train.model import cross_attention

    original = cross_attention.attend

    def broken(query, key, value, spans, dropout=0.0) -> Tensor:
        return original(query.roll(-1, 0), key, value, spans, dropout).roll(1, 0)

    return mock.patch.object(cross_attention, "attend", broken)


def _marked_context_norm():
    from nvlm_train.model.cross_attention import GatedCrossAttention

    original = GatedCrossAttention.__init__

    def broken(self, *args, **kwargs) -> None:
        original(self, *args, **kwargs)
        self.context_norm.weight.sequence_parallel = True

    return mock.patch.object(GatedCrossAttention, "__init__", broken)


def _detached_context():
    from nvlm_train.model import context_p2p

    original = context_p2p.join

    def broken(config, hidden: Tensor, context: Tensor | None, relayed: int) -> Tensor:
        return original(config, hidden, None if context is None else context.detach(), relayed)

    return mock.patch.object(context_p2p, "join", broken)


def _summed_context():
    from megatron.core import tensor_parallel

    original = tensor_parallel.gather_from_sequence_parallel_region

    def broken(tensor: Tensor, **kwargs) -> Tensor:
        return original(tensor, tensor_parallel_output_grad=True)

    return mock.patch.object(tensor_parallel, "gather_from_sequence_parallel_region", broken)


_PATCHES = dict(
    zip(
        BUGS,
        (_unmarked_gate, _shifted_mask, _marked_context_norm, _detached_context, _summed_context),
        strict=True,
    )
)
