"""Lets the model answer a few samples of the stage, and shows their images as the model sees them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nvlm_train.config.schema import Recipe
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.evaluation.generate import Prompt, generate
from nvlm_train.evaluation.prompts import encode_messages
from nvlm_train.tiling import Grid
from nvlm_train.tokens import IMAGE_MARKER
from nvlm_train.train.engine import Engine

logger = logging.getLogger(__name__)

_LOOKED_AT = 64
"""Number of the stage's first draws among which examples are looked for."""
_GAP = 4
"""Pixels between tiles that are shown side by side."""


@dataclass(frozen=True)
class Example:
    """Holds one row of the table of answers."""

    source: str
    key: str
    question: str
    reference: str
    answer: str
    tags: str
    tiles_HWC: NDArray[np.uint8]
    """All tiles side by side, each image on its own rows; empty for text."""


@dataclass(frozen=True)
class _Question:
    prompt: Prompt
    row: Example


class ExampleSet:
    """Holds the first samples of a stage that have images. All ranks make the same set and use it together.

    It draws nothing from the random number generators and does not change the model, so a run with
    examples has the losses of a run without them.
    """

    def __init__(self, recipe: Recipe, stage: str, plan: DataPlan, encoder: SampleEncoder) -> None:
        self._settings, self._stage = recipe.tracking, stage
        self._num_steps = recipe.stages[stage].steps
        self._encoder = encoder
        wanted = self._settings.num_examples if self._settings.wandb != "off" else 0
        found = _questions(plan, encoder, self._settings.example_tokens) if wanted else iter(())
        self._questions = list(islice(found, wanted))

    def is_due(self, step: int) -> bool:
        """Returns whether to answer after `step` steps: at the stage's end, and at the recipe's interval."""
        every = self._settings.examples_every
        due = step == self._num_steps or (every is not None and step % every == 0)
        return due and bool(self._questions)

    def answer(self, engine: Engine) -> list[Example]:
        """Returns the present model's answers, on every rank. Called by all ranks."""
        tokenizer = self._encoder.tokenizer
        prompts = [question.prompt for question in self._questions]
        engine.whole_model()  # Replicas answer different packs, and would gather in different orders.
        engine.model.eval()
        try:
            ids = generate(
                engine.replica, prompts, self._settings.example_tokens, tokenizer.turn_end
            )
        finally:
            engine.model.train()
        answers = [tokenizer.decode(each).strip() for each in ids]
        rows = [question.row for question in self._questions]
        return [replace(row, answer=text) for row, text in zip(rows, answers, strict=True)]


def _questions(plan: DataPlan, encoder: SampleEncoder, room: int) -> Iterator[_Question]:
    """Yields each of the stage's first samples that fits, once; those without images come last.

    Args:
        plan: the stage's.
        encoder: how the stage encodes samples.
        room: tokens that the answer may have.
    """
    draws = dict.fromkeys(plan.draws(0, _LOOKED_AT))
    for sample in sorted(draws, key=lambda draw: draw.num_tiles == 0):
        reader = plan.reader(sample)
        messages = encoder.messages(*reader.sample(sample.row))
        first = [message.role for message in messages].index("assistant")
        asked = messages[:first]
        num_images = sum(message.text.count(IMAGE_MARKER) for message in asked)
        images = [reader.image(sample.row, number) for number in range(num_images)]
        try:
            prompt = encode_messages(encoder, asked, images, room)
        except ValueError as error:
            logger.info("sample=%s is no example: %s", reader.key(sample.row), error)
            continue
        encoded = prompt.encoded
        row = Example(
            source=plan.sources[sample.source].name,
            key=reader.key(sample.row),
            question="\n".join(message.text for message in asked),
            reference=messages[first].text,
            answer="",
            tags=" ".join(
                tile.tag for image in encoded.images for tile in encoder.format.tiles(image)
            ),
            tiles_HWC=lay_out(prompt.tiles_TCEE, encoded.grids, encoded.tiles_per_image),
        )
        yield _Question(prompt, row)


def lay_out(tiles_TCEE: Tensor, grids: Sequence[Grid], counts: Sequence[int]) -> NDArray[np.uint8]:
    """Lays tiles out as they lie in their images.

    Images are below each other. A thumbnail is right of its image's tiles. Gaps are white.

    Args:
        tiles_TCEE: uint8 [T, 3, E, E], image after image.
        grids: (columns, rows) of each image.
        counts: tiles of each image, thumbnail included.

    Returns:
        uint8 [H, W, 3]; empty when there are no images.
    """
    edge = tiles_TCEE.shape[-1] + _GAP
    columns = [
        grid[0] + (count > grid[0] * grid[1]) for grid, count in zip(grids, counts, strict=True)
    ]
    rows = [grid[1] for grid in grids]
    if not columns:
        return np.zeros((0, 0, 3), dtype=np.uint8)
    canvas = np.full((sum(rows) * edge - _GAP, max(columns) * edge - _GAP, 3), 255, dtype=np.uint8)
    tiles = iter(tiles_TCEE.permute(0, 2, 3, 1).numpy())
    top = 0
    for grid, count in zip(grids, counts, strict=True):
        for number in range(count):
            is_regular = number < grid[0] * grid[1]
            row, column = divmod(number, grid[0]) if is_regular else (0, grid[0])
            y, x = (top + row) * edge, column * edge
            canvas[y : y + edge - _GAP, x : x + edge - _GAP] = next(tiles)
        top += grid[1]
    return canvas
