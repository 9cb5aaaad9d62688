"""Weights and tokenizer: what training would refuse at its start, found from headers and JSON only."""

from __future__ import annotations

from collections.abc import Iterable

from nvlm_train.config.schema import Recipe
from nvlm_train.doctor.finding import Finding, Findings, ok
from nvlm_train.errors import ConfigError
from nvlm_train.foreign import check
from nvlm_train.foreign.problem import Problem
from nvlm_train.foreign.tokenizer import stage_tags, tag_problems
from nvlm_train.tokens import Tokenizer


def check_tokenizer(recipe: Recipe) -> Findings:
    """Control tokens are one id each and cannot be forged, tags survive a round trip, ids fit the table."""
    problems = list(check.tokenizer(recipe))
    yield from _findings("tokenizer", problems)
    try:
        tokenizer = Tokenizer(recipe.model.tokenizer)
    except ConfigError:
        return  # told above
    rows = recipe.model.language.vocab_size
    if tokenizer.vocab_size <= rows:
        yield ok("tokenizer", f"{tokenizer.vocab_size} ids fit model.language.vocab_size={rows}")
    for name in recipe.schedule:
        stage = recipe.stages[name]
        if any(tag_problems(name, stage, tokenizer)):
            continue
        lengths = [len(tokenizer.encode(tag)) for tag in stage_tags(stage, tokenizer)]
        shown = f"{min(lengths)} to {max(lengths)} tokens each" if lengths else "none"
        yield ok(
            "tokenizer",
            f"stage {name}: tile tags ({stage.tiling.tags}): {shown}, round trip exact",
        )


def check_weights(recipe: Recipe) -> Findings:
    """Every tensor and every key of config.json of both backbones is accounted for."""
    for name, part, look in (
        ("vision", recipe.model.vision, check.vision),
        ("language", recipe.model.language, check.language),
    ):
        problems = list(look(recipe))
        yield from _findings("weights", problems)
        if part.weights is None:
            yield ok("weights", f"model.{name}: random weights, of seed={recipe.seed}")
        elif not problems:
            yield ok("weights", f"model.{name}.weights={part.weights}: config.json and tensors fit")


def _findings(name: str, problems: Iterable[Problem]) -> Findings:
    for problem in problems:
        yield Finding(name, problem.level, problem.text, problem.remedy)
