"""Checks the weights that a recipe names as training does at its start, from headers and JSON only."""

from __future__ import annotations

from nvlm_train.config.model_schema import LanguageConfig, ProjectorConfig, VisionConfig
from nvlm_train.config.schema import Recipe
from nvlm_train.convert import check
from nvlm_train.doctor.finding import Findings, findings_of, ok
from nvlm_train.recipe.inspection import possible
from nvlm_train.recipe.sizes import SIZES, shown


def check_weights(recipe: Recipe) -> Findings:
    """Checks that every tensor and every key of config.json of what the recipe names fits it."""
    for name, part, look in (
        ("vision", recipe.model.vision, check.vision),
        ("projector", recipe.model.projector, check.projector),
        ("language", recipe.model.language, check.language),
    ):
        problems = list(look(recipe))
        yield from findings_of("weights", problems)
        sizes = _sizes(name, part)
        if part.weights is None:
            yield ok("weights", f"model.{name}: random weights, of seed={recipe.seed}; {sizes}")
        elif not problems:
            fit = f"model.{name}.weights={part.weights}: config.json and tensors fit"
            yield ok("weights", f"{fit}; {sizes}")


def _sizes(name: str, part: VisionConfig | ProjectorConfig | LanguageConfig) -> str:
    """Tells the sizes of a part and what it can be used with, as `nvlm convert inspect` does."""
    if isinstance(part, ProjectorConfig):
        return shown(part, ["ffn_hidden_size", "norm_eps"])
    return "; ".join([shown(part, SIZES[f"model.{name}"]), *possible(part)])
