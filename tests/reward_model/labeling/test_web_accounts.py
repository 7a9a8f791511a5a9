"""Invites, passwords, sessions and roles over HTTP, and what the audit log says of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from label_client import PASSWORD, Browser, Web, kinds, log_in
from sqlalchemy import select

from reward_model.labeling import accounts, figures
from reward_model.labeling.schema import InviteRow, SessionRow, UserRow
from reward_model.labeling.security import Refused

COOKIE = "rlhf_8420_session"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    web = Web(tmp_path)
    yield web
    web.store.close()


def rows(web: Web, table: Any) -> list[Any]:
    with web.store.read() as session:
        return list(session.scalars(select(table)))


def log_of(web: Web) -> list[figures.Event]:
    """The oldest first."""
    with web.store.read() as session:
        return figures.events(session)[::-1]


def id_of(web: Web, name: str) -> int:
    return next(user.id for user in rows(web, UserRow) if user.name == name)


# --- invites --------------------------------------------------------------------------------------------------


def test_an_invite_makes_one_account(web: Web) -> None:
    token = accounts.create_invite(web.store, "viewer", None)
    path = f"/invite/{token}"
    browser = web.browser()
    page = browser.get(path)
    assert page.status_code == 200
    assert "<b>viewer</b>" in page.text
    assert browser.form(path, {"name": " Ada  L. ", "password": PASSWORD}, seen=path).status_code == 303
    (ada,) = rows(web, UserRow)
    assert (ada.name, ada.role, ada.labeler, ada.active) == ("Ada L.", "viewer", "person", True)
    assert browser.get("/admin").status_code == 200

    again = web.browser().form(path, {"name": "eve", "password": PASSWORD}, seen="/no-such-page")
    assert again.status_code == 404
    assert "it was used, or is too old" in again.text
    assert len(rows(web, UserRow)) == 1


def test_neither_invite_nor_session_nor_password_can_be_read_from_the_database(web: Web) -> None:
    token = accounts.create_invite(web.store, "admin", None)
    path = f"/invite/{token}"
    browser = web.browser()
    browser.form(path, {"name": "ada", "password": PASSWORD}, seen=path)
    session = browser.http.cookies[COOKIE]
    web.store.close()
    stored = b"".join(file.read_bytes() for file in Path(web.cfg.run_dir).iterdir())
    assert b"$argon2id$v=19$m=19456,t=2,p=1$" in stored
    for secret in (token, session, PASSWORD):
        assert secret.encode() not in stored


def test_an_invite_expires_after_seven_days(web: Web) -> None:
    path = f"/invite/{accounts.create_invite(web.store, 'annotator', None)}"
    web.clock.ms += 7 * 24 * 3_600_000 - 1
    assert web.browser().get(path).status_code == 200
    web.clock.ms += 1
    assert web.browser().get(path).status_code == 404
    assert web.browser().form(path, {"name": "a", "password": PASSWORD}, seen="/x").status_code == 404
    assert rows(web, UserRow) == []


def test_a_withdrawn_invite_is_dead_and_a_new_first_invite_ends_the_one_before(web: Web) -> None:
    admin = web.invited("ada", "admin")
    token = accounts.create_invite(web.store, "annotator", 1)
    invite = rows(web, InviteRow)[-1]
    assert admin.form(f"/admin/invites/{invite.id}/withdraw").status_code == 303
    assert web.browser().get(f"/invite/{token}").status_code == 404
    first, second = accounts.first_admin_invite(web.store), accounts.first_admin_invite(web.store)
    assert web.browser().get(f"/invite/{first}").status_code == 404
    assert web.browser().get(f"/invite/{second}").status_code == 200


@pytest.mark.parametrize(
    ("name", "password", "status", "said"),
    [
        ("", PASSWORD, 422, "this name will not do"),
        ("a" * 65, PASSWORD, 422, "this name will not do"),
        ("a<script>", PASSWORD, 422, "this name will not do"),
        ("ada\u202e", PASSWORD, 422, "this name will not do"),
        ("ADA", PASSWORD, 409, "the name ada is taken"),
        ("\uff21da", PASSWORD, 409, "the name ada is taken"),
        ("bob", "123456789", 422, "the password has 9 characters"),
        ("bob", "x" * 201, 422, "the password has 201 characters"),
    ],
)
def test_a_name_or_password_that_will_not_do_leaves_the_invite_open(
    web: Web, name: str, password: str, status: int, said: str
) -> None:
    web.invited("ada")
    path = f"/invite/{accounts.create_invite(web.store, 'annotator', None)}"
    browser = web.browser()
    answer = browser.form(path, {"name": name, "password": password}, seen=path)
    assert (answer.status_code, said.lower() in answer.text.lower()) == (status, True)
    assert "a<script>" not in answer.text
    assert browser.form(path, {"name": "bob", "password": PASSWORD}, seen=path).status_code == 303


def test_an_admin_s_link_sets_a_password_anew_once(web: Web) -> None:
    root, ada = web.invited("root", "admin"), web.invited("ada")
    links = [
        re.search(r"/invite/[\w-]+", root.form(f"/admin/users/{id_of(web, 'ada')}/reset").text)[0] for _ in range(2)
    ]
    assert web.browser().get(links[0]).status_code == 404, "the later link ends the one before"
    assert "new password of <bdi>ada</bdi>" in root.get("/admin").text
    assert ada.get("/api/task").status_code == 200, "nothing has happened yet"
    browser = web.browser()
    assert "<bdi>ada</bdi>" in browser.get(links[1]).text
    fields = {"name": "mallory", "password": "another long one"}
    assert browser.form(links[1], fields | {"password": "short"}, seen=links[1]).status_code == 422
    assert browser.form(links[1], fields, seen=links[1]).status_code == 303
    assert browser.get("/api/task").status_code == 200
    assert ada.get("/api/task").status_code == 401, "whoever knew the old password is out"
    assert log_in(web.browser(), "ada").status_code == 401
    assert log_in(web.browser(), "ada", "another long one").status_code == 303
    assert [(user.name, user.role) for user in rows(web, UserRow)] == [("root", "admin"), ("ada", "annotator")]
    assert web.browser().form(links[1], fields, seen="/x").status_code == 404
    assert {"password_link_created", "password_reset"} <= set(kinds(log_of(web)))


def test_a_deactivated_user_s_password_link_is_dead(web: Web) -> None:
    root, _ = web.invited("root", "admin"), web.invited("ada")
    ada = id_of(web, "ada")
    token, _ = accounts.create_reset(web.store, id_of(web, "root"), ada)
    root.form(f"/admin/users/{ada}/deactivate")
    assert web.browser().get(f"/invite/{token}").status_code == 404


# --- login and sessions ---------------------------------------------------------------------------------------


def test_login_logout_and_cookie(web: Web) -> None:
    web.invited("Ärger")
    browser = web.browser()
    answer = log_in(browser, "ärger")  # SQLite's lower() knows ASCII only
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert re.fullmatch(rf"{COOKIE}=[\w-]{{43}}; HttpOnly; Max-Age=604800; Path=/; SameSite=strict", cookie)
    assert browser.get("/").status_code == 200
    token = browser.http.cookies[COOKIE]
    assert browser.form("/logout").headers["location"] == "/login"
    assert COOKIE not in browser.http.cookies
    browser.http.cookies.set(COOKIE, token)  # a copy of the cookie is worth nothing now
    assert browser.get("/api/task").status_code == 401


def test_a_changed_password_ends_all_other_sessions(web: Web) -> None:
    ada, elsewhere = web.invited("ada"), web.browser()
    log_in(elsewhere, "ada")
    new = "another long one"
    for wrong, said in [({"current": "wrong", "password": new}, "current"), ({"current": PASSWORD}, "0 characters")]:
        answer = ada.form("/password", wrong)
        assert (answer.status_code, said in answer.text) == (422, True)
    assert elsewhere.get("/api/task").status_code == 200
    assert ada.form("/password", {"current": PASSWORD, "password": new}).status_code == 303
    assert ada.get("/api/task").status_code == 200
    assert elsewhere.get("/api/task").status_code == 401
    assert [log_in(web.browser(), "ada", password).status_code for password in (PASSWORD, new)] == [401, 303]
    assert kinds(log_of(web)).count("password_changed") == 1


def test_an_open_session_is_no_way_to_guess_its_password(web: Web) -> None:
    ada = web.invited("ada")
    tries = [ada.form("/password", {"current": f"guess {n}", "password": "x" * 10}).status_code for n in range(11)]
    assert tries == [422] * 10 + [429]


def test_cookies_demand_https_where_the_site_has_it(tmp_path: Path) -> None:
    web = Web(tmp_path, serve={"public_url": "https://labels.example.org"})
    browser = web.invited("ada", base="https://labels.example.org")
    cookie = log_in(web.browser(base="https://labels.example.org"), "ada").headers["set-cookie"]
    assert cookie.startswith("__Host-rlhf_8420_session=")
    assert "; Secure" in cookie
    assert browser.get("/").status_code == 200
    web.store.close()


def test_a_session_ends_after_seven_days_and_is_cleared_away(web: Web) -> None:
    browser = web.invited("ada")
    web.clock.ms += 7 * 24 * 3_600_000 - 1
    assert browser.get("/api/task").status_code == 200
    web.clock.ms += 1
    assert browser.get("/api/task").status_code == 401
    assert browser.get("/").headers["location"] == "/login"
    log_in(browser, "ada")
    assert len(rows(web, SessionRow)) == 1


def test_a_login_never_takes_over_the_session_that_the_browser_brought(web: Web) -> None:
    eve = web.invited("eve")
    web.invited("ada")
    planted = eve.http.cookies[COOKIE]
    victim = web.browser()
    victim.http.cookies.set(COOKIE, "chosen-by-somebody")
    assert log_in(victim, "ada").status_code == 303
    assert victim.http.cookies.get(COOKIE, domain="127.0.0.1") not in (None, "chosen-by-somebody")

    other = web.browser()
    other.http.cookies.set(COOKIE, planted, domain="127.0.0.1")
    other.form("/login", {"name": "ada", "password": PASSWORD}, seen="/no-such-page")
    assert other.http.cookies[COOKIE] != planted
    assert eve.get("/api/task").status_code == 401  # the session that was there before has ended


def test_a_session_s_token_is_not_the_next_one_s(web: Web) -> None:
    browser = web.invited("ada")
    first, csrf = browser.http.cookies[COOKIE], browser.csrf()
    browser.form("/logout")
    log_in(browser, "ada")
    assert browser.http.cookies[COOKIE] != first
    assert browser.csrf() != csrf
    assert browser.http.post("/api/undo", json={}, headers=headers(browser, csrf)).status_code == 403


def headers(browser: Browser, csrf: str) -> dict[str, str]:
    return {"Origin": browser.origin, "X-CSRF-Token": csrf}


def test_every_failed_login_looks_the_same_and_verifies_one_hash(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.invited("ada")
    web.invited("gone")
    accounts.set_active(web.store, 1, id_of(web, "gone"), False)
    web.store.ensure_user("judge", role="annotator", labeler="judge")
    verified: list[str] = []

    class Counting:
        def __init__(self, hasher: Any) -> None:
            self.hash = hasher.hash
            self.inner = hasher

        def verify(self, stored: str, password: bytes) -> bool:
            verified.append(stored.rpartition("$")[0].rpartition("$")[0])
            return self.inner.verify(stored, password)

    monkeypatch.setattr(accounts, "HASHER", Counting(accounts.HASHER))
    attempts = [("ada", "wrong password"), ("nobody", PASSWORD), ("gone", PASSWORD), ("judge", PASSWORD), ("", "")]
    pages = set()
    for name, password in attempts:
        answer = log_in(browser := web.browser(), name, password)
        assert answer.status_code == 401
        assert COOKIE not in browser.http.cookies
        pages.add(re.sub(r'(value|content)="[^"]*"', "", answer.text))
    assert len(pages) == 1
    assert verified == ["$argon2id$v=19$m=19456,t=2,p=1"] * len(attempts)


def test_guessing_a_password_is_slowed_by_name_and_by_address(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.invited("ada")
    monkeypatch.setattr(accounts, "_verify", lambda stored, password: password == PASSWORD)
    browser = web.browser()
    assert [log_in(browser, "ada", f"guess {i}").status_code for i in range(10)] == [401] * 10
    answer = log_in(browser, " ADA", PASSWORD)
    assert answer.status_code == 429
    assert 25 <= int(answer.headers["retry-after"]) <= 30
    assert [log_in(browser, f"name {i}").status_code for i in range(60)].index(429) == 60 - 11
    assert web.browser().get("/healthz").status_code == 200


def test_logins_that_are_right_do_not_count(web: Web) -> None:
    web.invited("ada")
    assert {log_in(web.browser(), "ada").status_code for _ in range(12)} == {303}


def test_too_many_hashes_at_once_are_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.invited("ada")
    monkeypatch.setattr(accounts, "_HASHING_SECONDS", 0.0)
    with accounts._hashing(), accounts._hashing():
        answer = log_in(web.browser(), "ada")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "30")
    assert log_in(web.browser(), "ada").status_code == 303


# --- what admins do -------------------------------------------------------------------------------------------


def test_another_role_counts_from_the_next_request_on(web: Web) -> None:
    admin, ada = web.invited("root", "admin"), web.invited("ada")
    path = f"/admin/users/{id_of(web, 'ada')}/role"
    assert ada.get("/admin").status_code == 403
    assert admin.form(path, {"role": "viewer"}).headers["location"] == "/admin#users"
    assert (ada.get("/admin").status_code, ada.get("/api/task").status_code) == (200, 403)
    assert admin.form(path, {"role": "emperor"}).status_code == 422


def test_a_deactivated_user_is_out_at_once_and_may_come_back(web: Web) -> None:
    admin, ada = web.invited("root", "admin"), web.invited("ada")
    user = f"/admin/users/{id_of(web, 'ada')}"
    admin.form(f"{user}/deactivate")
    assert ada.get("/api/task").status_code == 401
    assert log_in(web.browser(), "ada").status_code == 401
    admin.form(f"{user}/activate")
    assert ada.get("/api/task").status_code == 401, "the old session came back"
    assert log_in(web.browser(), "ada").status_code == 303


def test_the_last_admin_stays(web: Web) -> None:
    admin = web.invited("root", "admin")
    web.store.ensure_user("local", role="admin")  # of the days without accounts: nobody can log in as it
    me = f"/admin/users/{id_of(web, 'root')}"
    for path, fields in ((f"{me}/role", {"role": "viewer"}), (f"{me}/deactivate", {})):
        answer = admin.form(path, fields)
        assert (answer.status_code, "No admin would be left" in answer.text) == (409, True)
    web.invited("second", "admin")
    assert admin.form(f"{me}/role", {"role": "viewer"}).status_code == 303
    assert admin.get("/admin/audit").status_code == 403


def test_unpausing_lets_old_gold_answers_no_longer_count(web: Web) -> None:
    admin, ada = web.invited("root", "admin"), web.invited("ada")
    web.add_pairs(1)
    user_id = id_of(web, "ada")
    with web.store.begin() as session:
        user = session.get_one(UserRow, user_id)
        user.paused = "too many gold questions went wrong"
    assert ada.get("/api/task").json()["paused"] == "too many gold questions went wrong"
    assert ada.get("/api/task").json()["task"] is None
    assert "too many gold questions went wrong" in admin.get("/admin").text
    assert admin.form(f"/admin/users/{user_id}/unpause").status_code == 303
    answer = ada.get("/api/task").json()
    assert (answer["paused"], answer["task"] is None) == ("", False)
    assert next(user for user in rows(web, UserRow) if user.id == user_id).gold_since_ms == web.clock.ms + 1


def test_machines_are_no_people(web: Web) -> None:
    admin = web.invited("root", "admin")
    judge = web.store.ensure_user("judge", role="annotator", labeler="judge")
    assert admin.form(f"/admin/users/{judge}/role", {"role": "admin"}).status_code == 404
    assert f"/admin/users/{judge}/" not in admin.get("/admin").text


# --- the audit log --------------------------------------------------------------------------------------------


def test_the_audit_log_says_who_did_what_and_when(web: Web) -> None:
    admin = web.invited("root", "admin")
    link = re.search(r"/invite/([\w-]+)", admin.form("/admin/invites", {"role": "annotator"}).text)
    assert link
    path = f"/invite/{link[1]}"
    ada = web.browser()
    ada.form(path, {"name": "ada", "password": PASSWORD}, seen=path)
    web.add_pairs(1)
    ada.judge("flag", notes="odd")
    log_in(web.browser(), "ada", "wrong password")
    log_in(web.browser(), "secret typed as name", "x")
    user = f"/admin/users/{id_of(web, 'ada')}"
    web.clock.ms += 1000
    for act, fields in (("role", {"role": "viewer"}), ("deactivate", {}), ("activate", {}), ("unpause", {})):
        admin.form(f"{user}/{act}", fields)
    admin.form("/admin/items/1/reopen")
    admin.form("/admin/items/1/retire")
    admin.form("/logout")

    events = log_of(web)
    assert " ".join(kinds(events)) == (
        "invite_created invite_used login invite_created invite_used login login_failed login_failed "
        "role_changed user_deactivated user_activated user_unpaused item_reopened item_retired logout"
    )
    said = {event.kind: (event.who, event.detail) for event in events}
    assert said["invite_created"] == ("root", "invite=2 role=annotator")
    assert said["role_changed"] == ("root", "after=viewer before=annotator name=ada user=2")
    assert said["item_reopened"] == ("root", "after=open before=flagged item=1")
    assert said["login_failed"] == ("", "address=testclient")
    assert [event.who for event in events if event.kind == "login_failed"] == ["ada", ""]
    assert (events[0].who, events[0].when, events[-1].when) == ("", "2027-01-15 08:00:00", "2027-01-15 08:00:01")
    page = log_in(admin, "root") and admin.get("/admin/audit").text
    assert "after=viewer before=annotator name=ada user=2" in page
    assert "secret typed as name" not in page


def test_the_audit_log_goes_back_page_by_page(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    admin = web.invited("root", "admin")
    monkeypatch.setattr(figures, "SHOWN", 2)
    pages, path = [], "/admin/audit"
    while path:
        text = admin.get(path).text
        pages.append(re.findall(r"<td>(\w+)</td><td>", text))
        older = re.search(r'href="(/admin/audit\?before=\d+)"', text)
        path = older[1] if older else ""
    assert pages == [["login", "invite_used"], ["invite_created"]]


@pytest.mark.parametrize("act", [accounts.set_role, accounts.set_active, accounts.unpause])
def test_what_cannot_be_done_is_not_logged(web: Web, act: Callable[..., None]) -> None:
    argument = {accounts.set_role: ("viewer",), accounts.set_active: (False,)}.get(act, ())
    with pytest.raises(Refused, match="there is no user 5"):
        act(web.store, 1, 5, *argument)
    assert log_of(web) == []


def test_an_admin_who_logs_in_takes_no_item(web: Web) -> None:
    web.add_pairs(1)
    web.invited("root", "admin")
    browser = web.browser()
    assert log_in(browser, "root").headers["location"] == "/admin"
    assert browser.get("/admin").status_code == 200
    assert web.store.progress().open == 1
    web.invited("ada")
    assert log_in(web.browser(), "ada").headers["location"] == "/"
