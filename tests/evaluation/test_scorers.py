"""Scores on answers whose score is plain to see."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvlm_train.evaluation.scorers import (
    character_error_rate,
    edit_distance,
    exact_match,
    normalise_answer,
)


def test_exact_match_forgives_case_space_and_a_full_stop() -> None:
    assert exact_match([" Yes.", "blue  circle", "no"], ["yes", "Blue circle", "yes"]) == 2 / 3
    assert normalise_answer("A  big\ndog.") == "a big dog"


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("a", "a", 0)],
)
def test_edit_distance(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == distance


short = st.text("ab c", max_size=8)


@given(short, short, short)
def test_edit_distance_is_a_distance(a: str, b: str, c: str) -> None:
    assert edit_distance(a, b) == edit_distance(b, a)
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)


def test_character_errors_are_counted_over_all_pairs() -> None:
    assert character_error_rate(["abcd", "x"], ["abcd", "y"]) == pytest.approx(1 / 5)
    assert character_error_rate(["a \n b"], ["a b"]) == 0
    assert character_error_rate(["much too long"], ["m"]) == 12


@pytest.mark.parametrize("score", [exact_match, character_error_rate])
def test_scores_want_one_answer_for_each_reference(score) -> None:
    with pytest.raises(ValueError, match="longer"):
        score(["a"], ["a", "b"])
