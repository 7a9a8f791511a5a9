"""Binds, hosts, bodies, rates and errors: what the server refuses, and that it refuses calmly."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from label_client import ORIGIN, Browser, Web, candidates
from pydantic import ValidationError
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from starlette.requests import Request

from reward_model.labeling import security
from reward_model.labeling.database import trouble_of
from reward_model.labeling.records import Item
from reward_model.labeling.security import RateLimiter, Refused, address_of, check_bind, check_host, origin_of
from rlhf.config_labeling import ServeConfig
from rlhf.errors import ConfigError


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Web]:
    """One user on this machine, without accounts."""
    web = Web(tmp_path, serve={"accounts": False})
    web.add_pairs(3)
    yield web
    web.store.close()


# --- who may reach the server ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "serve",
    [
        {"host": "0.0.0.0"},
        {"host": "::"},
        {"host": ""},
        {"host": "192.168.1.5"},
        {"host": "my-machine"},
        {"host": "127.0.0.1.evil.example"},
        {"host": "127.0.0.1", "public_url": "https://labels.example.org"},
    ],
)
def test_no_bind_for_others_without_accounts(serve: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Web(tmp_path, serve={"accounts": False, **serve})
    assert "without accounts all of them are admins" in caught.value.message
    assert "serve.accounts: true" in caught.value.fix
    check_bind(ServeConfig(accounts=True, **serve))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_this_machine_alone_needs_no_accounts(host: str) -> None:
    check_bind(ServeConfig(host=host))


LOCAL, OPEN = ServeConfig(), ServeConfig(host="0.0.0.0", accounts=True)
PUBLIC = ServeConfig(accounts=True, public_url="https://Labels.example.org/")


@pytest.mark.parametrize(
    ("serve", "host", "welcome"),
    [
        (LOCAL, "127.0.0.1:8420", True),
        (LOCAL, "localhost:9999", True),
        (LOCAL, "LOCALHOST", True),
        (LOCAL, "[::1]:8420", True),
        (LOCAL, "192.168.1.5:8420", False),
        (LOCAL, "evil.example:8420", False),
        (LOCAL, "localhost.evil.example", False),
        (LOCAL, "localhost@evil.example", False),
        (LOCAL, "evil@localhost", False),
        (LOCAL, "localhost:80/../", False),
        (LOCAL, "", False),
        (OPEN, "192.168.1.5:8420", True),
        (OPEN, "[fe80::1]:8420", True),
        (OPEN, "evil.example", False),
        (PUBLIC, "labels.example.org", True),
        (PUBLIC, "127.0.0.1:8420", True),
        (PUBLIC, "192.168.1.5:8420", False),
        (PUBLIC, "other.example.org", False),
    ],
)
def test_only_names_of_ours_are_answered(serve: ServeConfig, host: str, welcome: bool) -> None:
    """A page whose name was rebound to this address asks under that name."""
    if welcome:
        check_host(host, serve)
    else:
        with pytest.raises(Refused, match="is not this server's name") as caught:
            check_host(host, serve)
        assert caught.value.status == 421


def test_a_rebound_name_reads_nothing(local: Web) -> None:
    answer = local.browser().http.get("/api/task", headers={"Host": "evil.example:8420"})
    assert (answer.status_code, sorted(answer.json())) == (421, ["error", "fix"])
    assert "question" not in answer.text


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Labels.example.org/", "https://labels.example.org"),
        ("https://labels.example.org:443/a/b", "https://labels.example.org"),
        ("http://labels.example.org:8420", "http://labels.example.org:8420"),
        ("http://[::1]:80/", "http://[::1]"),
    ],
)
def test_an_origin_is_written_as_browsers_write_it(url: str, origin: str) -> None:
    assert origin_of(url) == origin


@pytest.mark.parametrize(
    "url", ["labels.example.org", "ftp://labels.example.org", "https://labels.example.org/x", "https://a.org:99999"]
)
def test_a_public_url_that_no_browser_can_open_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="public_url"):
        ServeConfig(accounts=True, public_url=url)


def test_behind_a_proxy_the_public_origin_counts(tmp_path: Path) -> None:
    """Some proxies pass their own name for us on as Host; the browser's Origin stays the public one."""
    web = Web(tmp_path, serve={"public_url": "http://labels.example.org"})
    ada = web.invited("ada", base="http://labels.example.org")
    body = {"json": {}, "headers": {"X-CSRF-Token": ada.csrf(), "Origin": "http://labels.example.org"}}
    assert ada.http.post("/api/undo", **body).status_code == 200
    body["headers"]["Origin"] = "http://127.0.0.1:8420"
    assert ada.http.post("/api/undo", **body).status_code == 403
    web.store.close()


# --- one user without login -----------------------------------------------------------------------------------


def test_the_local_user_labels_and_sees_the_figures_without_login(local: Web) -> None:
    browser = local.browser()
    assert "Log out" not in browser.get("/").text
    assert browser.judge().json()["progress"]["judged"] == 1
    assert browser.get("/admin").status_code == 200
    assert "Make an invite link" not in browser.get("/admin").text
    assert browser.get("/login").headers["location"] == "/"
    for path in ("/login", "/invite/x"):
        answer = browser.form(path)
        assert (answer.status_code, "There are no accounts here" in answer.text) == (404, True)


def test_the_local_user_s_token_belongs_to_the_browser(local: Web) -> None:
    one, other = local.browser(), local.browser()
    csrf = one.csrf()
    assert csrf == one.csrf(), "a page that is open longer would stop to work"
    headers = {"Origin": ORIGIN, "X-CSRF-Token": csrf}
    assert one.http.post("/api/undo", json={}, headers=headers).status_code == 200
    assert other.http.post("/api/undo", json={}, headers=headers).status_code == 403
    assert other.csrf() != csrf
    assert other.http.post("/api/undo", json={}, headers=headers).status_code == 403


# --- bodies ---------------------------------------------------------------------------------------------------


def test_a_long_body_is_refused_by_what_it_says_and_by_what_it_is(local: Web) -> None:
    browser = local.browser()
    headers = {"Origin": ORIGIN, "X-CSRF-Token": browser.csrf(), "Content-Type": "application/json"}

    def chunks(n: int) -> Iterator[bytes]:
        for _ in range(n):
            yield b" " * 1024

    for body in (b" " * 65_537, chunks(65), b"{}" + b" " * (10**6)):
        answer = browser.http.post("/api/undo", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (413, "the request is longer than 65,536 bytes")
    assert browser.http.post("/api/undo", content=b"{}" + b" " * 65_534, headers=headers).status_code == 200


def test_a_slow_body_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "BODY_SECONDS", 0.01)

    async def never() -> Any:
        await asyncio.sleep(60)

    request = Request({"type": "http", "method": "POST", "headers": [], "path": "/"}, never)
    with pytest.raises(Refused, match="took too long") as caught:
        asyncio.run(security._read_body(request))
    assert caught.value.status == 408


def test_who_hangs_up_in_the_middle_of_a_body_is_no_bug_of_ours(local: Web) -> None:
    browser = local.browser()
    cookie = f"rlhf_8420_visitor={browser.get('/') and browser.http.cookies['rlhf_8420_visitor']}"
    headers = {"host": "127.0.0.1:8420", "origin": ORIGIN, "cookie": cookie, "content-length": "20"}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/api/undo",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
    }
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(local.app(scope, receive, send))
    assert (sent, messages) == ([], [])


ANSWER = {"assignment_id": 1, "submission_id": "abcdefgh", "choice": "compare", "value": 1}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"value": 4}, "value"),
        ({"value": "1"}, "value"),
        ({"value": True}, "value"),
        ({"choice": "undo"}, "choice"),
        ({"confidence": 0}, "confidence"),
        ({"confidence": 6}, "confidence"),
        ({"notes": "x" * 2001}, "notes"),
        ({"notes": "a\0b"}, "notes"),
        ({"ranks": [0, 1]}, "ranks.0"),
        ({"ranks": [1] * 101}, "ranks"),
        ({"submission_id": "short"}, "submission_id"),
        ({"submission_id": "spaces in it"}, "submission_id"),
        ({"submission_id": "undo-1234"}, "submission_id"),
        ({"assignment_id": 2**31}, "assignment_id"),
        ({"ms_active": -1}, "ms_active"),
        ({"extra": 1}, "extra"),
    ],
)
def test_an_answer_of_another_form_is_refused_and_named(local: Web, change: dict[str, Any], where: str) -> None:
    answer = local.browser().json("/api/judgments", {**ANSWER, **change})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith(f"{where}: ")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"notes": "\\ud800"}', b"[" * 60_000])
def test_what_is_no_json_object_is_refused(local: Web, body: bytes) -> None:
    browser = local.browser()
    headers = {"Origin": ORIGIN, "X-CSRF-Token": browser.csrf(), "Content-Type": "application/json"}
    answer = browser.http.post("/api/judgments", content=body, headers=headers)
    assert answer.status_code in (400, 422)
    assert sorted(answer.json()) == ["error", "fix"]


def test_half_a_surrogate_pair_in_notes_is_no_bug_of_ours(local: Web) -> None:
    browser = local.browser()
    task = browser.get("/api/task").json()["task"]
    headers = {"Origin": ORIGIN, "X-CSRF-Token": browser.csrf(), "Content-Type": "application/json"}
    body = b'{"assignment_id": %d, "submission_id": "abcdefgh", "choice": "skip", "notes": "\\ud800"}'
    answer = browser.http.post("/api/judgments", content=body % task["assignment_id"], headers=headers)
    assert answer.status_code == 422


def test_a_form_is_no_json_and_json_no_form(local: Web) -> None:
    browser = local.browser()
    assert browser.form("/api/undo").status_code in (400, 403, 422)
    headers = {"Origin": ORIGIN, "X-CSRF-Token": browser.csrf(), "Content-Type": "text/plain"}
    assert browser.http.post("/api/undo", content=b"{}", headers=headers).status_code in (400, 422)


# --- rates ----------------------------------------------------------------------------------------------------


def test_a_bucket_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(security.time, "monotonic", lambda: now[0])
    limiter = RateLimiter(0.5, 2, keys=2)

    def taken(key: str) -> bool:
        try:
            limiter.take(key)
        except Refused:
            return False
        return True

    assert [taken("a"), taken("a"), taken("a"), taken("b")] == [True, True, False, True]
    with pytest.raises(Refused) as caught:
        limiter.take("a")
    assert (caught.value.status, caught.value.retry_after) == (429, 2.0)
    now[0] += 1.9
    assert not taken("a")
    now[0] += 0.1
    assert [taken("a"), taken("a")] == [True, False]
    limiter.give_back("a")
    assert [taken("a"), taken("a")] == [True, False]
    now[0] += 1000
    assert [taken("a"), taken("a"), taken("a")] == [True, True, False], "it holds more than the burst"
    assert [taken("b"), taken("c"), taken("a")] == [True, True, True], "the key unused longest is kept"


def test_an_account_that_asks_too_much_waits_and_others_do_not(tmp_path: Path) -> None:
    web = Web(tmp_path)
    ada, ben = web.invited("ada"), web.invited("ben")
    web.app.state.site.limits.account = RateLimiter(0.25, 3)
    assert [ada.get("/api/task").status_code for _ in range(4)] == [200, 200, 200, 429]
    answer = ada.get("/api/task")
    assert (answer.headers["retry-after"], answer.json()["error"]) == ("4", "too many requests")
    assert ben.get("/api/task").status_code == 200
    web.store.close()


def test_an_address_that_asks_too_much_waits_before_anything_is_looked_up(local: Web) -> None:
    limiter = local.app.state.site.limits.address
    limiter.burst, limiter.per_second = 2, 0.1
    one, other = TestClient(local.app, ORIGIN), TestClient(local.app, ORIGIN, client=("10.1.1.1", 5))
    assert [one.get("/healthz").status_code for _ in range(3)] == [200, 200, 429]
    assert other.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:10.1.2.3", "::ffff:10.1.2.3"),
        ("testclient", "testclient"),
    ],
)
def test_one_person_s_ipv6_addresses_are_one(host: str, address: str) -> None:
    assert address_of(Request({"type": "http", "client": (host, 1), "headers": []})) == address


# --- errors ---------------------------------------------------------------------------------------------------


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a secret of the server")


@pytest.mark.parametrize("path", ["/api/task", "/admin"])
def test_a_bug_of_ours_shows_no_traceback(local: Web, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local.store, "progress", fail)
    answer = local.browser(raise_server_exceptions=False).get(path)
    assert answer.status_code == 500
    assert "something went wrong on the server" in answer.text.lower()
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")


def test_a_database_that_is_busy_is_said(local: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: Any) -> Any:
        raise OperationalError("INSERT", {}, Exception("database is locked"))

    monkeypatch.setattr(local.store, "next_task", busy)
    answer = local.browser().get("/api/task")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert answer.json() == {"error": "the database is busy", "fix": "try again in a few seconds"}


def on_every_connection(web: Web, statement: str) -> None:
    event.listen(web.store.engine, "checkout", lambda connection, *_: connection.execute(statement))


def test_a_full_disk_is_said_and_what_was_stored_stays(local: Web, caplog: pytest.LogCaptureFixture) -> None:
    browser = local.browser()
    local.add_pairs(40)
    on_every_connection(local, "PRAGMA max_page_count = 1")  # SQLite takes the size that the file has
    answers = []
    while not answers or answers[-1].status_code == 200:
        assert len(answers) < 40, "it is never full: is this test still one?"
        lease = browser.get("/api/task")
        answers.append(browser.judge(notes="n" * 2000) if lease.status_code == 200 else lease)
    assert (answers[-1].status_code, answers[-1].headers["retry-after"]) == (503, "30")
    assert answers[-1].json()["error"] == "the database cannot be written: its disk is full"
    assert answers[-1].json()["fix"].startswith("tell the admin")
    assert "free some space where the database is" in caplog.text
    assert len(local.store.judgments()) == len(answers) - 1


def becomes_read_only(web: Web, statement: str) -> Browser:
    """A browser that has been told so."""
    browser = web.browser()
    assert browser.get("/api/task").status_code == 200
    on_every_connection(web, statement)
    answer = browser.get("/api/task")
    assert (answer.status_code, answer.json()["error"]) == (503, "the database cannot be written: it is read-only")
    return browser


def test_a_read_only_database_is_said(local: Web, caplog: pytest.LogCaptureFixture) -> None:
    browser = becomes_read_only(local, "PRAGMA query_only = ON")
    assert "mount its disk for writing" in caplog.text
    assert browser.get("/healthz").status_code == 200, "it can be read"


def test_a_read_only_postgresql_is_said(
    postgres: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LABELS_DATABASE", postgres.database())
    web = Web(tmp_path, database_env="LABELS_DATABASE", serve={"accounts": False})
    becomes_read_only(web, "SET TRANSACTION READ ONLY")
    assert "point database_env to the primary server" in caplog.text
    web.store.close()


def test_a_full_disk_of_postgresql_is_known_by_its_code() -> None:
    psycopg = pytest.importorskip("psycopg")
    full = OperationalError("INSERT", {}, psycopg.errors.DiskFull("could not extend file"))
    assert trouble_of(full) == ("its disk is full", "free some space where the database is")
    assert trouble_of(OperationalError("INSERT", {}, psycopg.errors.DeadlockDetected("deadlock"))) is None


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/logout", 405), ("GET", "/static/../serve.py", 404), ("GET", "/docs", 404)],
)
def test_wrong_paths_get_a_calm_page(local: Web, method: str, path: str, status: int) -> None:
    answer = local.browser().http.request(method, path)
    assert answer.status_code == status
    assert "Back to the start" in answer.text
    assert local.browser().get("/api/nothing").json() == {"error": "not found", "fix": "open /"}


def test_a_lost_lease_is_a_conflict(tmp_path: Path) -> None:
    web = Web(tmp_path, lease_minutes=1.0)
    web.add_pairs(1)
    ada, ben = web.invited("ada"), web.invited("ben")
    task = ada.get("/api/task").json()["task"]
    assert ada.json("/api/renew", {"assignment_id": task["assignment_id"]}).json() == {
        "lease_expires_ms": web.clock.ms + 60_000
    }
    web.clock.ms += 60_001
    assert ben.judge().status_code == 200
    answer = ada.json("/api/judgments", {**ANSWER, "assignment_id": task["assignment_id"]})
    assert (answer.status_code, sorted(answer.json())) == (409, ["error", "fix"])
    web.store.close()


def test_static_files_are_asked_for_by_etag(local: Web) -> None:
    browser = local.browser()
    first = browser.get("/static/style.css")
    assert first.headers["cache-control"] == "no-cache"
    again = browser.http.get("/static/style.css", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_what_people_and_models_write_is_escaped_on_every_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>{{ 7 * 7 }}"
    web = Web(tmp_path, title=evil)
    admin = web.invited("root", "admin")
    web.store.add_items([Item([{"role": "user", "content": evil}], candidates(evil, "b"), batch="<b>")])
    assert admin.judge("flag", notes=evil).status_code == 200
    web.store.ensure_user("judge <script>", role="annotator", labeler="judge")
    for path in ("/", "/admin", "/admin/audit", "/nothing"):
        text = admin.get(path).text
        assert "&lt;script&gt;" in text
        assert "<script>" not in text
        assert "{{ 7 * 7 }}" in text
    web.store.close()


def test_a_judgment_hands_out_the_next_item_and_tells_the_policies_only_then(local: Web) -> None:
    browser = local.browser()
    before = browser.get("/api/task")
    assert "policy-" not in before.text
    answer = browser.judge().json()
    assert sorted(answer) == ["judgment_id", "paused", "policies", "progress", "repeated", "task"]
    assert sorted(answer["policies"]) == ["policy-better", "policy-worse"]
    assert answer["task"]["assignment_id"] != before.json()["task"]["assignment_id"]
    withdrawn = browser.json("/api/undo", {}).json()
    assert withdrawn["task"]["assignment_id"] == before.json()["task"]["assignment_id"]
    assert withdrawn["task"]["previous"]["value"] == 2


def test_the_same_click_sent_twice_is_one_judgment(local: Web) -> None:
    browser: Browser = local.browser()
    task = browser.get("/api/task").json()["task"]
    body = {**ANSWER, "assignment_id": task["assignment_id"]}
    first, second = (browser.json("/api/judgments", body).json() for _ in range(2))
    assert (first["repeated"], second["repeated"]) == (False, True)
    assert first["judgment_id"] == second["judgment_id"]
    assert len(local.store.judgments()) == 1
