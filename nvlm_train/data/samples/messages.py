"""What is said about a sample's images, turn by turn, and which turn shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nvlm_train.tokens import IMAGE_MARKER

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says. `<image>` in a user's text stands for one image."""

    role: Role
    text: str


def place_images(turns: tuple[Turn, ...], num_images: int) -> tuple[Turn, ...]:
    """Checks that markers and images match; without any marker the first user turn gets them all.

    Raises:
        ValueError: numbers that differ, or a marker outside a user's turn.
    """
    for turn in turns:
        if turn.role != "user" and IMAGE_MARKER in turn.text:
            raise ValueError(
                f"image marker in {turn.role} turn: {IMAGE_MARKER} belongs into user turns; "
                "remove it"
            )
    markers = sum(turn.text.count(IMAGE_MARKER) for turn in turns)
    if markers == num_images:
        return turns
    if markers > num_images:
        raise ValueError(
            f"image marker without image: the text has {markers} {IMAGE_MARKER} and the sample has "
            f"{num_images} images; add the image members or remove the markers"
        )
    if markers:
        raise ValueError(
            f"image without image marker: the text has {markers} {IMAGE_MARKER} and the sample has "
            f"{num_images} images; write one marker for each image, or none at all"
        )
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise ValueError("image without image marker: there is no user turn to show the image in")
    opened = Turn("user", f"{IMAGE_MARKER}\n" * num_images + turns[first].text)
    return (*turns[:first], opened, *turns[first + 1 :])
