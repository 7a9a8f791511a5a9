"""A server of rewards on this machine that fails as it is told, request by request."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from faulty_server import FaultyHandler, FaultyServer


class ScriptedServer(FaultyServer):
    """Answers each rollout with `score(row)`; a request for which `script` holds a fault gets that instead.

    Faults: a status; `slow` (no answer), `drip` (a byte now and then), `close`, `drop` (half an answer), `garbage`,
    `deep`, `list`, `short` (a score too few), `nan`, `huge`, `text`, `true`, `null`; or a function of the rows that
    returns one of these, or None.
    """

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/score"
        self.score: Callable[[dict[str, Any]], float | None] = lambda row: float(len(row["response"]))
        self.requests: list[list[dict[str, Any]]] = []


class _Handler(FaultyHandler):
    server: ScriptedServer

    def do_POST(self) -> None:
        rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["rollouts"]
        self.server.requests.append(rows)
        self.server.headers.append(self.headers)
        fault = self.server.next_fault()
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

    def reply(self, content: bytes, *, status: int = 200, length: int | None = None) -> None:
        self.send_response(status)
        if status in (301, 302, 307, 308):
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
