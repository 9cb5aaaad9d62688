"""Shards over HTTP and in memory, end to end; errors that pass and those that do not; the node's cache."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import fsspec
import pytest

from nvlm_train.batch import RankShare, StepBatch
from nvlm_train.config.schema import BatchConfig, LoaderConfig
from nvlm_train.data.loading.loader import Loader
from nvlm_train.data.plan.data_recipe import Blend, SourceConfig
from nvlm_train.data.plan.plan import DataPlan
from nvlm_train.data.plan.sources import open_sources
from nvlm_train.data.samples.encoder import SampleEncoder
from nvlm_train.data.shards.cache import CachedShard, ShardCache
from nvlm_train.data.shards.remote import RemoteShard
from nvlm_train.data.shards.retry import RetryPolicy, may_pass
from nvlm_train.data.shards.store import Store, build_store
from nvlm_train.data.shards.tar import write_shards
from nvlm_train.errors import ShardError
from tests.data.conftest import BLEND, LENGTH, mixed_samples
from tests.data.loading.test_loader import same
from tests.data.shards.range_server import RangeServer, serve

MakeEncoder = Callable[..., SampleEncoder]
QUICK = RetryPolicy(attempts=4, first_wait_s=0.001)
ONE = Blend("one", (SourceConfig("s", ("s-000000.tar",)),))


@pytest.fixture(scope="module")
def remote_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars without anything beside them."""
    root = tmp_path_factory.mktemp("remote")
    write_shards(mixed_samples(57, "a"), str(root / "a-%06d.tar"), 12)
    write_shards(mixed_samples(18, "b", seed=1000), str(root / "b-%06d.tar"), 9)
    write_shards(mixed_samples(8, "s"), str(root / "s-%06d.tar"))
    return root


@pytest.fixture
def server(remote_root: Path) -> Iterator[RangeServer]:
    with serve(remote_root) as running:
        yield running


def steps(
    root: str, encoder: SampleEncoder, store: Store, blend: Blend = BLEND, workers: int = 2
) -> list[StepBatch]:
    """Three steps through index, lengths, plan and loader."""
    plan = DataPlan(
        open_sources(blend, replace(store, root=root), encoder), BatchConfig(8), LENGTH, 7, 0.0
    )
    with Loader(plan, encoder, RankShare(), LoaderConfig(workers=workers), 20, count()) as loader:
        return [next(loader) for _ in range(3)]


def equal(one: list[StepBatch], other: list[StepBatch]) -> bool:
    return all(same(*pair) for pair in zip(one, other, strict=True))


def test_http_reads_what_local_files_hold(
    remote_root: Path, server: RangeServer, make_encoder: MakeEncoder, tmp_path: Path
) -> None:
    encoder = make_encoder()
    expected = steps(str(remote_root), encoder, Store())
    assert equal(steps(server.url, encoder, Store()), expected)
    cached = Store(cache=ShardCache(str(tmp_path / "cache"), 1 << 30))
    assert equal(steps(server.url, encoder, cached), expected)
    sent = dict(server.bytes_sent)
    again = build_store(LoaderConfig(cache_dir=str(tmp_path / "cache")))
    assert equal(steps(server.url, encoder, again), expected)
    assert server.bytes_sent == sent  # index, lengths and copies were there
    beside = {path.suffix for path in (tmp_path / "cache" / "beside").iterdir()}
    assert ".index" in beside and any(suffix.startswith(".lengths-") for suffix in beside)


def test_memory_file_system(remote_root: Path, make_encoder: MakeEncoder, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    for path in remote_root.glob("*.tar"):
        files.pipe_file(f"/shards/{path.name}", path.read_bytes())
    encoder = make_encoder()
    expected = steps(str(remote_root), encoder, Store())
    assert equal(steps("memory://shards", encoder, Store(), workers=0), expected)
    cached = Store(cache=ShardCache(str(tmp_path), 1 << 30))
    assert equal(steps("memory://shards", encoder, cached), expected)


@pytest.mark.parametrize("failure", [503, 429, 0, -1])
def test_errors_that_pass_are_tried_again_and_logged(
    server: RangeServer, failure: int, caplog: pytest.LogCaptureFixture
) -> None:
    shard = RemoteShard(f"{server.url}/s-000000.tar", QUICK)
    stamp = shard.stamp()
    expected = (server.root / "s-000000.tar").read_bytes()
    server.failures = [failure] * 3
    with caplog.at_level(logging.WARNING):
        assert shard.read(512, 1000, stamp) == expected[512:1512]
    lines = [record.getMessage() for record in caplog.records]
    # aiohttp itself asks once more when a connection that it kept was closed.
    assert len(lines) in ((1, 2, 3) if failure == -1 else (3,))
    assert all(f"reading {server.url}/s-000000.tar failed (" in line for line in lines)
    assert any("try 2 of 4 follows in" in line for line in lines)


def test_a_server_that_stays_down_ends_with_the_url(server: RangeServer) -> None:
    shard = RemoteShard(f"{server.url}/s-000000.tar", QUICK)
    stamp = shard.stamp()
    server.failures = [503] * 99
    message = r"shard=http://127.0.0.1:\d+/s-000000.tar cannot be read: .*503.*4 times in a row"
    with pytest.raises(ShardError, match=message):
        shard.read(0, 10, stamp)
    assert len(server.failures) == 95
    with pytest.raises(ShardError, match=r"503.*loader.read_attempts"):
        shard.stamp()  # fsspec calls this a missing file


def test_refused_connections_are_tried_again(remote_root: Path) -> None:
    with serve(remote_root) as gone:
        url = gone.url
    with pytest.raises(ShardError, match="Cannot connect.* 4 times in a row"):
        RemoteShard(f"{url}/s-000000.tar", QUICK).stamp()


def test_lasting_errors_end_at_once(server: RangeServer, make_encoder: MakeEncoder) -> None:
    shard = RemoteShard(f"{server.url}/s-000000.tar", QUICK)
    stamp = shard.stamp()
    server.failures = [403] * 9
    with pytest.raises(ShardError, match=r"403.*trying again would not help"):
        shard.read(0, 10, stamp)
    assert len(server.failures) == 8
    server.failures = []
    missing = Blend("one", (SourceConfig("s", ("none.tar",)),))
    with pytest.raises(ShardError, match=r"missing shard=http://.*/none.tar: blend=one source=s"):
        open_sources(missing, Store(server.url, QUICK), make_encoder())
    with pytest.raises(ShardError, match="shard=nosuch://x.tar cannot be opened"):
        Store().open("nosuch://x.tar")


def test_a_server_without_ranges_is_named(server: RangeServer) -> None:
    shard = RemoteShard(f"{server.url}/s-000000.tar", QUICK)
    server.answers_ranges[0] = False
    with pytest.raises(ShardError, match="the server does not answer range requests"):
        shard.read(512, 10, shard.stamp())


def test_which_errors_may_pass() -> None:
    for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET):
        assert may_pass(OSError(number, os.strerror(number)))
    for number in (errno.ENOENT, errno.EACCES, errno.EISDIR):
        assert not may_pass(OSError(number, os.strerror(number)))


def test_a_stream_is_the_tar(server: RangeServer) -> None:
    shard = RemoteShard(f"{server.url}/a-000000.tar", QUICK)
    expected = (server.root / "a-000000.tar").read_bytes()
    with shard.open() as stream:
        assert stream.read() == expected
        stream.seek(-10, os.SEEK_END)
        assert stream.read(99) == expected[-10:] and stream.read(1) == b""


# ---- the node's cache ----

_RACE = """
import sys
from nvlm_train.data.shards.remote import RemoteShard
from nvlm_train.data.shards.cache import CachedShard, ShardCache
url, directory = sys.argv[1:]
shard = CachedShard(RemoteShard(url), ShardCache(directory, 1 << 30))
stamp = shard.stamp()
sys.stdin.readline()
sys.stdout.buffer.write(shard.read(0, stamp.size, stamp))
"""


def test_racing_ranks_download_a_shard_once(server: RangeServer, tmp_path: Path) -> None:
    url, expected = f"{server.url}/a-000001.tar", (server.root / "a-000001.tar").read_bytes()
    command = [sys.executable, "-c", _RACE, url, str(tmp_path)]
    ranks = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(3)
    ]
    for rank in ranks:  # all are ready; now all at once
        assert rank.stdin is not None
        rank.stdin.write(b"go\n")
        rank.stdin.flush()
    assert [rank.communicate()[0] for rank in ranks] == [expected] * 3
    assert server.bytes_sent == {"a-000001.tar": len(expected)}


def test_racing_threads_download_a_shard_once(server: RangeServer, tmp_path: Path) -> None:
    shard = cached(server, "a-000000.tar", ShardCache(str(tmp_path), 1 << 30))
    stamp, found = shard.stamp(), list[bytes]()
    threads = [
        threading.Thread(target=lambda: found.append(shard.read(0, stamp.size, stamp)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(server.root / "a-000000.tar").read_bytes()] * 6
    assert server.bytes_sent["a-000000.tar"] == stamp.size


def cached(server: RangeServer, name: str, cache: ShardCache) -> CachedShard:
    return CachedShard(RemoteShard(f"{server.url}/{name}", QUICK), cache)


def copies(directory: Path) -> int:
    return sum(path.stat().st_size for path in (directory / "copies").iterdir())


def test_the_least_recently_used_copy_makes_room(server: RangeServer, tmp_path: Path) -> None:
    names = [f"a-{number:06d}.tar" for number in range(4)]
    sizes = [(server.root / name).stat().st_size for name in names]
    limit = sum(sizes) - min(sizes[1:]) // 2
    # Nothing is held from one read to the next.
    cache = ShardCache(str(tmp_path), limit, idle_s=-1.0)
    shards = [cached(server, name, cache) for name in names]

    def read(number: int) -> None:
        stamp = shards[number].stamp()
        assert shards[number].read(0, 512, stamp)
        assert copies(tmp_path) <= limit

    for number in (0, 1, 2, 0, 3):
        read(number)
    sent = dict(server.bytes_sent)
    read(0)
    assert server.bytes_sent == sent  # it was used after 1, which had to go
    read(1)
    assert server.bytes_sent[names[1]] == 2 * sizes[1]


def test_copies_in_use_stay_and_the_limit_holds(
    server: RangeServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = (server.root / "a-000000.tar").stat().st_size
    one = cached(server, "a-000000.tar", ShardCache(str(tmp_path), size + 10))
    one.read(0, 512, one.stamp())
    # Another rank, with a table of its own, finds the copy held.
    other = cached(server, "a-000001.tar", ShardCache(str(tmp_path), size + 10))
    expected = (server.root / "a-000001.tar").read_bytes()
    with caplog.at_level(logging.WARNING):
        assert [other.read(512, 512, other.stamp()) for _ in range(5)] == [expected[512:1024]] * 5
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.startswith("no room for a copy") for text in warnings] == [True]
    assert copies(tmp_path) == size and server.bytes_sent["a-000001.tar"] == 5 * 512
    sent = dict(server.bytes_sent)
    one.read(0, 512, one.stamp())
    assert server.bytes_sent == sent


def test_what_a_killed_rank_left_is_cleared(server: RangeServer, tmp_path: Path) -> None:
    size = (server.root / "a-000000.tar").stat().st_size
    cache = ShardCache(str(tmp_path), size + 10)
    (tmp_path / "copies" / "dead.partial").write_bytes(b"x" * size)
    shard = cached(server, "a-000000.tar", cache)
    assert shard.read(0, size, shard.stamp()) == (server.root / "a-000000.tar").read_bytes()
    assert [path.suffix for path in (tmp_path / "copies").iterdir()] == [".tar"]


def test_a_failed_download_leaves_nothing(server: RangeServer, tmp_path: Path) -> None:
    shard = cached(server, "a-000000.tar", ShardCache(str(tmp_path), 1 << 30))
    stamp = shard.stamp()
    server.failures = [403]
    with pytest.raises(ShardError, match="403"):
        shard.read(0, 10, stamp)
    assert list((tmp_path / "copies").iterdir()) == []
    assert len(shard.read(0, 10, stamp)) == 10


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"loader.cache_dir=.*/file cannot be made"):
        ShardCache(str(tmp_path / "file"), 1)


# ---- memory ----


def test_buffered_pixels_are_bounded(make_encoder: MakeEncoder, remote_root: Path) -> None:
    encoder = make_encoder()
    plan = DataPlan(
        open_sources(BLEND, Store(str(remote_root)), encoder), BatchConfig(8), LENGTH, 7, 0.0
    )

    def run(gib: float) -> tuple[list[StepBatch], int]:
        config = LoaderConfig(workers=2, prefetch_steps=30, prefetch_gib=gib)
        found, most = [], 0
        with Loader(plan, encoder, RankShare(), config, 20, count()) as loader:
            for _ in range(12):
                found.append(next(loader))
                most = max(most, loader.buffered_bytes)
        return found, most

    free, unbounded = run(1.0)
    step = max(sum(part.pixels_TCEE.nbytes for part in batch.rounds) for batch in free)
    for limit in (3 * step, step // 2):
        bound, most = run(limit / 2**30)
        assert most <= limit < unbounded and equal(free, bound)
