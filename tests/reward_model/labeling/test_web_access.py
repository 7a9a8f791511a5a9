"""Every role against every route, and what a request must carry before any route sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from label_client import Browser, Web
from starlette.routing import Mount

ROLES = ("nobody", "viewer", "annotator", "admin")

# Route -> the status by role. 303 of a GET is the way to /login (nobody) or to /admin (viewer at /).
TABLE: dict[tuple[str, str], tuple[int, int, int, int]] = {
    ("GET", "/"): (303, 303, 200, 200),
    ("GET", "/healthz"): (200, 200, 200, 200),
    ("HEAD", "/healthz"): (200, 200, 200, 200),
    ("GET", "/login"): (200, 303, 303, 303),
    ("POST", "/login"): (401, 401, 401, 401),
    ("POST", "/logout"): (401, 303, 303, 303),
    ("GET", "/invite/{token}"): (404, 404, 404, 404),
    ("POST", "/invite/{token}"): (404, 404, 404, 404),
    ("GET", "/password"): (303, 200, 200, 200),
    ("POST", "/password"): (401, 422, 422, 422),
    ("GET", "/api/task"): (401, 403, 200, 200),
    ("POST", "/api/judgments"): (401, 403, 422, 422),
    ("POST", "/api/undo"): (401, 403, 200, 200),
    ("POST", "/api/renew"): (401, 403, 422, 422),
    ("GET", "/admin"): (303, 200, 403, 200),
    ("GET", "/admin/audit"): (303, 403, 403, 200),
    ("POST", "/admin/invites"): (401, 403, 403, 200),
    ("POST", "/admin/invites/{invite_id}/withdraw"): (401, 403, 403, 404),
    ("POST", "/admin/users/{user_id}/role"): (401, 403, 403, 404),
    ("POST", "/admin/users/{user_id}/deactivate"): (401, 403, 403, 404),
    ("POST", "/admin/users/{user_id}/activate"): (401, 403, 403, 404),
    ("POST", "/admin/users/{user_id}/reset"): (401, 403, 403, 404),
    ("POST", "/admin/users/{user_id}/unpause"): (401, 403, 403, 404),
    ("POST", "/admin/items/{item_id}/reopen"): (401, 403, 403, 422),
    ("POST", "/admin/items/{item_id}/retire"): (401, 403, 403, 422),
}
BODIES: dict[str, Any] = {
    "/api/judgments": {"assignment_id": 999, "submission_id": "12345678", "choice": "skip"},
    "/api/undo": {},
    "/api/renew": {"assignment_id": 999},
}
FORMS = {
    "/login": {"name": "nobody", "password": "no password"},
    "/invite/{token}": {"name": "x", "password": "0123456789"},
    "/password": {"current": "no password", "password": "0123456789"},
    "/admin/invites": {"role": "viewer"},
    "/admin/users/{user_id}/role": {"role": "viewer"},
}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    web = Web(tmp_path_factory.mktemp("labels"))
    yield web
    web.store.close()


@pytest.fixture(scope="module")
def browsers(web: Web) -> dict[str, Browser]:
    return {"nobody": web.browser()} | {role: web.invited(role, role) for role in ROLES[1:]}


def routes(holder: Any) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for route in holder.routes:
        if included := getattr(route, "original_router", None):  # newer versions of FastAPI keep routers whole
            found |= routes(included)
        elif isinstance(route, Mount):
            assert route.path == "/static"
        else:
            assert isinstance(route, APIRoute), f"{route} is of no kind that this table knows"
            found |= {(method, route.path) for method in route.methods}
    return found


def csrf_for(browser: Browser, role: str, path: str) -> str:
    """The token that a page gives for this route: where one logs in it is the anonymous one."""
    if role == "nobody" or path in ("/login", "/invite/{token}"):
        return browser.csrf("/no-such-page")
    return browser.csrf("/admin" if role == "viewer" else "/")


def ask(browser: Browser, method: str, path: str, csrf: str, **headers: str) -> Any:
    url = path.format(token="no-such-token", user_id=999, item_id=999, invite_id=999)
    headers = {"Origin": browser.origin} | headers
    if method in ("GET", "HEAD"):
        return browser.http.request(method, url, headers=headers)
    if path.startswith("/api/"):
        return browser.http.post(url, json=BODIES[path], headers={"X-CSRF-Token": csrf.encode()} | headers)
    return browser.http.post(url, data={"csrf_token": csrf} | FORMS.get(path, {}), headers=headers)


def test_the_table_has_every_route(web: Web) -> None:
    assert routes(web.app) == set(TABLE)


@pytest.mark.parametrize(("method", "path"), TABLE, ids=[" ".join(route) for route in TABLE])
def test_every_role_may_what_the_table_says(web: Web, browsers: dict[str, Browser], method: str, path: str) -> None:
    if path == "/logout":
        browsers = {"nobody": web.browser()} | {role: web.invited(f"leaving {role}", role) for role in ROLES[1:]}
    answers = {role: ask(browser, method, path, csrf_for(browser, role, path)) for role, browser in browsers.items()}
    assert tuple(answer.status_code for answer in answers.values()) == TABLE[method, path]
    for answer in answers.values():
        assert answer.headers["content-security-policy"].startswith("default-src 'self'; script-src 'self'; ")
        assert answer.headers["cache-control"] == "no-store"
        if path.startswith("/api/") and answer.status_code >= 400:
            assert sorted(answer.json()) == ["error", "fix"]
            assert all(answer.json().values())
        elif answer.status_code >= 400:
            assert "<!doctype html>" in answer.text


CHANGING = [path for method, path in TABLE if method == "POST"]


@pytest.mark.parametrize("path", CHANGING)
def test_nothing_is_changed_without_the_page_s_token(browsers: dict[str, Browser], path: str) -> None:
    role = "nobody" if path in ("/login", "/invite/{token}") else "admin"
    for wrong in ("", "0" * 64, "\u00e9", browsers["viewer"].csrf("/admin")):
        answer = ask(browsers[role], "POST", path, wrong)
        assert answer.status_code == 403, wrong
        assert "reload the page" in answer.text.lower()


@pytest.mark.parametrize("path", CHANGING)
@pytest.mark.parametrize("origin", ["", "null", "http://evil.example", "https://127.0.0.1:8420", "http://127.0.0.1:9"])
def test_nothing_is_changed_from_another_site(browsers: dict[str, Browser], path: str, origin: str) -> None:
    role = "nobody" if path in ("/login", "/invite/{token}") else "admin"
    answer = ask(browsers[role], "POST", path, csrf_for(browsers[role], role, path), Origin=origin)
    assert answer.status_code == 403
    assert "another site" in answer.text


def test_a_request_without_an_origin_changes_nothing(browsers: dict[str, Browser]) -> None:
    admin = browsers["admin"]
    answer = admin.http.post("/api/undo", json={}, headers={"X-CSRF-Token": admin.csrf()})
    assert (answer.status_code, answer.json()["error"]) == (403, "the request comes from another site")
