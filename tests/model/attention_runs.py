"""Attention of a pack's tokens, of its wanted rows and over its context, by one core or another."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from nvlm_train.device_batch import DeviceContext, DevicePack, Span, Spans
from nvlm_train.model.attention import chosen
from nvlm_train.model.attention.choice import Cores
from nvlm_train.model.attention.joined import JOINED
from nvlm_train.model.attention.rope import Turns
from nvlm_train.model.cross_attention import attend
from nvlm_train.model.pack import pack_for_layers
from nvlm_train.parallel.transfer import send

GROUPS, PER_GROUP = 2, 3
TASKS = ("tokens", "wanted", "context")
JOINED_CORE = "joined"
"""SDPA in one function from projected heads on, as CPUs compute it."""


@dataclass(frozen=True)
class Problem:
    """A pack: whose rows are wanted, who sees what, and queries, keys and values."""

    lengths: tuple[int, ...]
    wanted: tuple[int, ...]
    spans: Spans
    context: int
    states: dict[str, tuple[Tensor, Tensor, Tensor]]
    """By task, [tokens, heads, D]."""
    angles_S1P: Tensor

    @classmethod
    def made(cls, lengths: Sequence[int], dtype: torch.dtype, channels: int = 16) -> Problem:
        """The first token and the padding see nothing; tags see a tile each, text all of them."""
        total, tile = sum(lengths), 17
        generator, draw = torch.Generator().manual_seed(total), random.Random(total)
        tags = [Span(1 + 2 * t, 3 + 2 * t, tile * t, tile * (t + 1)) for t in range(3)]
        spans = [span for span in tags if span.stop <= total]
        if total > 20:
            spans.append(Span(8, total - total // 4, 0, 3 * tile))
        context = 3 * tile + 5

        def states(keys: int) -> tuple[Tensor, Tensor, Tensor]:
            sizes = [(total, GROUPS * PER_GROUP), (keys, GROUPS), (keys, GROUPS)]
            made = [torch.randn(*size, channels, generator=generator) for size in sizes]
            return made[0].to(dtype), made[1].to(dtype), made[2].to(dtype)

        own = states(total)
        return cls(
            lengths=tuple(lengths),
            wanted=tuple(sorted(draw.sample(range(total), max(1, total // 5)))),
            spans=tuple(spans),
            context=context,
            states={"tokens": own, "wanted": own, "context": states(context)},
            angles_S1P=torch.randn(total, 1, channels // 2, generator=generator),
        )

    def on(self, device: str) -> Problem:
        return self._with(lambda state: state.to(device))

    def to(self, dtype: torch.dtype) -> Problem:
        return self._with(lambda state: state.to(dtype))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Problem:
        states = {
            task: tuple(change(state) for state in each) for task, each in self.states.items()
        }
        angles = self.angles_S1P.to(states["tokens"][0].device)
        return replace(self, states=states, angles_S1P=angles)  # type: ignore[arg-type]


def run(task: str, core: str, problem: Problem) -> list[Tensor]:
    """Returns the answers, and the gradients of queries, keys and values."""
    query, key, value = (state.detach().clone().requires_grad_() for state in problem.states[task])
    output = _attend(task, core, problem, (query, key, value))
    output.sin().sum().backward()
    assert query.grad is not None and key.grad is not None and value.grad is not None
    return [output.detach(), query.grad, key.grad, value.grad]


def _attend(
    task: str, core: str, problem: Problem, states: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    query, key, value = states
    # What is not asked for is left to SDPA.
    plain = Cores("sdpa", "sdpa", "sdpa")
    cores = plain if core == JOINED_CORE else replace(plain, **{task: core})
    empty = torch.zeros(0, dtype=torch.int64, device=query.device)
    bounds = np.array([0, *problem.lengths], dtype=np.int32).cumsum(dtype=np.int32)
    cu_seqlens, wanted_L = send([bounds, np.array(problem.wanted, dtype=np.int64)])
    pack = DevicePack(
        lengths=problem.lengths,
        wanted=problem.wanted,
        num_tiles=0,
        token_ids_S=empty,
        position_ids_S=empty,
        image_positions=empty,
        cu_seqlens=cu_seqlens,
        wanted_L=wanted_L,
        context=DeviceContext(problem.context, problem.spans, *[empty] * 5),
        labels=None,
    )
    config = SimpleNamespace(
        tensor_model_parallel_size=1, sequence_parallel=False, attention_dropout=0.0
    )
    turns = Turns.of(problem.angles_S1P, query.dtype)
    packed = pack_for_layers(config, pack, cores, turns)  # type: ignore[arg-type]
    if task == "context":
        function = chosen.of_context(cores) or attend
        return function(query, key, value, packed.sight()).flatten(1)
    kind = chosen.of_tokens(cores) if task == "tokens" else chosen.of_wanted(cores)
    if core == JOINED_CORE:
        by_group = (query.unflatten(1, (GROUPS, PER_GROUP)), key[:, :, None], value[:, :, None])
        return JOINED[kind](torch.cat(by_group, dim=2), packed, None).squeeze(1)
    return kind(config, 1, None, "self")(  # type: ignore[no-any-return]
        query, key, value, None, packed_seq_params=packed
    )


@contextmanager
def flex_without_a_compiler() -> Iterator[None]:
    """Lets flex attention run, with gradients, where torch's own form of it alone can: on a CPU.

    torch refuses gradients there, because its compiled form has none.
    """
    from torch.nn.attention import flex_attention as module

    from nvlm_train.model.attention import packed

    with (
        mock.patch.object(module, "_validate_device", lambda *states: None),
        mock.patch.object(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
        mock.patch.object(packed, "_flex", lambda: module.flex_attention),
    ):
        yield
