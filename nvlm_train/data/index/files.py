"""Where what is known of a shard is kept: beside it, or in a directory of its own."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from nvlm_train.data.index.array_file import ArrayFile, open_arrays, read_facts, write_arrays
from nvlm_train.data.shards.tar import Shard, is_remote

_log = logging.getLogger(__name__)
_warned_directories: set[str] = set()


@dataclass(frozen=True)
class IndexFiles:
    """Files that belong to shards: `SHARD.tar.index`, `SHARD.tar.lengths-ENCODING`, ..."""

    directory: str | None = None
    """None: beside each shard, or beside the node's copy of a remote one, or nowhere."""

    def path(self, shard: Shard, suffix: str) -> Path | None:
        """Where the shard's file with this suffix lies; None for a remote shard without directory."""
        if self.directory is not None:
            # Shards of two directories may have the same name.
            place = hashlib.sha256(shard.path.encode()).hexdigest()[:16]
            return Path(self.directory) / f"{place}-{os.path.basename(shard.path)}{suffix}"
        beside = shard.sibling(suffix)
        return None if is_remote(beside) else Path(beside)

    def facts(self, shard: Shard, suffix: str) -> dict[str, Any] | None:
        """What the file's header says; None when the file is missing or damaged."""
        path = self.path(shard, suffix)
        if path is None:
            return None
        try:
            return read_facts(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _warn_damaged(path, error)
            return None

    def open(self, shard: Shard, suffix: str) -> ArrayFile | None:
        """The file, mapped; None when it is missing or damaged."""
        path = self.path(shard, suffix)
        if path is None:
            return None
        try:
            return open_arrays(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _warn_damaged(path, error)
            return None

    def write(
        self,
        shard: Shard,
        suffix: str,
        facts: Mapping[str, Any],
        arrays: Mapping[str, NDArray[Any]],
    ) -> None:
        """Stores the file, whole or not at all.

        Where nothing can be written (a read-only directory, a remote store) what it would hold
        stays in memory, which one warning per directory says.
        """
        path = self.path(shard, suffix)
        try:
            if path is None:
                raise PermissionError("not a local directory")
            if self.directory is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(path, facts, arrays)
        except OSError as error:
            place = os.path.dirname(shard.path) if self.directory is None else self.directory
            if place not in _warned_directories:
                _warned_directories.add(place)
                _log.warning(
                    "cannot write %s (%s); indexes stay in memory",
                    f"beside the shards in {place}" if self.directory is None else f"in {place}",
                    error,
                )


def _warn_damaged(path: Path, error: Exception) -> None:
    _log.warning("cache=%s cannot be read (%s); it is made anew", path, error)
