"""All of it for a recipe: what `nvlm doctor` reports, training refuses by the same functions."""

from __future__ import annotations

from pathlib import Path

from nvlm_train.config.schema import Recipe
from nvlm_train.convert.language import language_problems
from nvlm_train.convert.problem import Problems, warning
from nvlm_train.convert.tokenizer import tokenizer_and_weights, tokenizer_problems
from nvlm_train.convert.vision import kind_problems, vision_problems
from nvlm_train.convert.whole.projector import projector_problems


def all_of(recipe: Recipe) -> Problems:
    """The tokenizer, the weights of the encoder, the projector and the language model."""
    yield from tokenizer(recipe)
    yield from vision(recipe)
    yield from projector(recipe)
    yield from language(recipe)


def tokenizer(recipe: Recipe) -> Problems:
    """The tokenizer against the recipe's model, and against the weights that training starts from."""
    yield from tokenizer_problems(recipe)
    directory = recipe.model.language.weights
    if directory is not None and Path(directory).is_dir():
        yield from tokenizer_and_weights(recipe)


def vision(recipe: Recipe) -> Problems:
    """The vision encoder's kind, and its weights, where the recipe names some."""
    unknown = list(kind_problems(recipe.model.vision))
    yield from unknown
    if not unknown and recipe.model.vision.weights is not None:
        yield from vision_problems(recipe.model.vision)


def projector(recipe: Recipe) -> Problems:
    """The projector's weights, where the recipe names some. A checkpoint replaces them, too."""
    if recipe.model.projector.weights is None:
        return
    gone = list(_gone(recipe, "model.projector.weights", recipe.model.projector.weights))
    yield from gone or projector_problems(recipe.model)


def language(recipe: Recipe) -> Problems:
    """The language model's weights, where the recipe names some.

    A run that has a checkpoint reads its weights from there, and may go on without the others.
    """
    directory = recipe.model.language.weights
    if directory is None:
        return
    lengths = {name: recipe.stages[name].sequence_length for name in recipe.schedule}
    gone = list(_gone(recipe, "model.language.weights", directory))
    yield from gone or language_problems(recipe.model.language, lengths)


def _gone(recipe: Recipe, field: str, directory: str) -> Problems:
    """A directory that is not there, and that a run with a checkpoint does not need."""
    if not Path(directory).exists() and _has_checkpoint(recipe):
        yield warning(
            f"{field}={directory} is not there; the run has a checkpoint to go on from",
            "nothing, unless the run is to start anew",
        )


def _has_checkpoint(recipe: Recipe) -> bool:
    """Whether the run has a complete checkpoint."""
    return any(Path(recipe.run_dir).glob("checkpoints/*/manifest.json"))
