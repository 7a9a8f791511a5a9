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

import pytest
import yaml
from label_client import Web
from typer.testing import CliRunner

from reward_model.labeling import serve
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


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "http://127.0.0.1:5"),
        ({"host": "0.0.0.0"}, "http://127.0.0.1:5"),
        ({"host": "::"}, "http://[::1]:5"),
        ({"host": "localhost"}, "http://localhost:5"),
        ({"public_url": "https://labels.example.org/"}, "https://labels.example.org"),
    ],
)
def test_the_url_is_one_to_open(settings: dict[str, Any], url: str) -> None:
    assert serve.url_of(ServeConfig(accounts=True, **settings), 5) == url


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
