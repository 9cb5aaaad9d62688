"""Where shards come from: a directory or URL below which they have names, and a node's copies."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nvlm_train.data.shards.cache import CachedShard, ShardCache
from nvlm_train.data.shards.remote import RemoteShard
from nvlm_train.data.shards.retry import RetryPolicy
from nvlm_train.data.shards.tar import LocalShard, Shard, is_remote

if TYPE_CHECKING:
    from nvlm_train.config.schema import LoaderConfig


@dataclass(frozen=True)
class Store:
    """Opens shards by name: a path or fsspec URL, or the rest of one below the root.

    Remote shards are read through the cache where there is one.
    """

    root: str = ""
    """Directory or URL in which relative names start; "" is the working directory."""
    retry: RetryPolicy = RetryPolicy()
    cache: ShardCache | None = None

    def path(self, name: str) -> str:
        """Returns where the name leads: absolute paths and URLs stay what they are."""
        if is_remote(name) or os.path.isabs(name):
            return name
        if is_remote(self.root):
            return f"{self.root.rstrip('/')}/{name}"
        return os.path.join(self.root, name)

    def read(self, name: str) -> bytes:
        """Reads a whole file that lies with the shards; the cache keeps no copy of it.

        Raises:
            FileNotFoundError: there is no such file.
            ShardError: unknown protocol, or a remote file that cannot be read.
        """
        with replace(self, cache=None).open(name).open() as stream:
            return stream.read()

    def open(self, name: str) -> Shard:
        """Returns the shard of this name; nothing is read yet. Raises ShardError: unknown protocol."""
        path = self.path(name)
        if not is_remote(path):
            return LocalShard(path, self.retry)
        remote = RemoteShard(path, self.retry)
        return remote if self.cache is None else CachedShard(remote, self.cache)


DIRECT = Store()
"""Opens paths and URLs, without a cache."""


def build_store(loader: LoaderConfig) -> Store:
    """Returns the store that a recipe asks for.

    Raises:
        ShardError: the cache directory cannot be made.
    """
    cache = None
    if loader.cache_dir is not None:
        cache = ShardCache(loader.cache_dir, round(loader.cache_gib * 2**30))
    return Store(loader.data_root, RetryPolicy(attempts=loader.read_attempts), cache)
