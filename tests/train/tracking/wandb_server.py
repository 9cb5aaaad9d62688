"""As much of a wandb server as wandb's own client needs to upload a run; it keeps what it was sent.

It is no wandb: it keeps the lines of each run by offset, and says on a resume how many there are.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """Runs by id: the lines of wandb-history.jsonl, as the client placed them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history: dict[str, dict[int, dict[str, Any]]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def steps(self, run_id: str) -> list[int]:
        """Returns global_step of each line, in the order of the lines."""
        lines = self.history[run_id]
        return [lines[place]["global_step"] for place in sorted(lines)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that hang up."""


@contextmanager
def serving() -> Iterator[WandbServer]:
    """Runs a server on a free port."""
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *arguments: Any) -> None:
        return

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/file_stream"):
            run_id = self.path.split("/")[-2]
            stream = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            kept = self.server.history.setdefault(run_id, {})
            for number, line in enumerate(stream["content"] if stream else []):
                kept[stream["offset"] + number] = json.loads(line)
            self._answer({"limits": {}})
        elif self.path.endswith("/graphql"):
            request = json.loads(body)
            self._answer({"data": self._data(request["query"], request.get("variables") or {})})
        else:
            self._answer({})

    def _data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
        if "UpsertBucket" in query:
            names = {"id": "1", "name": variables["name"], "displayName": "n", "project": project}
            more = {"description": "", "config": "{}", "sweepName": "", "historyLineCount": 0}
            return {"upsertBucket": {"bucket": {**names, **more}, "inserted": True}}
        if "RunResumeStatus" in query:
            return {"model": {**project, "bucket": self._bucket(variables["name"])}}
        if "CreateRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.server.url}/up"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if "Viewer" in query:
            teams = {"teams": {"edges": []}}
            return {"viewer": {"id": "e", "entity": "me", "username": "me", "flags": "{}", **teams}}
        return {}

    def _bucket(self, run_id: str) -> dict[str, Any] | None:
        lines = self.server.history.get(run_id)
        if not lines:
            return None
        last = json.dumps(lines[max(lines)])
        counts = {"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0}
        tails = {"historyTail": json.dumps([last]), "eventsTail": "[]", "summaryMetrics": last}
        about = {"id": "1", "name": run_id, "displayName": "n", "config": "{}", "tags": []}
        return {**about, **counts, **tails, "wandbConfig": '{"t": 1}'}

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
