"""The same answers in every layout, and for text the answers of transformers' greedy search."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvlm_train.config.schema import ParallelConfig
from tests.evaluation import answers
from tests.workers import WorkerPool

LAYOUTS = {
    "TP2": (2, ParallelConfig(tensor=2)),
    "PP2": (2, ParallelConfig(pipeline=2)),
    "DP2": (2, ParallelConfig()),
    "TP2 SP PP2": (4, ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)),
}
SIZES = [(12, 0), (20, 2), (7, 1), (40, 0), (30, 3), (9, 0), (5, 1)]
"""(text tokens, tiles): more than one pack, with and without images."""
NEW_TOKENS = 6
NO_END = -1


@pytest.fixture(scope="module")
def single(workers: WorkerPool, qwen2_dir: Path) -> list[list[int]]:
    prompts = answers.make_prompts(SIZES)
    return workers.run(1, answers.answer, ParallelConfig(), qwen2_dir, prompts, NEW_TOKENS, NO_END)[
        0
    ]


def test_text_is_answered_as_transformers_does(
    qwen2: torch.nn.Module, single: list[list[int]]
) -> None:
    for number, (_, tiles) in enumerate(SIZES):
        if tiles:
            continue
        ids = torch.from_numpy(answers.make_prompts(SIZES)[number].encoded.token_ids)[None]
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                following = qwen2(ids).logits[:, -1:].argmax(dim=-1)
            ids = torch.cat([ids, following], dim=1)
        assert single[number] == ids[0, -NEW_TOKENS:].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_answers_do_not_depend_on_layout(
    workers: WorkerPool, qwen2_dir: Path, single: list[list[int]], layout: str
) -> None:
    world, parallel = LAYOUTS[layout]
    prompts = answers.make_prompts(SIZES)
    found = workers.run(world, answers.answer, parallel, qwen2_dir, prompts, NEW_TOKENS, NO_END)
    assert all(own == single for own in found)
    assert len({tuple(own) for own in single}) == len(SIZES), "equal answers would prove little"


def test_answers_depend_on_the_pixels(
    workers: WorkerPool, qwen2_dir: Path, single: list[list[int]]
) -> None:
    prompts = answers.make_prompts(SIZES, pixel_seed=1)
    found = workers.run(
        1, answers.answer, ParallelConfig(), qwen2_dir, prompts, NEW_TOKENS, NO_END
    )[0]
    for number, (_, tiles) in enumerate(SIZES):
        assert (found[number] == single[number]) == (tiles == 0)


def test_an_end_token_ends_one_answer_only(
    workers: WorkerPool, qwen2_dir: Path, single: list[list[int]]
) -> None:
    """Each answer stops where its end token was. Fewer prompts than data-parallel ranks are fine."""
    end = single[0][2]
    prompts = answers.make_prompts(SIZES)
    found = workers.run(1, answers.answer, ParallelConfig(), qwen2_dir, prompts, NEW_TOKENS, end)[0]
    assert found == [own[: own.index(end)] if end in own else own for own in single]
    assert len(found[0]) < NEW_TOKENS
    alone = workers.run(
        2, answers.answer, ParallelConfig(), qwen2_dir, prompts[:1], NEW_TOKENS, NO_END
    )
    assert alone == [single[:1]] * 2


def test_no_room_for_the_answer(workers: WorkerPool, qwen2_dir: Path) -> None:
    prompts = answers.make_prompts([(10, 0), (85, 0)])
    for message in workers.run(2, answers.refusal, qwen2_dir, prompts, 12):
        assert message == (
            "prompt=1: 85 tokens and max_new_tokens=12 do not fit sequence_length=96; "
            "shorten the prompt or lower max_new_tokens"
        )


def test_argmax_over_a_sharded_vocabulary(workers: WorkerPool) -> None:
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    for found in workers.run(2, answers.argmax_of_slices, logits):
        assert torch.equal(found, logits.argmax(dim=-1))
