"""Reads that are tried again: which errors pass by themselves, how often, and how long between."""

from __future__ import annotations

import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from nvlm_train.errors import ShardError

T = TypeVar("T")

_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
"""HTTP answers that say "later": timeouts, too early, too many requests, a server in trouble."""
_LASTING = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ValueError,  # such as aiohttp's InvalidURL
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Says how often a read is tried, and how long it waits between two tries.

    The wait doubles each time. Part of it is drawn by lot, so that many ranks do not come back to a
    struggling server at the same moment.
    """

    attempts: int = 5
    """Tries altogether; 1 gives up at once."""
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0

    def waits(self) -> Iterator[float]:
        """Yields the seconds before the second try, the third, ..."""
        for number in range(self.attempts - 1):
            wait = min(self.first_wait_s * 2**number, self.longest_wait_s)
            yield wait * random.uniform(0.5, 1.0)


DEFAULT_RETRY = RetryPolicy()


def try_again(url: str, policy: RetryPolicy, read: Callable[[], T]) -> T:
    """Returns what `read` returns; errors that may pass are logged and the read is tried again.

    Raises:
        FileNotFoundError: there is nothing at the URL.
        ShardError: any other lasting error, or a passing one at the last try.
    """
    waits = policy.waits()
    tries = 1
    while True:
        try:
            return read()
        except _read_errors() as error:
            wait = next(waits, None)
            if not may_pass(error):
                if isinstance(error, FileNotFoundError):
                    raise
                raise ShardError(
                    f"shard={url} cannot be read: {_words(error)}; trying again would not help: "
                    "correct the name, the access rights or the store"
                ) from error
            if wait is None:
                raise ShardError(
                    f"shard={url} cannot be read: {_words(error)}, {tries} times in a row; look at "
                    "the store and the network, or raise loader.read_attempts, and start again"
                ) from error
            _log.warning(
                "reading %s failed (%s); try %d of %d follows in %.1f s",
                url, _words(error), tries + 1, policy.attempts, wait,
            )  # fmt: skip
        time.sleep(wait)
        tries += 1


def may_pass(error: BaseException) -> bool:
    """Says whether the same read can succeed later.

    Timeouts, broken connections, answers cut short, the HTTP answers of a server in trouble, and
    I/O errors of a mounted file system may pass. Missing files, access rights and every other
    HTTP answer do not.
    """
    # fsspec's HTTP file system says FileNotFoundError for a server that does not answer, too, and
    # keeps what happened as the cause.
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None:
        return may_pass(cause)
    if isinstance(error, _LASTING):
        return False
    status = getattr(error, "status", None)
    return status in _PASSING_STATUS if isinstance(status, int) else True


def _read_errors() -> tuple[type[Exception], ...]:
    """Returns what file systems raise. Timeouts are OSErrors; aiohttp has errors of its own."""
    aiohttp = sys.modules.get("aiohttp")
    return (OSError, EOFError, *([aiohttp.ClientError] if aiohttp else []))


def _words(error: BaseException) -> str:
    """Returns one line about the error, or about its cause where the error itself is only the URL."""
    known = error.__cause__ if isinstance(error, FileNotFoundError) else None
    shown = known or error
    return f"{type(shown).__name__}: {shown}".split("\n")[0]
