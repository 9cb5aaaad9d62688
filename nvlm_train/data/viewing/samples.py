"""A sample as the model sees it: its tiles' pixels, their tags and routes, and its tokens.

Shape legend: T tiles of an image, thumbnail last; E tile edge in pixels; C = 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nvlm_train.batch import SampleRef
from nvlm_train.data.images import cut_tiles, decode_image
from nvlm_train.data.index.reader import ShardReader
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.sources import Source
from nvlm_train.data.samples.encoded import EncodedSample
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.viewing.token_runs import TokenRun, token_runs
from nvlm_train.errors import SampleError
from nvlm_train.routes import Route
from nvlm_train.tiling import Grid


@dataclass(frozen=True)
class ImageView:
    """One image of a sample, cut as the model gets it."""

    size: tuple[int, int]
    """(width, height) as stored, upright."""
    grid: Grid
    tiles_TCEE: NDArray[np.uint8]
    tags: tuple[str, ...]
    """T; empty texts where the stage has no tags."""
    routes: tuple[Route, ...]
    """T."""
    problem: str
    """The reason why the pixels could not be decoded: then the tiles are black and it is not trained."""


@dataclass(frozen=True)
class SampleView:
    """One sample of a source."""

    source: str
    shard: str
    key: str
    encoded: EncodedSample | None
    """The encoded sample; None when it cannot be used."""
    reason: str
    """The reason why it cannot be used; empty where it can."""
    images: tuple[ImageView, ...]
    runs: tuple[TokenRun, ...]


def view_sample(source: str, reader: ShardReader, row: int, encoder: SampleEncoder) -> SampleView:
    """Returns the sample with its pixels. Raises ShardError: the shard changed since it was indexed."""
    key = reader.key(row)
    try:
        raw = reader.sample(row)
        encoded = encoder.encode(*raw)
    except ValueError as error:
        return SampleView(source, reader.name, key, None, str(error), (), ())
    images = tuple(
        _view_image(reader.image(row, number), size, encoded, number, encoder)
        for number, size in enumerate(raw.sizes)
    )
    runs = tuple(token_runs(encoded, encoder.tokenizer))
    return SampleView(source, reader.name, key, encoded, "", images, runs)


def view_ref(plan: DataPlan, sample: SampleRef, encoder: SampleEncoder) -> SampleView:
    """Returns a planned sample with its pixels."""
    name = plan.source_names[sample.source]
    return view_sample(name, plan.reader(sample), sample.row, encoder)


def view_source(
    source: Source, keys: Sequence[str], count: int, encoder: SampleEncoder
) -> list[SampleView]:
    """Returns the samples with these keys, or the first `count` of the source.

    Raises:
        SampleError: a key that the source does not have.
    """
    places = [(reader, row) for reader in source.readers for row in range(len(reader.index))]
    if not keys:
        return [view_sample(source.name, reader, row, encoder) for reader, row in places[:count]]
    wanted = set(keys)
    by_key = {key: place for place in places if (key := place[0].key(place[1])) in wanted}
    for key in keys:
        if key not in by_key:
            near = ", ".join(reader.key(row) for reader, row in places[:3])
            raise SampleError(
                source.readers[0].name,
                key,
                f"source={source.name} has no such key; it has {near}, ...",
            )
    return [view_sample(source.name, *by_key[key], encoder) for key in keys]


def _view_image(
    data: bytes,
    size: tuple[int, int],
    encoded: EncodedSample,
    number: int,
    encoder: SampleEncoder,
) -> ImageView:
    image = encoded.images[number]
    grid, count = image.grid, image.num_tiles
    edge, problem = encoder.spec.tile_size, ""
    try:
        pixels_CHW = decode_image(data, encoder.spec.max_image_pixels)
        tiles_TCEE = cut_tiles(pixels_CHW, grid, count, edge).numpy()
    except ValueError as error:
        problem = str(error)
        tiles_TCEE = np.zeros((count, 3, edge, edge), dtype=np.uint8)
    tiles = encoder.format.tiles(image)
    tags, routes = tuple(tile.tag for tile in tiles), tuple(tile.route for tile in tiles)
    return ImageView(size, grid, tiles_TCEE, tags, routes, problem)
