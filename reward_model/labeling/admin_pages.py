"""The admin's pages: figures for those who look on, and what admins do with people and items."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import RedirectResponse
from starlette.responses import Response

from reward_model.labeling import accounts, figures, moderation
from reward_model.labeling.access import Admin, Form, Onlooker, Site, SiteOf
from reward_model.labeling.accounts import Visitor
from reward_model.labeling.links import note_of, url_of
from reward_model.labeling.pages import page
from reward_model.labeling.security import is_loopback

router = APIRouter(prefix="/admin")

FIGURES = {
    "pairs": {
        "raw": "Raw agreement",
        "alpha_nominal": "Krippendorff's alpha, side",
        "alpha_ordinal": "Krippendorff's alpha, strength",
        "fleiss_kappa": "Fleiss' kappa",
    },
    "rankings": {"kendall_tau": "Kendall's tau", "kendall_w": "Kendall's W"},
}
"""Keys of `reliability.agreement_report`, and what they are called on the page."""

Id = Annotated[int, Path(ge=1, lt=2**31)]
Before = Annotated[int | None, Query(ge=1, lt=2**31)]


@router.get("")
def overview(request: Request, site: SiteOf, visitor: Onlooker) -> Response:
    """Progress, agreement, annotators, flagged items, people."""
    return _overview(request, site, visitor)


@router.post("/invites")
def invite(request: Request, site: SiteOf, visitor: Admin, form: Form) -> Response:
    """A new invite link; it is shown this once, since only its hash is kept."""
    role = form.get("role", "")
    token = accounts.create_invite(site.store, role, visitor.user_id)
    return _overview(request, site, visitor, token=token, link_for=f"the new {role}")


@router.post("/invites/{invite_id}/withdraw")
def withdraw(site: SiteOf, visitor: Admin, invite_id: Id) -> Response:
    """An invite link that nobody used stops to work."""
    accounts.withdraw_invite(site.store, visitor.user_id, invite_id)
    return _back("users")


@router.post("/users/{user_id}/role")
def set_role(site: SiteOf, visitor: Admin, user_id: Id, form: Form) -> Response:
    """Another role, from the user's next request on."""
    accounts.set_role(site.store, visitor.user_id, user_id, form.get("role", ""))
    return _back("users")


@router.post("/users/{user_id}/deactivate")
def deactivate(site: SiteOf, visitor: Admin, user_id: Id) -> Response:
    """The user's sessions end at once; what they said stays."""
    accounts.set_active(site.store, visitor.user_id, user_id, False)
    return _back("users")


@router.post("/users/{user_id}/activate")
def activate(site: SiteOf, visitor: Admin, user_id: Id) -> Response:
    """The user may log in again."""
    accounts.set_active(site.store, visitor.user_id, user_id, True)
    return _back("users")


@router.post("/users/{user_id}/reset")
def reset(request: Request, site: SiteOf, visitor: Admin, user_id: Id) -> Response:
    """A link by which the user chooses a new password; it is shown this once."""
    token, name = accounts.create_reset(site.store, visitor.user_id, user_id)
    return _overview(request, site, visitor, token=token, link_for=f"{name}, to choose a new password")


@router.post("/users/{user_id}/unpause")
def unpause(site: SiteOf, visitor: Admin, user_id: Id) -> Response:
    """An annotator whom gold questions stopped goes on."""
    accounts.unpause(site.store, visitor.user_id, user_id)
    return _back("users")


@router.post("/items/{item_id}/reopen")
def reopen(site: SiteOf, visitor: Admin, item_id: Id) -> Response:
    """A flagged item goes back to the annotators."""
    moderation.reopen(site.store, visitor.user_id, item_id)
    return _back("flagged")


@router.post("/items/{item_id}/retire")
def retire(site: SiteOf, visitor: Admin, item_id: Id) -> Response:
    """A flagged item is out for good."""
    moderation.retire(site.store, visitor.user_id, item_id)
    return _back("flagged")


@router.get("/audit")
def audit(request: Request, site: SiteOf, visitor: Admin, before: Before = None) -> Response:
    """Who did what, and when."""
    with site.store.read() as session:
        events = figures.events(session, before)
    older = events[-1].id if len(events) == figures.SHOWN else None
    return page(request, "audit.html.j2", visitor, events=events, older=older)


def _overview(
    request: Request, site: Site, visitor: Visitor, *, token: str | None = None, link_for: str = ""
) -> Response:
    now = site.store.clock()
    with site.store.read() as session:
        context = {
            "states": figures.items_by_state(session),
            "days": figures.judgments_per(session, now, figures.DAY_MS, figures.DAYS),
            "hours": figures.judgments_per(session, now, figures.HOUR_MS, figures.HOURS),
            "seconds": figures.seconds_per_item(session),
            "flagged": figures.flagged_items(session),
            "users": figures.users(session),
            "invites": figures.open_invites(session, now),
        }
    context |= {"progress": site.store.progress(), "report": site.agreement.report(), "figure_names": FIGURES}
    context |= {"report_failed": site.agreement.failed}
    context |= {"is_admin": visitor.role == "admin", "roles": accounts.ROLES, "link_for": link_for}
    base = _base(request, site)
    link = f"{base}/invite/{token}" if token else None
    context |= {"link": link, "link_note": note_of(site.cfg.serve, base)}
    return page(request, "admin.html.j2", visitor, **context)


def _base(request: Request, site: Site) -> str:
    """What a link begins with: as this admin came here, unless they sit at the server and others do not."""
    serve, url = site.cfg.serve, str(request.base_url).rstrip("/")
    if serve.public_url or (is_loopback(request.url.hostname or "") and not is_loopback(serve.host)):
        return url_of(serve, serve.port or request.url.port or 80)  # a tunnel has a port of its own
    return url


def _back(part: str) -> Response:
    """To the page again, by GET: a reload does nothing twice."""
    return RedirectResponse(f"/admin#{part}", 303)
