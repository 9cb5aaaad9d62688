"""Mappings become dataclasses: what is accepted, and what is said about the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from nvlm_train.config.build import build
from nvlm_train.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    rate: float
    count: int = 1


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    mode: Literal["off", "on"] = "off"
    parts: tuple[str, ...] = ()
    weights: str | None = None
    by_name: Mapping[str, Inner] = field(default_factory=dict)
    flag: bool = False


def problems_of(raw: object, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(Outer, raw, **options)
    return list(caught.value.problems)


def test_builds_nested_values() -> None:
    raw = {
        "name": "a",
        "inner": {"rate": 1},
        "parts": ["x", "y"],
        "by_name": {"k": {"rate": "1e-4", "count": 2}},
        "weights": None,
    }
    built = build(Outer, raw)
    assert built == Outer(
        "a", Inner(1.0), parts=("x", "y"), by_name={"k": Inner(1e-4, 2)}, weights=None
    )
    assert type(built.inner.rate) is float


def test_bare_off_of_yaml_is_the_choice_off() -> None:
    assert build(Outer, {"name": "a", "inner": {"rate": 1.0}, "mode": False}).mode == "off"


def test_reports_every_problem_at_once() -> None:
    raw = {
        "name": 3,
        "inner": {"rat": 1.0, "count": 1.5},
        "mode": "onn",
        "parts": "xy",
        "flag": 1,
    }
    assert problems_of(raw) == [
        "name=3 (int) has the wrong type; give a string",
        "inner.rat=1.0 is an unknown key; did you mean rate?",
        "inner.rate is missing; state a number for it",
        "inner.count=1.5 (float) has the wrong type; give a whole number",
        "mode=onn is not one of off, on; use on",
        "parts=xy (str) has the wrong type; give a list",
        "flag=1 (int) has the wrong type; give true or false",
    ]


def test_unknown_key_without_a_near_one_lists_the_known() -> None:
    (problem,) = problems_of({"name": "a", "inner": {"rate": 1.0, "zzz": 0}})
    assert problem == "inner.zzz=0 is an unknown key; known keys: rate, count"


def test_true_is_no_number() -> None:
    (problem,) = problems_of({"name": "a", "inner": {"rate": 1.0, "count": True}})
    assert "inner.count=True (bool) has the wrong type" in problem


def test_question_marks_and_null_are_missing_values() -> None:
    assert problems_of({"name": "???", "inner": None}) == [
        "name is missing; state a string for it",
        "inner=null has the wrong type; give a mapping with the keys rate, count",
    ]


def test_names_the_file_and_the_prefix() -> None:
    raw = {"name": "a", "inner": {"rate": "fast"}}
    found = problems_of(raw, path="blend", origin={"blend.inner.rate": "here.yaml"}.get)
    assert found == [
        "blend.inner.rate=fast (str) has the wrong type (stated in here.yaml); give a number"
    ]


@pytest.mark.parametrize("raw", [float("nan"), float("inf"), "nan", "-inf", "1e999", 10**400])
def test_no_number_is_infinite_or_none_at_all(raw: object) -> None:
    """Every rule compares numbers, and NaN is neither below nor above a limit."""
    (problem,) = problems_of({"name": "a", "inner": {"rate": raw}})
    assert problem.startswith("inner.rate=") and "is not finite; give a finite number" in problem


@dataclass(frozen=True)
class Words:
    kept: Literal["none", "full"] | tuple[Literal["norms", "mlp"], ...] = "none"


def test_a_choice_of_words_or_a_list_of_others() -> None:
    assert [build(Words, {"kept": each}).kept for each in ("full", ["mlp", "norms"], [])] == [
        "full",
        ("mlp", "norms"),
        (),
    ]


def test_neither_a_word_nor_a_list_is_refused_with_both() -> None:
    """So is `recompute=selective`, which older recipes have."""
    for raw in ("selective", "mlp", None, True):
        with pytest.raises(ConfigError) as caught:
            build(Words, {"kept": raw})
        assert str(caught.value).endswith(
            "is neither one of none, full nor a list; use none, full or a list of these: norms, mlp"
        )
    with pytest.raises(ConfigError, match=r"kept\[1\]=mpl is not one of norms, mlp; use mlp"):
        build(Words, {"kept": ["norms", "mpl"]})
