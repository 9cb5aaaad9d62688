"""Trains the demo's vision encoder: a small InternViT that learns what each visual token shows.

It is trained through linear heads on the pixel-shuffled tokens, which are thrown away afterwards. They
read the character in a cell, and the shape and the colour of a drawing.

Shapes: N tiles, T = 16 visual tokens, C channels.
"""

import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.nn import functional
from transformers import InternVLVisionConfig, InternVLVisionModel

from nvlm_train.demo.backbones.muon import Muon
from nvlm_train.demo.backbones.twins import ILLEGIBLE, NUM_SLOTS, page_slots
from nvlm_train.demo.captions import COLOURS, SHAPES, read_captions, read_image_paths
from nvlm_train.demo.pages import LEGIBLE, render_page, render_strip

logger = logging.getLogger(__name__)

TILE = 64  # pixels
CONFIG = InternVLVisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=[TILE, TILE],
    patch_size=[8, 8],
    hidden_act="gelu",
    attention_bias=False,
    use_qk_norm=True,
    norm_type="rms_norm",
    layer_scale_init_value=0.1,
    use_absolute_position_embeddings=True,
    use_mean_pooling=True,  # transformers' name for: no norm after the last layer
    hidden_dropout_prob=0.0,
    attention_dropout=0.0,
    projection_dropout=0.0,
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHARS = LEGIBLE + ILLEGIBLE
IGNORED = -100
NOTHING = 0  # class of a tile without a drawing; shapes and colours count from 1
NUM_PAGES, NUM_STRIPS, NUM_DRAWINGS = 1500, 3000, 12000
BATCH, PEAK_LR, WARMUP_STEPS = 128, 2e-3, 30


@dataclass(frozen=True)
class LabelledTile:
    """Holds an RGB tile, the character class of each token, and the classes of a drawing."""

    pixels: np.ndarray  # uint8 [64, 64, 3]
    chars: list[int]
    shape: int
    colour: int


def cut_tiles(image: Image.Image, grid: tuple[int, int]) -> list[np.ndarray]:
    """Resizes an image to `grid` (columns, rows) of tiles and cuts it row by row: uint8 [64, 64, 3] each."""
    columns, rows = grid
    resized = image.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC)
    array = np.asarray(resized.convert("RGB")).reshape(rows, TILE, columns, TILE, 3)
    return list(array.swapaxes(1, 2).reshape(-1, TILE, TILE, 3))


def _text_tiles() -> Iterator[LabelledTile]:
    """Yields tiles and thumbnails of training pages, and strips."""
    for index in range(NUM_PAGES):
        page = render_page(index, "train")
        slots = page_slots(page.text, page.grid)
        for pixels, chars in zip(cut_tiles(page.image, page.grid), slots, strict=True):
            yield LabelledTile(pixels, [CHARS.index(c) for c in chars], NOTHING, NOTHING)
        if index % 2 == 0:
            illegible = [CHARS.index(ILLEGIBLE)] * NUM_SLOTS
            yield LabelledTile(cut_tiles(page.image, (1, 1))[0], illegible, NOTHING, NOTHING)
    for index in range(NUM_STRIPS):
        strip = render_strip(index, "train")
        classes = [CHARS.index(char) for char in strip.text.ljust(NUM_SLOTS)]
        yield LabelledTile(cut_tiles(strip.image, (1, 1))[0], classes, NOTHING, NOTHING)


@dataclass(frozen=True)
class Drawing:
    """Holds a drawing with the classes of its shape and its colour."""

    image: Image.Image
    shape: int
    colour: int


def draw_shape(rng: random.Random) -> Drawing:
    """Makes a drawing like those of easy-vqa."""
    image = Image.new("RGB", (TILE, TILE), tuple(rng.randint(228, 255) for _ in range(3)))
    shape, colour = rng.randrange(len(SHAPES)), rng.randrange(len(COLOURS))
    width, height = rng.randint(9, 33), rng.randint(9, 33)
    if SHAPES[shape] != "rectangle":
        height = width if SHAPES[shape] == "circle" else round(0.87 * width)
    x, y = rng.randint(-width // 4, TILE - width), rng.randint(-height // 4, TILE - height * 3 // 4)
    fill = "lime" if COLOURS[colour] == "green" else COLOURS[colour]  # easy-vqa's green
    draw = ImageDraw.Draw(image)
    if SHAPES[shape] == "circle":
        draw.ellipse((x, y, x + width, y + height), fill=fill)
    elif SHAPES[shape] == "rectangle":
        draw.rectangle((x, y, x + width, y + height), fill=fill)
    else:
        draw.polygon([(x, y + height), (x + width, y + height), (x + width / 2, y)], fill=fill)
    return Drawing(image, shape + 1, colour + 1)


def _drawing_tiles() -> Iterator[LabelledTile]:
    """Yields easy-vqa's training images with the classes that their captions name, and own drawings."""
    ignored = [IGNORED] * NUM_SLOTS
    paths = read_image_paths("train")
    for image_id, caption in read_captions().items():
        words = caption.split()
        shape = SHAPES.index(words[-1]) + 1 if words[-1] in SHAPES else IGNORED
        colour = COLOURS.index(words[1]) + 1 if words[1] in COLOURS else IGNORED
        pixels = cut_tiles(Image.open(paths[image_id]), (1, 1))[0]
        yield LabelledTile(pixels, ignored, shape, colour)
    rng = random.Random("drawings")
    for _ in range(NUM_DRAWINGS):
        drawing = draw_shape(rng)
        pixels = cut_tiles(drawing.image, (1, 1))[0]
        yield LabelledTile(pixels, ignored, drawing.shape, drawing.colour)


def normalise(pixels_NHWC: torch.Tensor) -> torch.Tensor:
    """Returns the encoder's input, fp32 [N, 3, 64, 64], for uint8 tiles."""
    scaled_NHWC = (pixels_NHWC.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return scaled_NHWC.permute(0, 3, 1, 2).contiguous()


def pixel_shuffle(hidden_NPC: torch.Tensor) -> torch.Tensor:
    """Joins 2 x 2 neighbours, row by row: patches [N, P, C] without class token to tokens [N, P / 4, 4C]."""
    tiles, patches, channels = hidden_NPC.shape
    side = math.isqrt(patches) // 2
    grid = hidden_NPC.reshape(tiles, side, 2, side, 2, channels).transpose(2, 3)
    return grid.reshape(tiles, side * side, 4 * channels)


class DenseHeads(nn.Module):
    """Reads character, shape and colour from every visual token. Used in training only."""

    def __init__(self) -> None:
        super().__init__()
        width = 4 * CONFIG.hidden_size
        self.norm = nn.LayerNorm(width)
        sizes = (len(CHARS), len(SHAPES) + 1, len(COLOURS) + 1)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    def forward(self, hidden_NPC: torch.Tensor) -> list[torch.Tensor]:
        """Returns logits [N, T, classes] of the three questions from the encoder's patches."""
        tokens_NTC = self.norm(pixel_shuffle(hidden_NPC))
        return [head(tokens_NTC) for head in self.heads]


def load_tiles() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns all training tiles, uint8 [N, 64, 64, 3], and their three kinds of labels [N, T]."""
    tiles = [*_text_tiles(), *_drawing_tiles()]
    pixels = torch.from_numpy(np.stack([tile.pixels for tile in tiles]))
    chars = torch.tensor([tile.chars for tile in tiles])
    per_tile = ([tile.shape for tile in tiles], [tile.colour for tile in tiles])
    return pixels, [chars, *(torch.tensor(v)[:, None].expand(-1, NUM_SLOTS) for v in per_tile)]


def _summary(logits: list[torch.Tensor], labels: list[torch.Tensor]) -> str:
    """Returns the accuracy of the three heads on one batch, as text."""
    shares = []
    for name, scores, wanted in zip(("char", "shape", "colour"), logits, labels, strict=True):
        known = wanted != IGNORED
        correct = (scores.argmax(-1) == wanted)[known].float().mean().item()
        shares.append(f"{name} {correct:.3f}")
    return " ".join(shares)


def _optimizers(model: InternVLVisionModel, heads: DenseHeads) -> list[torch.optim.Optimizer]:
    """Returns Muon for the layers' matrices and AdamW for everything else."""
    layers = list(model.encoder.parameters())
    matrices = [p for p in layers if p.ndim == 2]
    rest = [p for p in layers if p.ndim != 2]
    rest += [*model.embeddings.parameters(), *heads.parameters()]
    return [Muon(matrices, PEAK_LR), torch.optim.AdamW(rest, PEAK_LR, weight_decay=0.01)]


@torch.no_grad()
def heldout_accuracy(model: InternVLVisionModel, heads: DenseHeads, num_pages: int = 64) -> float:
    """Returns the share of characters on held-out pages that the character head reads correctly."""
    correct = count = 0
    for index in range(num_pages):
        page = render_page(index, "heldout")
        tiles = torch.from_numpy(np.stack(cut_tiles(page.image, page.grid)))
        read = heads(model(normalise(tiles)).last_hidden_state[:, 1:])[0].argmax(-1)
        slots = page_slots(page.text, page.grid)
        wanted = torch.tensor([[CHARS.index(char) for char in tile] for tile in slots])
        written = wanted != CHARS.index(" ")
        correct += int((read == wanted)[written].sum())
        count += int(written.sum())
    return correct / count


def train_vision(num_steps: int) -> tuple[InternVLVisionModel, DenseHeads]:
    """Trains the vision encoder from random weights. Returns it, and its heads for measuring."""
    torch.manual_seed(0)
    began = time.monotonic()
    pixels, labels = load_tiles()
    logger.info("vision: %d tiles ready (%.0f s)", len(pixels), time.monotonic() - began)
    model, heads = InternVLVisionModel(CONFIG), DenseHeads()
    optimizers = _optimizers(model, heads)
    for step in range(num_steps):
        chosen = torch.randint(len(pixels), (BATCH,))
        wanted = [label[chosen] for label in labels]
        hidden_NPC = model(normalise(pixels[chosen])).last_hidden_state[:, 1:]
        logits = heads(hidden_NPC)
        losses = [
            functional.cross_entropy(scores.flatten(0, 1), classes.flatten())
            for scores, classes in zip(logits, wanted, strict=True)
        ]
        torch.stack(losses).sum().backward()
        scale = (
            min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * scale
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == num_steps - 1:
            took = time.monotonic() - began
            logger.info("vision step %d %s (%.0f s)", step, _summary(logits, wanted), took)
    return model.eval(), heads.eval()
