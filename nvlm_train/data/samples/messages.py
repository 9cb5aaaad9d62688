"""The messages of a sample, and which of them shows its images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nvlm_train.tokens import IMAGE_MARKER

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """The words of one side. `<image>` in a user's text stands for one image."""

    role: Role
    text: str


def place_images(messages: tuple[Message, ...], num_images: int) -> tuple[Message, ...]:
    """Checks that markers and images match; without any marker the first user message gets them all.

    Raises:
        ValueError: numbers that differ, or a marker outside a user's message.
    """
    for message in messages:
        if message.role != "user" and IMAGE_MARKER in message.text:
            raise ValueError(
                f"image marker in {message.role} turn: {IMAGE_MARKER} belongs into user turns; "
                "remove it"
            )
    markers = sum(message.text.count(IMAGE_MARKER) for message in messages)
    if markers == num_images:
        return messages
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
    first = next(
        (number for number, message in enumerate(messages) if message.role == "user"), None
    )
    if first is None:
        raise ValueError("image without image marker: there is no user turn to show the image in")
    opened = Message("user", f"{IMAGE_MARKER}\n" * num_images + messages[first].text)
    return (*messages[:first], opened, *messages[first + 1 :])
