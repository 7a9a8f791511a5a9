"""Servers on this machine that fail as they are told, request by request."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar


class FaultyServer(ThreadingHTTPServer):
    """Every request takes the next fault of `script`, and after them `always`; None is no fault."""

    daemon_threads = True

    def __init__(self, handler: type[FaultyHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.script: list[Any] = []
        self.always: Any = None
        self.headers: list[Any] = []
        self.stopping = threading.Event()

    def next_fault(self) -> Any:
        """Of the request at hand."""
        return self.script.pop(0) if self.script else self.always

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that gave up are what is tested."""


class FaultyHandler(BaseHTTPRequestHandler):
    server: FaultyServer

    def fail(self, fault: str) -> None:
        """`slow` (no answer), `drip` (a byte now and then) or `close`."""
        self.close_connection = True
        while fault == "drip" and not self.server.stopping.wait(0.02):
            self.wfile.write(b"HTTP/1.0 200 OK\r\n" if not hasattr(self, "began") else b"x")
            self.began = True
        if fault == "slow":
            self.server.stopping.wait(30)

    def log_message(self, format: str, *args: Any) -> None:
        pass


Server = TypeVar("Server", bound=FaultyServer)


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
def serving(server: Server) -> Iterator[Server]:
    """The server, running; stopped at the end."""
    with server, running(server):
        try:
            yield server
        finally:
            server.stopping.set()
