"""Which generator a dropout mask comes from, by how tensor-parallel ranks hold what is dropped.

Megatron's rules: what every rank holds whole (the residual stream without sequence parallelism, word
embeddings, the context) is dropped by the default generator, which is in the same state on all
tensor-parallel ranks: they need one mask. What is sharded (heads, parts of a sequence) is dropped by the
one that megatron-core's tracker keeps, which is another on each. parallel/topology.py seeds both.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig


def drawing_for_heads(
    config: TransformerConfig, probability: float
) -> AbstractContextManager[None]:
    """Surrounds dropout of attention weights, whose heads are sharded over tensor-parallel ranks.

    As in megatron-core's DotProductAttention: under sequence parallelism its TransformerBlock has turned
    to the tracker's generator for all that a layer draws. To fork once more would do no harm forward, but
    recomputation in backward, outside the block, would then start from an older state and draw other masks.

    Args:
        config: of the decoder that this attention is part of.
        probability: of dropout; with 0 nothing is drawn, and no generator is touched.
    """
    if probability == 0.0 or config.sequence_parallel:
        return nullcontext()
    fork: AbstractContextManager[None] = tensor_parallel.get_cuda_rng_tracker().fork()
    return fork
