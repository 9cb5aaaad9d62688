"""Where shards come from: a local file, a URL, or a node's copy of a URL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nvlm_train.data.shards.cache import CachedShard, ShardCache
from nvlm_train.data.shards.remote import RemoteShard
from nvlm_train.data.shards.retry import RetryPolicy
from nvlm_train.data.shards.tar import LocalShard, Shard, is_remote

if TYPE_CHECKING:
    from nvlm_train.config.schema import LoaderConfig


@dataclass(frozen=True)
class Store:
    """Opens shards by local path or fsspec URL; remote ones through the cache where there is one."""

    retry: RetryPolicy = RetryPolicy()
    cache: ShardCache | None = None

    def open(self, path: str) -> Shard:
        """The shard at the path; nothing is read yet. Raises ShardError: unknown protocol."""
        if not is_remote(path):
            return LocalShard(path, self.retry)
        remote = RemoteShard(path, self.retry)
        return remote if self.cache is None else CachedShard(remote, self.cache)


DIRECT = Store()
"""No cache."""


def build_store(loader: LoaderConfig) -> Store:
    """The store that a recipe asks for. Raises ShardError: the cache directory cannot be made."""
    cache = None
    if loader.cache_dir is not None:
        cache = ShardCache(loader.cache_dir, round(loader.cache_gib * 2**30))
    return Store(RetryPolicy(attempts=loader.read_attempts), cache)
