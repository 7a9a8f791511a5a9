"""JSON over HTTP, for servers that sample or score: one request with a hard time limit, and bounded retries.

Redirects are not followed, and proxies of the environment are not used: the connection goes to the very address
that was checked, whatever the name resolves to a moment later.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rlhf.errors import ConfigError

T = TypeVar("T")

MAX_ANSWER_BYTES = 2**26
SHOWN = 500
"""Characters of a server's message that an error repeats."""


class Unanswered(Exception):
    """No valid answer, for a reason that may pass: nobody is there, too slow, overloaded, or it makes no sense."""


class Unreached(Unanswered):
    """Nobody took the connection, so that the request was not sent."""


class Refused(Exception):
    """The server finds the request itself wrong, so that asking again would not help."""


@dataclass(frozen=True)
class HttpAnswer:
    """What came, whatever its status; the names of `headers` are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


@dataclass(frozen=True)
class JsonServer:
    """Where requests go.

    Args:
        url: http or https, with a host; `send` appends a path to it.
        timeout_s: of one request, from connecting to the last byte of the answer.
        token: sent as bearer token; never shown.
        allow_private: whether its address may be private, loopback or link-local.
        max_bytes: of an answer.
    """

    url: str
    timeout_s: float
    token: str | None = field(default=None, repr=False)
    allow_private: bool = False
    max_bytes: int = MAX_ANSWER_BYTES

    def send(self, path: str = "", body: Any = None) -> Any:
        """GET, or POST of a JSON body; returns the JSON of the answer.

        Raises:
            Unanswered: no valid answer in time, status 429 or 5xx, or one that is no JSON.
            Refused: any other status but 2xx, redirects among them.
            ConfigError: the address is not allowed.
        """
        answer = self.exchange(path, None if body is None else json.dumps(body).encode())
        status, content = answer.status, answer.content
        if not 200 <= status < 300:
            kind = Unanswered if status == 429 or status >= 500 else Refused
            raise kind(f"status {status}: {self.shown(content)}")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Unanswered(f"no JSON ({type(error).__name__}): {self.shown(content)!r}") from None

    def addresses(self) -> list[tuple[Any, ...]]:
        """What the host resolves to now, as `socket.getaddrinfo` gives it.

        Raises:
            Unreached: it does not resolve.
            ConfigError: one of the addresses is not allowed.
        """
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise Unreached(f"{parts.hostname} does not resolve ({error})") from None
        for *_, address in found:
            if not (self.allow_private or is_public(str(address[0]))):
                raise ConfigError(
                    f"{self.url}: {address[0]} is a private, loopback or link-local address",
                    fix="set allow_private: true beside the URL if that machine is meant, or correct the URL",
                )
        return found

    def shown(self, content: bytes) -> str:
        """The beginning of an answer, for an error; without the token."""
        text = content.decode(errors="replace")
        return (text.replace(self.token, "<redacted>") if self.token else text)[:SHOWN]

    def exchange(self, path: str, data: bytes | None) -> HttpAnswer:
        """One request: GET, or POST of JSON text.

        Raises:
            Unanswered: no whole answer in time.
            ConfigError: the address is not allowed.
        """
        parts = urlsplit(self.url)
        headers = {"Content-Type": "application/json", "User-Agent": "rlhf"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        ends = time.monotonic() + self.timeout_s
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(str(parts.hostname), parts.port)
        try:
            connection.sock = self._connect(ends)
            with _time_limit(connection.sock, ends):
                target = (parts.path + path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET" if data is None else "POST", target, data, headers)
                response = connection.getresponse()
                content = response.read(self.max_bytes)
                if response.length:  # bytes that were announced and did not come
                    raise Unanswered(f"the answer broke off, or is longer than {self.max_bytes} bytes")
                return HttpAnswer(response.status, {k.lower(): v for k, v in response.getheaders()}, content)
        except TimeoutError:
            raise Unanswered(f"no answer within {self.timeout_s:g} s") from None
        except (OSError, HTTPException) as error:
            raise Unanswered(str(error) or type(error).__name__) from None
        finally:
            connection.close()

    def _connect(self, ends: float) -> socket.socket:
        """A connection to the first of the checked addresses that takes one; of https with its certificate checked.

        Raises:
            Unreached: none does.
        """
        failure: OSError = TimeoutError()
        for family, kind, protocol, _, address in self.addresses():
            link = socket.socket(family, kind, protocol)
            try:
                link.settimeout(max(0.001, ends - time.monotonic()))
                link.connect(address)
                if urlsplit(self.url).scheme == "https":
                    return ssl.create_default_context().wrap_socket(link, server_hostname=urlsplit(self.url).hostname)
                return link
            except OSError as error:
                link.close()
                failure = error
        if isinstance(failure, TimeoutError):
            raise Unreached(f"no answer within {self.timeout_s:g} s") from None
        raise Unreached(str(failure) or type(failure).__name__) from None


@contextlib.contextmanager
def _time_limit(link: socket.socket, ends: float) -> Iterator[None]:
    """Shut the connection down at the monotonic time `ends`: its own timeout starts anew with every byte that comes.

    Raises:
        TimeoutError: in place of whatever came of that.
    """
    passed = threading.Event()

    def shut() -> None:
        passed.set()
        with contextlib.suppress(OSError):
            link.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, ends - time.monotonic()), shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, HTTPException, Unanswered):
        if not passed.is_set():
            raise
    finally:
        timer.cancel()
    if passed.is_set():
        raise TimeoutError


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet: not private, loopback, link-local, multicast or reserved."""
    ip = ipaddress.ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return ip.is_global and not ip.is_multicast


def retried(once: Callable[[], T], *, attempts: int, wait_s: float) -> T:
    """What `once` returns; called again when it raises `Unanswered`, after waits that double from `wait_s` seconds on.

    Raises:
        Unanswered: the last one, after that many attempts.
    """
    for attempt in range(1, attempts):
        try:
            return once()
        except Unanswered:
            time.sleep(wait_s * 2 ** (attempt - 1))
    return once()
