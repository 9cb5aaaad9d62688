"""Checks the weights that a recipe names as training does at its start, from headers and JSON only."""

from __future__ import annotations

from nvlm_train.config.schema import LanguageConfig, Recipe, VisionConfig
from nvlm_train.convert import check
from nvlm_train.doctor.finding import Findings, findings_of, ok
from nvlm_train.recipe.inspection import possible
from nvlm_train.recipe.sizes import shown


def check_weights(recipe: Recipe) -> Findings:
    """Checks that every tensor and every key of config.json of what the recipe names fits it."""
    for name, part, look in (
        ("vision", recipe.model.vision, check.vision),
        ("projector", recipe.model.projector, check.projector),
        ("language", recipe.model.language, check.language),
    ):
        yield ok("weights", f"model.{name}: {shown(part)}")
        problems = list(look(recipe))
        yield from findings_of("weights", problems)
        if part.weights is None:
            yield ok("weights", f"model.{name}: random weights, of seed={recipe.seed}")
        elif not problems:
            yield ok("weights", f"model.{name}.weights={part.weights}: config.json and tensors fit")
        fits = not any(problem.level == "error" for problem in problems)
        if fits and isinstance(part, VisionConfig | LanguageConfig):
            for line in possible(part):
                yield ok("weights", f"model.{name}: {line}")
