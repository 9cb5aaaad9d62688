"""A real HTTP server on 127.0.0.1 that answers range requests, counts them, and fails on request."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves the files of a directory.

    `failures` are used up one per request: an HTTP status, 0 to cut the answer in the middle, or
    -1 to close the connection without one.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.failures: list[int] = []
        self.answers_ranges = [True]
        self.bytes_sent: dict[str, int] = {}
        self.guard = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: RangeServer

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:  # noqa: N802  (http.server's name)
        self._answer(b"")

    def do_GET(self) -> None:  # noqa: N802
        path = self.server.root / self.path.lstrip("/")
        self._answer(path.read_bytes() if path.is_file() else b"")

    def _answer(self, content: bytes) -> None:
        path = self.server.root / self.path.lstrip("/")
        with self.server.guard:
            failure = self.server.failures.pop(0) if self.server.failures else None
        if failure == -1:
            self.close_connection = True
            return
        status = failure or (200 if path.is_file() else 404)
        if status >= 400:
            self.send_error(status)
            return
        size = path.stat().st_size
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and self.server.answers_ranges[0]:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            content = content[int(first) : int(last) + 1]
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) if content else size))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        sent = content[: len(content) // 2] if failure == 0 else content
        with self.server.guard:  # counted first: who has read an answer may look at once
            done = self.server.bytes_sent
            done[path.name] = done.get(path.name, 0) + len(sent)
        self.wfile.write(sent)


@contextlib.contextmanager
def serve(root: Path) -> Iterator[RangeServer]:
    """The server, running in a thread."""
    server = RangeServer(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
