"""Each rank asks for its own slices of the files, once, and holds little more than these in memory."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvlm_train.config.model_schema import LanguageConfig, RopeScalingConfig, VisionConfig
from nvlm_train.config.schema import ParallelConfig
from nvlm_train.convert.families.decoder import EMBEDDING
from nvlm_train.convert.language import FAMILIES
from nvlm_train.convert.names import GlobalSlice, pieces_of
from nvlm_train.convert.vision import kind_of
from tests.convert import reading_runs
from tests.hugging_face import encoder_sizes, sizes
from tests.parity.recipes import LANGUAGE
from tests.workers import WorkerPool

logger = logging.getLogger(__name__)
LLAMA_3 = {
    "qkv_bias": False,
    "head_dim": 24,
    "tied_embeddings": True,
    "rope_scaling": RopeScalingConfig("llama3", factor=8.0, original_max_positions=32),
}
LAYOUTS = {
    "single": (1, ParallelConfig()),
    "TP2": (2, ParallelConfig(tensor=2)),
    "TP2 PP2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "TP2 DP2": (4, ParallelConfig(tensor=2)),
}


@pytest.mark.parametrize("family", ["qwen2", "tied llama 3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_byte_is_asked_for_once(
    workers: WorkerPool, qwen2_dir: Path, llama_3_dir: Path, layout: str, family: str
) -> None:
    """By one rank of a model replica; only what several hold (norms, the tied table) by each of them."""
    directory, fields = {"qwen2": (qwen2_dir, {}), "tied llama 3": (llama_3_dir, LLAMA_3)}[family]
    world, parallel = LAYOUTS[layout]
    run = partial(reading_runs.what_is_asked, **fields)
    ranks = workers.run(world, run, parallel, directory)
    stored = stored_tensors(directory)
    replicas = world // parallel.tensor // parallel.pipeline
    together = {name: torch.zeros(tensor.shape) for name, tensor in stored.items()}
    for asked, counted in ranks:
        own = {name: torch.zeros(tensor.shape) for name, tensor in stored.items()}
        for name, index in asked:
            own[name][index] += 1
        assert all(each.max() <= 1 for each in own.values()), "something is read twice"
        assert counted == sum(
            int(each.sum()) * stored[name].element_size() for name, each in own.items()
        )
        for name, each in own.items():
            together[name] += each
    for name, times in together.items():
        holders = replicas
        if "norm" in name:
            holders *= parallel.tensor
        if name == EMBEDDING and "lm_head.weight" not in stored:
            holders *= parallel.pipeline
        assert (times == holders).all(), name


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    files = (load_file(path) for path in sorted(directory.glob("*.safetensors")))
    return {name: tensor for each in files for name, tensor in each.items()}


def test_rows_go_where_megatron_core_has_them() -> None:
    """A slice that begins and ends inside of groups, of 2 KV groups with 2 queries of 16 channels each."""
    name = "language_model.decoder.layers.3.self_attention.linear_qkv.weight"
    wanted = GlobalSlice(name, (128, 64), (slice(24, 72), slice(0, 64)))
    pieces = pieces_of(LANGUAGE, wanted)
    assert pieces is not None
    found = [(each.name.split(".")[-2][0], each.index[0], each.rows) for each in pieces]
    assert found == [
        ("q", slice(24, 32), slice(0, 8)),
        ("k", slice(0, 16), slice(8, 24)),
        ("v", slice(0, 16), slice(24, 40)),
        ("q", slice(32, 40), slice(40, 48)),
    ]
    assert pieces_of(LANGUAGE, GlobalSlice("projector.norm.weight", (4,), (slice(0, 4),))) is None


BIG = LanguageConfig(
    num_layers=28, hidden_size=1536, num_heads=12, num_kv_heads=2, ffn_hidden_size=8960,
    vocab_size=152_064, rope_theta=1e6, tied_embeddings=True,
)  # fmt: skip
"""Qwen2.5-1.5B with a padded vocabulary: 3.1 GB in bf16."""
ROWS = 151_936
SHARDS = 5
LEAST = 0.9
"""Less than its weights would mean that memory is not measured. A few hundredths less is possible: the kernel
takes back pages of libraries, which were counted before, while the weights are read."""


@pytest.fixture
def fresh() -> Iterator[WorkerPool]:
    """Processes whose peak of memory is their own."""
    pool = WorkerPool(2)
    yield pool
    pool.close()


@pytest.fixture
def big_dir(tmp_path: Path) -> Iterator[Path]:
    """Weights of `BIG` in several files with an index, removed when the test is over."""
    shapes = FAMILIES["qwen2"].shapes(BIG) | {EMBEDDING: (ROWS, BIG.hidden_size)}
    files = write_shards(shapes, tmp_path, SHARDS)
    (tmp_path / "config.json").write_text(
        json.dumps(
            sizes(BIG) | {"model_type": "qwen2", "tie_word_embeddings": True, "vocab_size": ROWS}
        )
    )
    yield tmp_path
    for path in files:
        path.unlink()


def write_shards(shapes: Mapping[str, tuple[int, ...]], directory: Path, count: int) -> list[Path]:
    """bf16 tensors whose numbers follow from name and place."""
    names = list(shapes)
    weight_map, paths = {}, []
    for number in range(count):
        path = directory / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        own = names[number * len(names) // count : (number + 1) * len(names) // count]
        save_file({name: numbers(name, shapes[name]) for name in own}, path)
        weight_map |= dict.fromkeys(own, path.name)
        paths.append(path)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return paths


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """Small integers, which bf16 has exactly."""
    start = sum(name.encode()) % 97
    block = (torch.arange(start, start + 251) % 251 - 125).bfloat16()
    count = math.prod(shape)
    return block.repeat(count // 251 + 1)[:count].reshape(shape)


@pytest.mark.slow
def test_a_rank_takes_its_own_share_of_a_big_checkpoint(big_dir: Path, fresh: WorkerPool) -> None:
    """Bytes that are asked for, and host memory, on two ranks of 1.5 GB each."""
    language = replace(BIG, weights=str(big_dir))
    run = fresh.run(2, reading_runs.memory_of, ParallelConfig(tensor=2), language, timeout=900)
    padding = (BIG.vocab_size - ROWS) * BIG.hidden_size * 2
    on_disk = sum(path.stat().st_size for path in big_dir.glob("*.safetensors"))
    headers = 100_000
    assert 2e9 < on_disk < 4e9
    replicated = run[0].replicated
    assert on_disk + replicated - headers <= sum(each.asked for each in run) <= on_disk + replicated
    for each in run:
        logger.info("own=%d asked=%d peak=%.3f", each.own, each.asked, each.peak / each.own)
        assert each.asked <= each.own <= each.asked + padding
        assert LEAST * each.own <= each.peak <= 1.2 * each.own
        for wanted, found in each.sample.values():
            assert torch.equal(found, expected_of(wanted)[: len(found)]), wanted


def expected_of(wanted: GlobalSlice) -> Tensor:
    """The first numbers of a slice."""
    pieces = pieces_of(BIG, wanted)
    assert pieces is not None
    first = pieces[0]
    shape = {**FAMILIES["qwen2"].shapes(BIG), EMBEDDING: (ROWS, BIG.hidden_size)}[first.name]
    return numbers(first.name, shape)[first.index].flatten()[:64]


ENCODER = VisionConfig(
    kind="intern_vit_300m", num_layers=24, hidden_size=1024, num_heads=16, ffn_hidden_size=4096,
    tile_size=448, patch_size=14,
)  # fmt: skip


@pytest.mark.slow
def test_an_encoder_takes_its_own_memory_only(tmp_path: Path, fresh: WorkerPool) -> None:
    """InternViT-300M; built in fp32 first it took more than twice as much."""
    path = tmp_path / "model.safetensors"
    shapes = kind_of(ENCODER).shapes(ENCODER)
    save_file({name: numbers(name, shape) for name, shape in shapes.items()}, path)
    stored = encoder_sizes(ENCODER) | {"model_type": "internvl_vision"}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    ((own, peak),) = fresh.run(1, reading_runs.memory_of_encoder, tmp_path, ENCODER)
    logger.info("own=%d peak=%.3f", own, peak / own)
    assert own == sum(math.prod(shape) * 2 for shape in shapes.values())
    assert LEAST * own <= peak <= 1.2 * own
    path.unlink()
