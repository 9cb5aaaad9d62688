"""Questions about images as prompts for `generate`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nvlm_train.data.images import cut_tiles, decode_image, read_size
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.samples.messages import Message
from nvlm_train.evaluation.generate import Prompt


def make_prompt(
    encoder: SampleEncoder, question: str, images: Sequence[bytes], max_new_tokens: int
) -> Prompt:
    """Returns one user message, tiled and encoded as in training.

    Args:
        encoder: of the stage that the model was trained in; its system message is used.
        question: may hold `<image>` markers; without any the images come first.
        images: image files.
        max_new_tokens: room that is kept for the answer.

    Raises:
        ValueError: an image that cannot be read, or a prompt that does not fit.
    """
    return encode_messages(encoder, [Message("user", question)], images, max_new_tokens)


def encode_messages(
    encoder: SampleEncoder,
    messages: Sequence[Message],
    images: Sequence[bytes],
    max_new_tokens: int,
) -> Prompt:
    """Returns messages to answer, the last one a user's; see `make_prompt`."""
    import torch

    sizes = [read_size(image) for image in images]
    encoded = encoder.encode_prompt(messages, sizes, max_new_tokens)
    edge = encoder.spec.tile_size
    tiles: list[Tensor] = [torch.zeros(0, 3, edge, edge, dtype=torch.uint8)]
    for image, grid, num_tiles in zip(images, encoded.grids, encoded.tiles_per_image, strict=True):
        pixels = decode_image(image, encoder.spec.max_image_pixels)
        tiles.append(cut_tiles(pixels, grid, num_tiles, edge))
    return Prompt(encoded, torch.cat(tiles))
