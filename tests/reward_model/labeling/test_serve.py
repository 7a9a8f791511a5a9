"""`rlhf label serve` and `rlhf label invite`, as processes and as functions."""

from __future__ import annotations

import http.client
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from label_client import Web
from typer.testing import CliRunner

from reward_model.labeling import links, serve
from reward_model.labeling.security import check_host
from rlhf import cli, config
from rlhf.config_labeling import ServeConfig
from rlhf.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def project(tmp_path: Path) -> str:
    path = tmp_path / "project.yaml"
    settings = {"run_dir": str(tmp_path / "labels"), "serve": {"port": 0, "accounts": True}}
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return str(path)


def ask(port: int, method: str, path: str, body: str = "", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()


def test_a_server_starts_answers_and_finishes_what_runs_when_it_is_stopped(project: str, tmp_path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "rlhf", "label", "serve", project], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout
        port = int(re.search(r"http://127\.0\.0\.1:(\d+) ", server.stdout.readline())[1])  # type: ignore[index]
        invite = re.search(r"nobody is an admin yet; .*(/invite/[\w-]+)$", server.stdout.readline())
        assert invite
        status, headers, _ = ask(port, "GET", "/healthz")
        assert (status, "server" in headers) == (200, False)
        status, headers, page = ask(port, "GET", invite[1])
        assert (status, "<b>admin</b>" in page) == (200, True)

        # A login that fails waits for the database, which is busy; then the server is told to stop.
        cookie = headers["set-cookie"].partition(";")[0]
        token = re.search(r'csrf-token" content="(\w+)"', page)[1]  # type: ignore[index]
        sent = {
            "Origin": f"http://127.0.0.1:{port}",
            "Cookie": cookie,
            "Content-Type": "application/x-www-form-urlencoded",
        }
        answers: list[Any] = []
        busy = sqlite3.connect(tmp_path / "labels" / "labels.sqlite3", isolation_level=None)
        busy.execute("BEGIN IMMEDIATE")
        login = threading.Thread(
            target=lambda: answers.append(ask(port, "POST", "/login", f"csrf_token={token}&name=a&password=b", **sent))
        )
        login.start()
        login.join(1.0)
        assert not answers, "it did not wait for the database: is this test still one?"
        server.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(0.5)
        busy.execute("COMMIT")
        login.join(20)
        assert answers[0][0] == 401
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()


def test_a_session_outlives_the_server(tmp_path: Path) -> None:
    first = Web(tmp_path)
    cookies = dict(first.invited("ada").http.cookies)
    first.store.close()
    second = Web(tmp_path)
    browser = second.browser()
    browser.http.cookies.update(cookies)
    assert browser.get("/api/task").status_code == 200
    second.store.close()


def test_an_address_that_cannot_be_had_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as used:
            serve.listen(ServeConfig(port=port))
    assert used.value.message == f"cannot listen at 127.0.0.1 port {port}: Address already in use"
    assert used.value.fix.startswith("stop what listens there, or choose another one")
    with pytest.raises(ConfigError) as foreign:
        serve.listen(ServeConfig(host="192.0.2.1", port=0))
    assert foreign.value.message == "cannot listen at 192.0.2.1 port 0: Cannot assign requested address"
    assert "an address of this machine" in foreign.value.fix


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_a_bind_to_all_of_ipv6_is_one_to_ipv4_too() -> None:
    with serve.listen(ServeConfig(host="::", port=0, accounts=True)) as listener:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, listener.getsockname()[1]), timeout=5).close()


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "http://127.0.0.1:5"),
        ({"host": "localhost"}, "http://localhost:5"),
        ({"public_url": "https://labels.example.org/"}, "https://labels.example.org"),
    ],
)
def test_the_url_is_one_to_open(settings: dict[str, Any], url: str) -> None:
    assert links.url_of(ServeConfig(accounts=True, **settings), 5) == url


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_url_of_a_bind_to_all_addresses_is_one_of_this_machine(host: str) -> None:
    if host == "::" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    cfg = ServeConfig(accounts=True, host=host, port=0)
    with serve.listen(cfg) as listener:
        url = links.url_of(cfg, listener.getsockname()[1])
        parts = urlsplit(url)
        assert parts.hostname
        check_host(parts.netloc, cfg)
        with socket.create_connection((parts.hostname, parts.port or 80), timeout=5) as came:
            ours = listener.accept()[0]
            assert ours.getpeername()[1] == came.getsockname()[1]
            ours.close()


def test_where_a_machine_knows_no_way_to_others_its_url_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(links.socket.socket, "connect", unreachable)
    for host, url in {"0.0.0.0": "http://127.0.0.1:5", "::": "http://[::1]:5"}.items():
        cfg = ServeConfig(accounts=True, host=host)
        assert links.url_of(cfg, 5) == url
        assert links.note_of(cfg, url).startswith(f"links to {url} work on this machine alone; for others, set ")


def test_for_whom_a_link_works() -> None:
    public = ServeConfig(accounts=True, public_url="https://labels.example.org")
    assert links.note_of(public, "https://labels.example.org") == ""
    told = links.note_of(ServeConfig(accounts=True, host="0.0.0.0"), "http://10.0.0.7:5")
    assert told == "if others cannot open http://10.0.0.7:5, set serve.public_url to the address that they open"


def test_no_invite_to_a_port_that_nobody_knows_yet(project: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["label", "invite", project])
    assert done.exit_code == 2
    assert "serve.port is 0" in done.output
    assert "serve.port=8420" in done.output
    assert not (tmp_path / "labels").exists(), "no invite is made that nobody can take"
    done = CliRunner().invoke(cli.app, ["label", "invite", project, "serve.port=8420"])
    assert re.match(r"http://127\.0\.0\.1:8420/invite/\S+\nfor one annotator, ", done.output)
    assert "work on this machine alone" in done.output


@pytest.mark.parametrize("command", [["serve"], ["invite", "--role", "viewer"]])
def test_commands_refuse_what_they_cannot_do(project: str, command: list[str]) -> None:
    override = "serve.host=0.0.0.0"
    done = CliRunner().invoke(cli.app, ["label", command[0], project, "serve.accounts=false", override, *command[1:]])
    assert done.exit_code == 2
    assert "fix: set serve.accounts: true" in done.output


def test_an_invite_from_the_command_line_works(project: str) -> None:
    url = "serve.public_url=https://labels.example.org"
    done = CliRunner().invoke(cli.app, ["label", "invite", project, url, "--role", "viewer"])
    link = re.match(r"https://labels\.example\.org(/invite/\S+)\nfor one viewer, within 7 days", done.output)
    assert link, done.output
    cfg = config.load(project, "labeling", [url])
    web = Web(Path(cfg.run_dir), serve={"public_url": "https://labels.example.org"})
    web.clock.ms = 0  # the link was made by the real clock
    page = web.browser(base="https://labels.example.org").get(link[1])
    assert (page.status_code, "<b>viewer</b>" in page.text) == (200, True)
    web.store.close()


def test_connections_stay_open_while_annotators_think() -> None:
    config = serve.server_config(None, ServeConfig())
    assert config.timeout_keep_alive >= 60, "uvicorn's 5 s are over before an item is read"
