"""Samples of an indexed shard, read by offset and checked against the index."""

from __future__ import annotations

from isal.isal_zlib import crc32  # zlib's CRC-32, three times as fast

from nvlm_train.data.index.shard_index import ShardIndex
from nvlm_train.data.samples.records import RawSample
from nvlm_train.data.shards.fields import OWN_FIELDS, FieldMapping
from nvlm_train.data.shards.tar import Shard
from nvlm_train.errors import ShardError


class ShardReader:
    """Reads the samples of one shard, whose index it has. Thread-safe.

    `name` is the shard as the data recipe writes it: the same on machines with another data_root.
    """

    def __init__(
        self, name: str, shard: Shard, index: ShardIndex, fields: FieldMapping = OWN_FIELDS
    ) -> None:
        self.name = name
        self.shard = shard
        self.index = index
        self.fields = fields

    def key(self, row: int) -> str:
        """Returns the sample's key."""
        return str(self.index.keys[row])

    def sample(self, row: int) -> RawSample:
        """Reads the sample's record; of its images only the sizes are looked up.

        Raises:
            ValueError: see `record`; or an image whose header cannot be read.
            ShardError: the shard changed since it was indexed.
        """
        record = self.record(row)
        return RawSample(self.key(row), record, self.index.image_sizes(row))

    def record(self, row: int) -> bytes:
        """Reads KEY.json, or the record that the field mapping makes of other members.

        Raises:
            ValueError: the sample has none, or its members do not hold what the mapping names.
            ShardError: the shard changed since it was indexed.
        """
        contents: list[bytes] = []
        places = self.index.records[row].reshape(-1, 3).tolist()
        for member, (offset, size, crc) in zip(self.fields.members, places, strict=True):
            if size == 0:
                raise ValueError(
                    f"record is missing: there is no KEY.{member} (or it is empty) beside the "
                    "images; a data recipe's `fields` name other members"
                )
            contents.append(self._read(row, offset, size, crc))
        return self.fields.record(contents)

    def image(self, row: int, number: int) -> bytes:
        """Reads the file of the sample's image `number`. Raises ShardError: the shard changed."""
        image = self.index.image_rows(row)[number]
        offset, size, crc = self.index.images[image, :3].tolist()
        return self._read(row, offset, size, crc)

    def _read(self, row: int, offset: int, size: int, crc: int) -> bytes:
        try:
            data = self.shard.read(offset, size, self.index.stamp)
        except OSError as error:
            raise ShardError(
                f"shard={self.shard.path} cannot be read any more: {error}; "
                "restore it and start again"
            ) from error
        if len(data) != size or crc32(data) != crc:
            raise ShardError(
                f"changed shard={self.shard.path}: sample={self.key(row)} holds other bytes than "
                "were indexed; restore the shard, or delete its .index and start a new run"
            )
        return data
