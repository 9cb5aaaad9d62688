"""Shapes that follow from a recipe: patches, tokens, channels, heads. Pure arithmetic; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nvlm_train.config.model_schema import LanguageConfig, ModelConfig, VisionConfig
from nvlm_train.config.schema import StageConfig

PIXEL_SHUFFLE = 2
"""Pixel shuffle joins 2 x 2 neighbouring patches into one token (NVLM 1.0, section 4.1)."""

_LENGTHS = 8
"""Packs have at most so many lengths: kernels and CUDA graphs are made for each, and torch.compile makes
code for at most eight shapes of a function."""
_LENGTH_UNIT = 64
"""Shorter packs have a multiple of this many tokens, which suits matrix products. [tokens]"""

_MOST_TILES = 16
"""More tiles in a forward pass make the encoder no faster: an H200 encodes 8 to 64 at a time at one speed
within 5% (benchmarks/results/gpu_parts.md), and of a short last batch more would be black. [tiles]"""
_MOST_STATES = 2**28
"""A layer of the encoder may hold this many numbers at a time, 0.5 GiB in bf16, where the recipe states no
batch. [numbers]"""


def patches_per_side(vision: VisionConfig) -> int:
    """Counts the patches along one edge of a tile: 32 for 448 pixels and patch 14."""
    return vision.tile_size // vision.patch_size


def tokens_per_tile(vision: VisionConfig) -> int:
    """Counts the decoder tokens of one tile after pixel shuffle: 256 for the paper's encoder."""
    return (patches_per_side(vision) // PIXEL_SHUFFLE) ** 2


def context_tokens_per_tile(model: ModelConfig) -> int:
    """Counts the tokens of a tile in the cross-attention context: its latents where there is a resampler."""
    return model.resampler.num_latents if model.resampler else tokens_per_tile(model.vision)


def tile_feature_size(vision: VisionConfig) -> int:
    """Counts the channels of one token after pixel shuffle: 12,800 for the paper's encoder."""
    return vision.hidden_size * PIXEL_SHUFFLE**2


def encoder_batch(vision: VisionConfig) -> int:
    """Counts the tiles of a forward pass of the encoder: the recipe's, or as many as memory is meant for.

    It follows from the recipe alone, never from what a GPU has free: all ranks of all starts must take
    equal batches, because products of other shapes may round differently. Without the recipe's it is 8
    for InternViT-6B and 16 for InternViT-300M.
    """
    if vision.batch_tiles is not None:
        return vision.batch_tiles
    # The widest moment of a layer: its input and the normed one, the MLP's width before and after GELU.
    states = 2 * (patches_per_side(vision) ** 2 + 1) * (vision.hidden_size + vision.ffn_hidden_size)
    return max(1, min(_MOST_TILES, _MOST_STATES // states))


def head_size(language: LanguageConfig) -> int:
    """Counts the channels of an attention head."""
    return language.head_dim or language.hidden_size // language.num_heads


def query_size(language: LanguageConfig) -> int:
    """Counts the channels of all queries: the width between attention and its output projection."""
    return language.num_heads * head_size(language)


def kv_size(language: LanguageConfig) -> int:
    """Counts the channels of all keys, which are those of all values."""
    return language.num_kv_heads * head_size(language)


def num_cross_layers(model: ModelConfig) -> int:
    """Counts the layers with cross-attention: 10 at 72B and at 34B."""
    cross = model.cross_attention
    return model.language.num_layers // cross.every if cross else 0


def pack_length(stage: StageConfig) -> int:
    """Counts the tokens that a pack holds at most: as many as a sample where the recipe says no more."""
    return stage.pack_length or stage.sequence_length


def pack_lengths(stage: StageConfig) -> tuple[int, ...]:
    """Lists the lengths that a stage's packs are filled up to, ascending; all packs of a step have one."""
    return lengths_between(stage.sequence_length, pack_length(stage), stage.parallel.tensor)


def lengths_between(shortest: int, longest: int, tensor: int) -> tuple[int, ...]:
    """Lists lengths of packs, ascending, from the longest sample's to the longest pack's.

    They are the longest sample's and eighths of the pack length that are longer, rounded up to what tensor
    parallelism divides. Where a pack is as long as a sample may be, there is one.
    """
    unit = math.lcm(_LENGTH_UNIT, tensor)
    eighths = (longest * part / _LENGTHS for part in range(1, _LENGTHS + 1))
    least = (max(each, shortest) for each in eighths)
    return tuple(sorted({min(math.ceil(each / unit) * unit, longest) for each in least}))


def length_for(num_tokens: int, lengths: Sequence[int]) -> int:
    """Returns the shortest of the lengths, which ascend, that holds so many tokens.

    >>> length_for(500, (512, 1024)), length_for(513, (512, 1024))
    (512, 1024)
    """
    return next(length for length in lengths if length >= num_tokens)
