"""A server of rewards on this machine that fails as it is told, request by request."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ScriptedServer(ThreadingHTTPServer):
    """Answers each rollout with `score(row)`; a request for which `script` holds a fault gets that instead.

    Faults: a status; `slow` (no answer), `drip` (a byte now and then), `close`, `drop` (half an answer), `garbage`,
    `deep`, `list`, `short` (a score too few), `nan`, `huge`, `text`, `true`, `null`; or a function of the rows that
    returns one of these, or None.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/score"
        self.score: Callable[[dict[str, Any]], float | None] = lambda row: float(len(row["response"]))
        self.script: list[Any] = []
        self.always: Any = None
        self.requests: list[list[dict[str, Any]]] = []
        self.headers: list[Any] = []
        self.stopping = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that gave up are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    server: ScriptedServer

    def do_POST(self) -> None:
        rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["rollouts"]
        self.server.requests.append(rows)
        self.server.headers.append(self.headers)
        fault = self.server.script.pop(0) if self.server.script else self.server.always
        fault = fault(rows) if callable(fault) else fault
        if fault in ("slow", "drip", "close"):
            self.fail(fault)
        elif isinstance(fault, int):
            self.reply(b"sorry: " + str(self.headers["Authorization"]).encode(), status=fault)
        else:
            self.answer(fault, [self.server.score(row) for row in rows])

    def answer(self, fault: str | None, scores: list[Any]) -> None:
        wrong = {"nan": float("nan"), "huge": 10**400, "text": "1.0", "true": True, "null": None}
        if fault in wrong:
            scores[0] = wrong[fault]
        content = json.dumps({"scores": scores[1:] if fault == "short" else scores}).encode()
        content = {"garbage": b"<html>", "deep": b"[" * 100_000, "list": b"[1.0]"}.get(str(fault), content)
        self.reply(content[: len(content) // 2] if fault == "drop" else content, length=len(content))

    def fail(self, fault: str) -> None:
        self.close_connection = True
        while fault == "drip" and not self.server.stopping.wait(0.02):
            self.wfile.write(b"HTTP/1.0 200 OK\r\n" if not hasattr(self, "began") else b"x")
            self.began = True
        if fault == "slow":
            self.server.stopping.wait(30)

    def reply(self, content: bytes, *, status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        if status in (301, 302, 307, 308):
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[None]:
    """Requests are answered meanwhile."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def serving() -> Iterator[ScriptedServer]:
    """A running server; stopped at the end."""
    with ScriptedServer() as server, running(server):
        try:
            yield server
        finally:
            server.stopping.set()
