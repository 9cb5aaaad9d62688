"""Runs on the workers: generation with imported weights, in some layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nvlm_train.config.schema import ParallelConfig
from nvlm_train.data.samples.encoded import CrossTiles, EncodedSample
from nvlm_train.errors import PromptError
from nvlm_train.evaluation.generate import Prompt, generate, vocab_parallel_argmax
from nvlm_train.geometry import tokens_per_tile
from nvlm_train.parallel.topology import build_topology
from nvlm_train.tiling import lay_out
from tests.convert.language_runs import import_engine
from tests.parity.recipes import VISION


def make_prompts(sizes: list[tuple[int, int]], pixel_seed: int = 0) -> list[Prompt]:
    """Prompts given as (text tokens, tiles), ids and pixels made up; tiles come after the first token."""
    none = np.zeros(0, dtype=np.int64)
    prompts = []
    for number, (text, tiles) in enumerate(sizes):
        generator = torch.Generator().manual_seed(number)
        slots = tiles * tokens_per_tile(VISION)
        ids = torch.randint(3, 250, (text + slots,), generator=generator).numpy()
        positions = np.arange(1, 1 + slots)
        images = (lay_out((1, 1), 1),) * tiles
        views = np.empty((0, 4), dtype=np.int64)
        cross = CrossTiles(1, np.zeros(tiles, dtype=np.bool_), (), views)
        encoded = EncodedSample(ids, positions, none, none, images, cross, False)
        generator.manual_seed(100 * pixel_seed + number)
        shape = (tiles, 3, VISION.tile_size, VISION.tile_size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        prompts.append(Prompt(encoded, pixels))
    return prompts


def answer(
    parallel: ParallelConfig, weights: Path, prompts: list[Prompt], max_new_tokens: int, end_id: int
) -> list[list[int]]:
    """Answers in a layout."""
    replica = import_engine(parallel, weights).replica
    return generate(replica, prompts, max_new_tokens, end_id)


def refusal(weights: Path, prompts: list[Prompt], max_new_tokens: int) -> str:
    """The message for prompts without room; ranks of DP2 that hold none of them must stop, too."""
    with pytest.raises(PromptError) as caught:
        answer(ParallelConfig(), weights, prompts, max_new_tokens, end_id=0)
    return str(caught.value)


def argmax_of_slices(logits_LV: Tensor) -> Tensor:
    """vocab_parallel_argmax of the world's slices of whole logits."""
    topology = build_topology(ParallelConfig(tensor=2), seed=1)
    own = logits_LV.chunk(2, dim=-1)[topology.tensor_rank]
    return vocab_parallel_argmax(own, topology)
