"""The HTML pages: labeling, login, invite, password. All can be read without script; see also `admin_pages.py`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from sqlalchemy import text
from starlette.responses import Response

from reward_model.labeling import accounts
from reward_model.labeling.access import (
    Address,
    Anyone,
    Form,
    Site,
    SiteOf,
    anonymous_csrf,
    new_cookie,
    site_of,
    visitor_of,
)
from reward_model.labeling.accounts import Visitor
from reward_model.labeling.rendering import markdown_html
from reward_model.labeling.security import Refused, address_of

router = APIRouter()


def page(request: Request, template: str, visitor: Visitor | None, *, status: int = 200, **context: Any) -> Response:
    """A template as a response, with what `base.html.j2` wants."""
    site = site_of(request)
    cookie = ""
    csrf_token = visitor.csrf_token if visitor else ""
    if visitor is None or not site.accounts:
        cookie = request.cookies.get(site.cookie("visitor"), "") or new_cookie()
        csrf_token = anonymous_csrf(cookie)
    shared = {"title": site.cfg.title, "user": visitor, "csrf_token": csrf_token, "accounts": site.accounts}
    html = site.templates.get_template(template).render(shared | context)
    response = HTMLResponse(html, status_code=status)
    if cookie and cookie != request.cookies.get(site.cookie("visitor")):
        site.set_cookie(response, "visitor", cookie)
    return response


@router.get("/")
def label_page(request: Request, site: SiteOf, visitor: Anyone) -> Response:
    """The labeling page; who only looks on is sent to the figures."""
    if visitor.role == "viewer":
        return RedirectResponse("/admin", 303)
    return page(request, "label.html.j2", visitor, instructions_html=markdown_html(site.cfg.instructions))


@router.api_route("/healthz", methods=["GET", "HEAD"])
def healthz(site: SiteOf) -> JSONResponse:
    """For monitoring and load balancers: the server answers, and so does its database."""
    with site.store.read() as session:
        session.execute(text("SELECT 1"))
    return JSONResponse({"status": "ok"})


@router.get("/login")
def login_page(request: Request, site: SiteOf) -> Response:
    """Name and password; who is logged in already goes on."""
    if not site.accounts or visitor_of(request):
        return RedirectResponse("/", 303)
    return page(request, "login.html.j2", None, error=None, name="")


@router.post("/login")
def log_in(request: Request, site: SiteOf, form: Form, address: Address) -> Response:
    """A new session, in place of the one before; what was wrong is said on the page."""
    name = form.get("name", "")
    try:
        site.limits.logins_by_name.take(accounts.one_form(name).casefold())
        token = accounts.login(site.store, name, form.get("password", ""), address)
    except Refused as refused:
        if refused.status != 401:
            raise
        return page(request, "login.html.j2", None, status=401, error=refused, name=name)
    site.limits.secrets_by_address.give_back(address)
    site.limits.logins_by_name.give_back(accounts.one_form(name).casefold())
    return _logged_in(request, site, token)


@router.post("/logout")
def log_out(request: Request, site: SiteOf, visitor: Anyone) -> Response:
    """The session ends on the server too."""
    accounts.end_session(site.store, request.cookies.get(site.cookie("session"), ""), visitor.user_id)
    response = RedirectResponse("/login", 303)
    site.drop_cookie(response, "session")
    return response


@router.get("/invite/{token}")
def invite_page(request: Request, site: SiteOf, token: str, address: Address) -> Response:
    """Choose a name and a password, or a new password."""
    invited = accounts.invitation(site.store, token)
    site.limits.secrets_by_address.give_back(address)
    return page(request, "invite.html.j2", None, error=None, name="", invited=invited)


@router.post("/invite/{token}")
def accept_invite(request: Request, site: SiteOf, token: str, form: Form, address: Address) -> Response:
    """The account, or its new password; logged in at once."""
    name = form.get("name", "")
    try:
        user_id = accounts.accept_invite(site.store, token, name, form.get("password", ""))
    except Refused as refused:
        if refused.status not in (409, 422):
            raise
        invited = accounts.invitation(site.store, token)
        return page(request, "invite.html.j2", None, status=refused.status, error=refused, name=name, invited=invited)
    site.limits.secrets_by_address.give_back(address)
    return _logged_in(request, site, accounts.start_session(site.store, user_id, address))


@router.get("/password")
def password_page(request: Request, site: SiteOf, visitor: Anyone) -> Response:
    """Choose another password."""
    _need_accounts(site)
    return page(request, "password.html.j2", visitor, error=None)


@router.post("/password")
def change_password(request: Request, site: SiteOf, visitor: Anyone, form: Form) -> Response:
    """Another password; all other browsers are logged out."""
    _need_accounts(site)
    site.limits.logins_by_name.take(visitor.name.casefold())  # a session that was left open is no way to guess
    try:
        accounts.change_password(site.store, visitor.user_id, form.get("current", ""), form.get("password", ""))
    except Refused as refused:
        if refused.status != 422:
            raise
        return page(request, "password.html.j2", visitor, status=422, error=refused)
    site.limits.logins_by_name.give_back(visitor.name.casefold())
    return _logged_in(request, site, accounts.start_session(site.store, visitor.user_id, address_of(request)))


def _need_accounts(site: Site) -> None:
    if not site.accounts:
        raise Refused(404, "there are no accounts here", fix="open /")


def _logged_in(request: Request, site: Site, token: str) -> Response:
    """A session that the browser had before ends: nobody's chosen cookie survives a login.

    An admin sees the figures first: the labeling page would take an item, and keep it from the annotators.
    """
    if before := request.cookies.get(site.cookie("session")):
        accounts.end_session(site.store, before, None)
    visitor = accounts.visitor_of(site.store, token)
    response = RedirectResponse("/admin" if visitor and visitor.role == "admin" else "/", 303)
    site.set_cookie(response, "session", token)
    return response
