"""Makes prompts for `generate` from questions and images."""

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
    """Makes a prompt of one user message, tiled and encoded as in training.

    Args:
        encoder: that of the stage in which the model was trained; its system message is used.
        question: may hold `<image>` markers; without them the images come first.
        images: contents of image files.
        max_new_tokens: tokens that are kept free for the answer.

    Raises:
        ValueError: an image cannot be read, or the prompt does not fit.
    """
    return encode_messages(encoder, [Message("user", question)], images, max_new_tokens)


def encode_messages(
    encoder: SampleEncoder,
    messages: Sequence[Message],
    images: Sequence[bytes],
    max_new_tokens: int,
) -> Prompt:
    """Makes a prompt of several messages. The last one is a user's; see `make_prompt` for the rest."""
    import torch

    sizes = [read_size(image) for image in images]
    encoded = encoder.encode_prompt(messages, sizes, max_new_tokens)
    edge = encoder.spec.tile_size
    tiles: list[Tensor] = [torch.zeros(0, 3, edge, edge, dtype=torch.uint8)]
    for image, grid, num_tiles in zip(images, encoded.grids, encoded.tiles_per_image, strict=True):
        pixels = decode_image(image, encoder.spec.max_image_pixels)
        tiles.append(cut_tiles(pixels, grid, num_tiles, edge))
    return Prompt(encoded, torch.cat(tiles))
