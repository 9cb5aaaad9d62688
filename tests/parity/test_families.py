"""What language families differ in, in every layout: head size, QK-norm, RoPE scaling, tied tables."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from nvlm_train.config.model_schema import LanguageConfig, RopeScalingConfig
from nvlm_train.config.schema import ParallelConfig
from tests.parity import cross_gradients, gradients, tied
from tests.parity.recipes import LANGUAGE, MODEL, STEPS
from tests.parity.test_layouts import TOLERANCE, worst_error
from tests.workers import WorkerPool

STRETCH = RopeScalingConfig("llama3", factor=8.0, original_max_positions=32)
LANGUAGES: dict[str, LanguageConfig] = {
    "QK-norm, large heads": replace(LANGUAGE, head_dim=24, qk_norm=True, qkv_bias=False),
    "tied": replace(LANGUAGE, tied_embeddings=True),
    "stretched RoPE": replace(LANGUAGE, rope_scaling=STRETCH, qkv_bias=False),
    # At TP2 the second rank has 59 tokens and 133 rows of padding.
    "padded vocabulary": replace(LANGUAGE, vocab_size=384, num_tokens=251),
}
LAYOUTS = {
    "TP2 SP": (2, ParallelConfig(tensor=2, sequence_parallel=True)),
    "TP2 PP2": (4, ParallelConfig(tensor=2, pipeline=2)),
    "PP2 DP2 without overlap": (4, ParallelConfig(pipeline=2, overlap_grad_reduce=False)),
}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(each, marks=[] if each == "TP2 PP2" else pytest.mark.slow) for each in LAYOUTS],
)
@pytest.mark.parametrize("language", LANGUAGES)
def test_gradients_do_not_depend_on_layout(workers: WorkerPool, language: str, layout: str) -> None:
    model = replace(MODEL, language=LANGUAGES[language])
    run = partial(gradients.gradients_of_step, model=model)
    world, parallel = LAYOUTS[layout]
    losses, expected = workers.run(1, run, ParallelConfig(), STEPS)[0]
    found_losses, found = workers.run(world, run, parallel, STEPS)[0]
    assert found_losses == pytest.approx(losses, rel=1e-6)
    assert worst_error(found, expected) < TOLERANCE
    assert all(value.abs().max() > 0 for value in expected[0].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["x with large heads", "h with large heads", "flamingo with large heads"]
)
def test_cross_attention_has_heads_of_the_same_size(workers: WorkerPool, name: str) -> None:
    run = partial(cross_gradients.gradients_of_steps, name)
    _, expected = workers.run(1, run, ParallelConfig())[0]
    _, found = workers.run(4, run, ParallelConfig(tensor=2, pipeline=2))[0]
    assert worst_error(found, expected) < TOLERANCE


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2, pipeline=2),
        pytest.param(ParallelConfig(pipeline=2, overlap_grad_reduce=False), marks=pytest.mark.slow),
    ],
    ids=["TP2 PP2", "PP2 DP2 without overlap"],
)
def test_both_copies_of_a_tied_table_stay_equal(
    workers: WorkerPool, parallel: ParallelConfig
) -> None:
    """After three steps with updates they are equal bit for bit, and close to what one process has."""
    copies = workers.run(4, tied.copies_after_steps, parallel, 3)[0]
    (alone,) = workers.run(1, tied.copies_after_steps, ParallelConfig(), 3)[0]
    assert len(copies) == 2 and torch.equal(*copies)
    torch.testing.assert_close(copies[0], alone, rtol=0, atol=1e-4)


def test_the_copies_differ_when_their_gradients_are_not_summed(workers: WorkerPool) -> None:
    first, last = workers.run(4, tied.copies_without_a_sum, ParallelConfig(pipeline=2), 3)[0]
    assert not torch.equal(first, last)


def test_a_tied_table_is_counted_once(workers: WorkerPool) -> None:
    """Gradient norms of two copies are those of one table."""
    run = partial(gradients.losses_of_training, model=replace(MODEL, language=LANGUAGES["tied"]))
    losses, norms = workers.run(1, run, ParallelConfig(), 3)[0]
    split_losses, split_norms = workers.run(2, run, ParallelConfig(pipeline=2), 3)[0]
    assert split_losses == pytest.approx(losses, rel=1e-5)
    assert split_norms == pytest.approx(norms, rel=1e-5)
