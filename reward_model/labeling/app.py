"""The web application of a labeling project: its routes, what guards them, and how errors are told."""

from __future__ import annotations

import logging
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from sqlalchemy.exc import DBAPIError, OperationalError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from reward_model.labeling import accounts, admin_pages, api, pages
from reward_model.labeling.access import Site
from reward_model.labeling.database import trouble_of
from reward_model.labeling.security import HEADERS, Guard, Refused, check_bind
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import LabelingStage
from rlhf.errors import LabelError, LeaseError
from rlhf.eval.pages import page_environment

HERE = Path(__file__).resolve().parent
_log = logging.getLogger(__name__)


class Static(StaticFiles):
    """Files that are kept by browsers and asked for anew by their ETag: a new version shows at once."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """As the base class."""
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


def make_app(store: LabelStore, cfg: LabelingStage) -> FastAPI:
    """The application; the caller opens and closes the store.

    Raises:
        ConfigError: it would be open to other machines without accounts.
    """
    check_bind(cfg.serve)
    if cfg.serve.accounts:
        accounts.nobodys_hash()  # made now: the first unknown name would take twice as long
    # No pages about the API, and no slash added to paths: every path here is one of ours, as it is.
    app = FastAPI(title=cfg.title, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.site = site = Site(store, cfg, page_environment(HERE / "templates"))
    app.include_router(api.router)
    app.include_router(pages.router)
    app.include_router(admin_pages.router)
    app.mount("/static", Static(directory=HERE / "static"))
    app.add_middleware(Guard, serve=cfg.serve, limiter=site.limits.address, refuse=refuse)
    for kind in _REASONS:
        app.add_exception_handler(kind, lambda request, error: refuse(request, _REASONS[_known(error)](error)))
    app.add_exception_handler(Exception, _failed)
    return app


def refuse(request: Request, refused: Refused) -> Response:
    """An error as JSON to scripts, as a calm page to people; who must log in is sent there."""
    headers = {"Retry-After": str(max(1, round(refused.retry_after)))} if refused.retry_after else {}
    if request.url.path.startswith("/api/"):
        content = {"error": refused.message, "fix": refused.fix}
        return JSONResponse(content, status_code=refused.status, headers=headers)
    if refused.status == 401 and request.method == "GET":
        return RedirectResponse("/login", 303)
    response = pages.page(request, "error.html.j2", None, status=refused.status, error=refused)
    response.headers.update(headers)
    return response


def _failed(request: Request, error: Exception) -> Response:
    """A bug of ours; its traceback goes to the server's log. This response passes no middleware."""
    refused = Refused(500, "something went wrong on the server", fix="try again; if it stays, tell the admin")
    response = refuse(request, refused)
    response.headers.update(HEADERS | {"Cache-Control": "no-store"})
    return response


def _invalid(error: RequestValidationError) -> Refused:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
    return Refused(422, f"{where}: {first['msg']}", fix="reload the page; a program sends what the API describes")


def _http(error: HTTPException) -> Refused:
    fix = "open /" if error.status_code == 404 else "reload the page"
    return Refused(error.status_code, HTTPStatus(error.status_code).phrase.lower(), fix=fix)


def _database(error: DBAPIError) -> Refused:
    """Of a database that is in trouble; any other error of a statement is a bug of ours."""
    if (trouble := trouble_of(error)) is not None:
        why, fix = trouble
        _log.error("the database cannot be written, %s: %s; %s", why, error.orig, fix)
        told = "tell the admin; what was stored before is safe, and the server goes on by itself once this is mended"
        return Refused(503, f"the database cannot be written: {why}", fix=told, retry_after=30)
    if not isinstance(error, OperationalError):
        raise error
    _log.error("the database does not answer: %s", error.orig)
    return Refused(503, "the database is busy", fix="try again in a few seconds", retry_after=2)


_REASONS: dict[type[Exception], Any] = {
    Refused: lambda error: error,
    LeaseError: lambda error: Refused(409, error.message, fix=error.fix),
    LabelError: lambda error: Refused(422, error.message, fix=error.fix),
    RequestValidationError: _invalid,
    HTTPException: _http,
    DBAPIError: _database,
}


def _known(error: Exception) -> type[Exception]:
    return next(kind for kind in _REASONS if isinstance(error, kind))
