"""What every request passes before any route: rate per address, Host, Origin, size of the body; and safe headers.

The CSRF token is checked in `access.py`, where the session is known. Limits are kept in memory, one process serves.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhf.config_labeling import ServeConfig
from rlhf.errors import ConfigError, RlhfError

MAX_BODY = 64 * 1024
"""Bytes. Notes of 2,000 characters and the ranks of a long list are a tenth of it."""

BODY_SECONDS = 20.0
"""A body that takes longer is given up, so that slow senders hold no memory."""

_CSP = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": _CSP,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not no-referrer: with it browsers send `Origin: null` along with forms, and the check of Origin refuses them.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
"""Of every response. None allows inline script or style, another origin, or a frame."""

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", re.IGNORECASE)
_SAFE = ("GET", "HEAD")


class Refused(RlhfError):
    """A request that is answered with an error: `status` is HTTP's, `retry_after` in seconds where waiting helps."""

    def __init__(self, status: int, message: str, *, fix: str, retry_after: float = 0.0) -> None:
        super().__init__(message, fix=fix)
        self.status = status
        self.retry_after = retry_after


class RateLimiter:
    """A bucket of tokens per key: `burst` at once, then `per_second`. Thread-safe; forgets the keys unused longest."""

    def __init__(self, per_second: float, burst: int, *, keys: int = 10_000) -> None:
        self.per_second = per_second
        self.burst = burst
        self._keys = keys
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: str) -> None:
        """One token.

        Raises:
            Refused: 429, none is left.
        """
        now = time.monotonic()
        with self._lock:
            tokens, since = self._buckets.pop(key, (float(self.burst), now))
            tokens = min(float(self.burst), tokens + (now - since) * self.per_second)
            self._buckets[key] = (tokens - 1 if tokens >= 1 else tokens, now)
            if len(self._buckets) > self._keys:
                self._buckets.popitem(last=False)
        if tokens < 1:
            wait = (1 - tokens) / self.per_second
            fix = f"wait {max(1, round(wait))} seconds, then try again"
            raise Refused(429, "too many requests", fix=fix, retry_after=wait)

    def give_back(self, key: str) -> None:
        """What was taken does not count: a login that was right is no guess."""
        with self._lock:
            if key in self._buckets:
                tokens, since = self._buckets[key]
                self._buckets[key] = (min(float(self.burst), tokens + 1), since)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to `host`. Names other than localhost are not looked up."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(serve: ServeConfig) -> None:
    """Without accounts everybody who reaches the server is its admin, so that only this machine may.

    Raises:
        ConfigError: another bind, or an address for others, without accounts.
    """
    if serve.accounts:
        return
    if not is_loopback(serve.host):
        raise ConfigError(
            f"serve.host {serve.host!r} is open to other machines, and without accounts all of them are admins",
            fix="set serve.accounts: true, or serve.host: 127.0.0.1",
        )
    if serve.public_url and not is_loopback(urlsplit(serve.public_url).hostname or ""):
        raise ConfigError(
            f"serve.public_url {serve.public_url!r} is for other machines, and without accounts all of them are admins",
            fix="set serve.accounts: true, or remove serve.public_url",
        )


def check_host(host: str, serve: ServeConfig) -> None:
    """The Host header must be an address of ours: a foreign name that points here is DNS rebinding.

    Numbers cannot be rebound; where only this machine may ask, they must be loopback's. Ports are not compared:
    they differ behind a tunnel, and no attack changes them.

    Raises:
        Refused: 421.
    """
    match = _HOST.fullmatch(host)
    name = match[1].strip("[]").lower() if match else ""
    if match and (is_loopback(name) or name == urlsplit(serve.public_url or "").hostname):
        return
    if match and not is_loopback(serve.host) and _is_address(name):
        return
    fix = "open the address that `rlhf label serve` printed, or set serve.public_url to this one"
    raise Refused(421, f"{host[:100]!r} is not this server's name", fix=fix)


def check_origin(headers: Headers, serve: ServeConfig) -> None:
    """A request that changes something must come from a page of ours; browsers always say where it comes from.

    Raises:
        Refused: 403, another origin or none.
    """
    ours = origin_of(serve.public_url) if serve.public_url else f"http://{headers.get('host', '')}"
    if headers.get("origin", "").lower() != ours.lower():
        fix = f"open {ours} itself; a program sends the header Origin: {ours}"
        raise Refused(403, "the request comes from another site", fix=fix)


def origin_of(url: str) -> str:
    """Scheme, host and port of a URL, as browsers write them: without the default port."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    default = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port not in (None, default) else "")


def address_of(request: Request) -> str:
    """The client's address, for limits: of IPv6 the first 64 bits, since one person has all below them."""
    host = request.client.host if request.client else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return host


class Guard:
    """ASGI middleware: checks a request before the app sees it, and adds the headers to every response."""

    def __init__(
        self, app: ASGIApp, serve: ServeConfig, limiter: RateLimiter, refuse: Callable[[Request, Refused], Response]
    ) -> None:
        self.app = app
        self.serve = serve
        self.limiter = limiter
        self.refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        request = Request(scope, receive)
        try:
            self.limiter.take(address_of(request))
            check_host(request.headers.get("host", ""), self.serve)
            if scope["method"] not in _SAFE:
                check_origin(request.headers, self.serve)
                receive = _replay(await _read_body(request), receive)
        except Refused as refused:
            await self.refuse(request, refused)(scope, receive, send_safely)
            return
        await self.app(scope, receive, send_safely)


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


async def _read_body(request: Request) -> bytes:
    """The whole body; its announced length is checked first, its true one while it comes.

    Raises:
        Refused: 413 too long, 408 too slow.
    """
    too_long = Refused(413, f"the request is longer than {MAX_BODY:,} bytes", fix="shorten the notes")
    if len(length := request.headers.get("content-length", "")) > 12 or (length.isdigit() and int(length) > MAX_BODY):
        raise too_long
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise too_long
    except TimeoutError:
        raise Refused(408, "the request took too long to arrive", fix="try again") from None
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
