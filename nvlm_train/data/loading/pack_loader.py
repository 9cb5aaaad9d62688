"""One pack: its samples read and encoded, and the pixels of this rank's tiles decoded.

Shape legend: T tiles, E tile edge in pixels, C = 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nvlm_train.batch import Microbatch, PackPlan, SampleRef
from nvlm_train.data.images import Pixels, cut_tiles, cut_tiles_into, decode_image
from nvlm_train.data.loading.collate import pack_samples
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.samples.encoded import EncodedSample
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.errors import ShardError


@dataclass(frozen=True)
class PackJob:
    """A pack to load: which of its tiles are this rank's, and where their pixels go."""

    pack: PackPlan
    length: int
    """Padding fills it up to this many tokens."""
    first_tile: int
    pixels_TCEE: Pixels


class ImageFailure(NamedTuple):
    """An image that could not be read."""

    sample: int
    """Index of its sample in the pack."""
    reason: str


@dataclass(frozen=True)
class LoadedPack:
    """A pack's text, and which of its images could not be read."""

    microbatch: Microbatch
    failures: tuple[ImageFailure, ...]
    """The first one of each sample."""


class PackLoader:
    """Loads packs. Thread-safe.

    Args:
        max_pixels: an image of more is a failure.
    """

    def __init__(self, plan: DataPlan, encoder: SampleEncoder, max_pixels: int) -> None:
        self._plan = plan
        self._encoder = encoder
        self._max_pixels = max_pixels

    def load(self, job: PackJob) -> LoadedPack:
        """Returns the text of the whole pack; pixels of this rank's tiles go into the round's tensor."""
        samples = job.pack.samples
        encoded = [self._encode(sample) for sample in samples]
        failures: dict[int, ImageFailure] = {}
        first = -job.first_tile  # the sample's first tile, counted from this rank's first
        for number, (sample, text) in enumerate(zip(samples, encoded, strict=True)):
            for image, num_tiles in enumerate(text.tiles_per_image):
                if first < len(job.pixels_TCEE) and first + num_tiles > 0:
                    reason = self._decode(sample, text, image, job.pixels_TCEE, first)
                    if reason:
                        failures.setdefault(number, ImageFailure(number, reason))
                first += num_tiles
        infos = [self._plan.info(sample) for sample in samples]
        pad = self._encoder.tokenizer.pad
        microbatch = pack_samples(encoded, infos, job.length, pad)
        return LoadedPack(microbatch, tuple(failures.values()))

    def _encode(self, sample: SampleRef) -> EncodedSample:
        reader = self._plan.reader(sample)
        raw = reader.sample(sample.row)
        encoded = self._encoder.encode(*raw)
        if (len(encoded.token_ids), encoded.num_tiles) != (sample.num_tokens, sample.num_tiles):
            raise ShardError(
                f"sample={raw.key} in shard={reader.name} has {len(encoded.token_ids)} tokens and "
                f"{encoded.num_tiles} tiles, planned were {sample.num_tokens} and "
                f"{sample.num_tiles}; delete the shard's .lengths-* files and start again"
            )
        return encoded

    def _decode(
        self, sample: SampleRef, text: EncodedSample, image: int, pixels_TCEE: Pixels, first: int
    ) -> str:
        """Writes the image's tiles that lie inside `pixels_TCEE`; on failure they stay zero.

        `first` is the index of the image's first tile, negative when another rank owns it.
        """
        reader = self._plan.reader(sample)
        data = reader.image(sample.row, image)
        num_tiles, grid = text.tiles_per_image[image], text.grids[image]
        last = min(first + num_tiles, len(pixels_TCEE))
        own_TCEE = pixels_TCEE[max(first, 0) : last]
        try:
            decoded_CHW = decode_image(data, self._max_pixels)
        except ValueError as error:
            own_TCEE[:] = 0
            return str(error)
        if len(own_TCEE) == num_tiles:
            cut_tiles_into(own_TCEE, decoded_CHW, grid)
        else:
            tiles_TCEE = cut_tiles(decoded_CHW, grid, num_tiles, self._encoder.spec.tile_size)
            own_TCEE[:] = tiles_TCEE[max(-first, 0) : last - first].numpy()
        return ""
