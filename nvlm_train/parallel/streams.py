"""Streams of a GPU: one for training, and one for what is made ready beside it. A CPU has no streams.

The training stream has a higher priority: what is queued on the side stream gets the multiprocessors that
training leaves free, and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

HIGH = -1
"""CUDA's lower numbers are higher priorities; streams have 0 unless they are told otherwise."""


@contextmanager
def training_stream() -> Iterator[None]:
    """Queues everything inside on a stream of high priority."""
    if not torch.cuda.is_available():
        yield
        return
    outside, inside = torch.cuda.current_stream(), torch.cuda.Stream(priority=HIGH)
    inside.wait_stream(outside)
    with torch.cuda.stream(inside):
        yield
    outside.wait_stream(inside)


class SideStream:
    """Work of low priority beside the training; on a CPU it is done at once."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    @property
    def is_beside(self) -> bool:
        """Whether work is done beside the training, so that it is worth to begin early."""
        return self._stream is not None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Queues what is inside on this stream, whatever the training stream has still to do.

        It must read nothing that the training stream writes.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def behind_training(self) -> Iterator[None]:
        """Queues what is inside on this stream, behind what the training stream has been given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with self.at_once():
            yield

    def mark(self) -> torch.cuda.Event | None:
        """Returns what `wait_for` waits for: all that this stream has been given so far."""
        if self._stream is None:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def wait_for(self, mark: torch.cuda.Event | None, tensors: Iterable[Tensor]) -> None:
        """Lets the training stream wait for a mark; the host goes on.

        Args:
            mark: of this stream.
            tensors: what this stream made and training reads. Their memory is kept until it has; of views of
                one buffer one is enough.
        """
        if mark is None:
            return
        now = torch.cuda.current_stream()
        now.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(now)
