"""Masks of a pack on the device, for attention over all its segments or spans in one kernel.

All that they are made of is computed on the host and sent in one copy: torch's `create_block_mask` would
evaluate every pair of a query and a key on the device, and `from_kv_blocks` sort blocks there.

Shape legend: Q queries, L positions whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nvlm_train.device_batch import DevicePack
from nvlm_train.model.attention import intervals
from nvlm_train.model.attention.choice import Cores
from nvlm_train.model.attention.intervals import BLOCK, Blocks, Intervals
from nvlm_train.parallel.transfer import send

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Masks:
    """Holds the masks of a pack; None where the chosen attention needs none."""

    tokens: BlockMask | None = None
    wanted: BlockMask | None = None
    context: BlockMask | None = None
    wanted_of_context: BlockMask | None = None


def masks_for_layers(cores: Cores, pack: DevicePack, wanted: Sequence[int]) -> Masks:
    """Makes the masks that the chosen attentions need.

    Args:
        cores: what is chosen.
        pack: on the device.
        wanted: rows that the last layer wants, as many as it computes.
    """
    needed: dict[str, Intervals] = {}
    if "flex" in (cores.tokens, cores.wanted):
        tokens = intervals.of_segments(pack.lengths)
        if cores.tokens == "flex":
            needed["tokens"] = tokens
        if cores.wanted == "flex":
            needed["wanted"] = tokens.of_rows(wanted)
    if pack.context is not None and cores.context == "flex":
        context = intervals.of_spans(pack.context.spans, sum(pack.lengths), pack.context.length)
        needed["context"] = context
        needed["wanted_of_context"] = context.of_rows(wanted)
    if not needed:
        return Masks()
    sent = iter(send([table for each in needed.values() for table in mask_arrays(each)]))
    return Masks(**{name: block_mask(each, sent) for name, each in needed.items()})


def mask_arrays(each: Intervals) -> list[NDArray[np.int32]]:
    """Returns what a mask is made of, for the device."""
    return [each.first_Q, each.last_Q, *intervals.blocks_of(each)]


def block_mask(each: Intervals, sent: Iterator[Tensor]) -> BlockMask:
    """Makes a mask of its arrays on the device, which it takes from an iterator."""
    from torch.nn.attention.flex_attention import BlockMask

    first_Q, last_Q = next(sent), next(sent)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= first_Q[query]) & (key < last_Q[query])

    return BlockMask(
        seq_lengths=(len(each.first_Q), each.num_keys),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=sees,
        **{name: next(sent) for name in Blocks._fields},  # type: ignore[arg-type]
    )
