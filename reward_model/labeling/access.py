"""Who asks, and may they: what the routes of one site share, and the dependencies that guard each of them."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated
from urllib.parse import parse_qs

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from jinja2 import Environment
from starlette.responses import Response

from reward_model.labeling import accounts
from reward_model.labeling.accounts import SESSION_MS, Visitor
from reward_model.labeling.figures import Agreement
from reward_model.labeling.security import RateLimiter, Refused, address_of
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import LabelingStage

_HEADER = "x-csrf-token"


@dataclass
class Limits:
    """Requests per second and at once. A person labels less than one pair a second; an office shares an address."""

    address: RateLimiter = field(default_factory=lambda: RateLimiter(1000, 2000))
    account: RateLimiter = field(default_factory=lambda: RateLimiter(50, 200))
    secrets_by_address: RateLimiter = field(default_factory=lambda: RateLimiter(0.1, 60))
    """Wrong passwords and invites; right ones do not count."""
    logins_by_name: RateLimiter = field(default_factory=lambda: RateLimiter(1 / 30, 10))


@dataclass
class Site:
    """One labeling project on the web."""

    store: LabelStore
    cfg: LabelingStage
    templates: Environment
    limits: Limits = field(default_factory=Limits)

    @property
    def accounts(self) -> bool:
        """Whether one logs in."""
        return self.cfg.serve.accounts

    @cached_property
    def local(self) -> int:
        """Id of the one user where nobody logs in."""
        return self.store.ensure_user("local", role="admin")

    @cached_property
    def agreement(self) -> Agreement:
        """Figures that are too dear to compute for every look at the admin page."""
        return Agreement(self.store, self.cfg.seed)

    @property
    def secure(self) -> bool:
        """Whether browsers come by https, so that cookies may demand it."""
        return (self.cfg.serve.public_url or "").startswith("https:")

    def cookie(self, kind: str) -> str:
        """A cookie's name. Cookies ignore ports, so that the name tells two projects on one host apart."""
        return f"{'__Host-' if self.secure else ''}rlhf_{self.cfg.serve.port}_{kind}"

    def set_cookie(self, response: Response, kind: str, value: str) -> None:
        """A cookie that scripts cannot read and other sites' requests do not carry."""
        name, age = self.cookie(kind), SESSION_MS // 1000
        response.set_cookie(name, value, max_age=age, httponly=True, samesite="strict", secure=self.secure)

    def drop_cookie(self, response: Response, kind: str) -> None:
        """Forget a cookie of `set_cookie`."""
        response.delete_cookie(self.cookie(kind), httponly=True, samesite="strict", secure=self.secure)


def site_of(request: Request) -> Site:
    """The site that the request came to."""
    return request.app.state.site


def anonymous_csrf(cookie: str) -> str:
    """The CSRF token of a browser that nobody is logged in with; it is bound to a random cookie, "" without one."""
    return hmac.new(cookie.encode(), b"csrf", hashlib.sha256).hexdigest() if cookie else ""


def new_cookie() -> str:
    """A value for the cookie that `anonymous_csrf` is bound to."""
    return secrets.token_urlsafe(32)


def visitor_of(request: Request) -> Visitor | None:
    """Who asks; None if nobody is logged in. Asks the database."""
    site = site_of(request)
    if not site.accounts:
        csrf = anonymous_csrf(request.cookies.get(site.cookie("visitor"), ""))
        return Visitor(site.local, "local", "admin", csrf)
    token = request.cookies.get(site.cookie("session"), "")
    return accounts.visitor_of(site.store, token) if token else None


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a form; of a repeated one the first. Multipart is not read."""
    if not request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
        return {}
    try:
        fields = parse_qs((await request.body()).decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=20)
    except ValueError:
        raise Refused(422, "the form has too many fields", fix="reload the page") from None
    return {name: values[0] for name, values in fields.items()}


async def check_csrf(request: Request, expected: str) -> None:
    """The token of the page must come back, in the header or as a field `csrf_token`, unless nothing is changed.

    Raises:
        Refused: 403.
    """
    if request.method in ("GET", "HEAD"):
        return
    given = request.headers.get(_HEADER) or (await form_of(request)).get("csrf_token", "")
    if not expected or not hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode()):
        raise Refused(403, "the page is too old, or is not ours", fix="reload the page, then try again")


def may(*roles: str) -> Callable[[Request], Awaitable[Visitor]]:
    """The dependency of a route for these roles: session, role, CSRF token and the rate of the account.

    Raises (the dependency):
        Refused: 401 nobody is logged in, 403 another role or no token, 429.
    """

    async def visitor(request: Request) -> Visitor:
        found = await run_in_threadpool(visitor_of, request)
        if found is None:
            raise Refused(401, "you are not logged in", fix="log in")
        site_of(request).limits.account.take(str(found.user_id))
        await check_csrf(request, found.csrf_token)
        if found.role not in roles:
            raise Refused(403, f"this is not for the role {found.role}", fix="ask an admin")
        return found

    return visitor


async def guess(request: Request) -> str:
    """The dependency of a route that takes a password or an invite: CSRF token and guesses by address; the address.

    Raises:
        Refused: 403 no token, 404 nobody logs in here, 429 too many guesses.
    """
    site = site_of(request)
    if not site.accounts:
        raise Refused(404, "there are no accounts here", fix="open /")
    await check_csrf(request, anonymous_csrf(request.cookies.get(site.cookie("visitor"), "")))
    address = address_of(request)
    site.limits.secrets_by_address.take(address)
    return address


SiteOf = Annotated[Site, Depends(site_of)]
Form = Annotated[dict[str, str], Depends(form_of)]
Address = Annotated[str, Depends(guess)]
Annotator = Annotated[Visitor, Depends(may("annotator", "admin"))]
Anyone = Annotated[Visitor, Depends(may("annotator", "admin", "viewer"))]
Onlooker = Annotated[Visitor, Depends(may("viewer", "admin"))]
Admin = Annotated[Visitor, Depends(may("admin"))]
