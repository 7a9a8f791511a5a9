"""Requests against a real server that fails as told: what is asked for again, what is not, and where none may go."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from faulty_server import serving
from scripted_server import ScriptedServer

from rlhf.errors import ConfigError
from rlhf.rollout.http import JsonServer, Refused, Unanswered, is_public, retried

ROWS = {"rollouts": [{"response": "four"}, {"response": "a"}]}


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with serving(ScriptedServer()) as scripted:
        yield scripted


def ask(server: ScriptedServer, *, timeout_s: float = 5.0, token: str | None = None) -> Any:
    return JsonServer(server.url, timeout_s, token, allow_private=True).send(body=ROWS)


def test_a_body_is_posted_and_the_answer_read(server: ScriptedServer) -> None:
    assert ask(server) == {"scores": [4.0, 1.0]}
    assert server.requests == [ROWS["rollouts"]]
    headers = server.headers[0]
    assert (headers["Content-Type"], headers["Authorization"]) == ("application/json", None)
    assert headers["Host"] == server.url.split("/")[2]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (500, "status 500: sorry"),
        (503, "status 503"),
        (429, "status 429"),
        ("close", "without response"),
        ("drop", "broke off"),
        ("garbage", "no JSON .*'<html>'"),
        ("deep", "no JSON"),
    ],
)
def test_what_may_pass_is_told_from_what_will_not(server: ScriptedServer, fault: Any, message: str) -> None:
    server.always = fault
    with pytest.raises(Unanswered, match=message):
        ask(server)


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_the_time_limit_holds_for_the_whole_request(server: ScriptedServer, fault: str) -> None:
    """A timeout of the socket alone would start anew with every byte that drips: then this would never end."""
    server.always = fault
    with pytest.raises(Unanswered, match=r"no answer within 0\.1 s"):
        ask(server, timeout_s=0.1)


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 401, 403, 404])
def test_a_refusal_and_a_redirect_are_final(server: ScriptedServer, status: int) -> None:
    server.always = status
    with pytest.raises(Refused, match=f"status {status}"):
        ask(server)
    assert len(server.requests) == 1


def test_nobody_there() -> None:
    with pytest.raises(Unanswered, match="refused"):
        JsonServer("http://127.0.0.1:1", 5.0, allow_private=True).send()


def test_a_name_that_does_not_resolve() -> None:
    for host in ("no-such-host.invalid", "x" * 64 + ".invalid"):
        with pytest.raises(Unanswered, match="does not resolve"):
            JsonServer(f"http://{host}", 5.0).send()


def test_https_to_a_server_without_it(server: ScriptedServer) -> None:
    with pytest.raises(Unanswered, match=r"(?i)ssl|eof"):
        JsonServer(server.url.replace("http:", "https:"), 5.0, allow_private=True).send()


def test_a_token_is_sent_and_never_shown(server: ScriptedServer) -> None:
    secret = "s3cret-token-of-the-test"
    ask(server, token=secret)
    assert server.headers[0]["Authorization"] == f"Bearer {secret}"
    server.always = 401  # this server repeats what it was sent
    with pytest.raises(Refused) as caught:
        ask(server, token=secret)
    assert secret not in str(caught.value)
    assert "Bearer <redacted>" in str(caught.value)
    assert secret not in repr(JsonServer(server.url, 1.0, secret))
    server.always = None
    assert ask(server, token="4.0") == {"scores": [4.0, 1.0]}, "an answer is not touched"


# --- addresses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("127.0.0.1", False),
        ("::1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),  # the metadata service of most clouds
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("::ffff:224.0.0.1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0x7f.1", "2130706433", "169.254.169.254"])
def test_a_private_address_is_refused_however_it_is_written(host: str) -> None:
    with pytest.raises(ConfigError, match="private, loopback or link-local") as caught:
        JsonServer(f"http://{host}:1/", 0.5).send()
    assert "allow_private: true" in caught.value.fix


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Every name resolves to these; the addresses that are then connected to."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    connected: list[str] = []

    def connect(self: socket.socket, address: Any) -> None:
        connected.append(address[0])
        raise ConnectionRefusedError("refused")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return connected


def test_one_private_address_among_public_ones_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    connected = resolve_to(monkeypatch, "8.8.8.8", "192.168.0.1")
    with pytest.raises(ConfigError, match=r"192\.168\.0\.1 is a private"):
        JsonServer("http://rewards.example", 0.5).send()
    assert connected == []


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that resolves to another address a moment later gains nothing: it is looked up once a request."""
    connected = resolve_to(monkeypatch, "8.8.8.8", "8.8.4.4")
    with pytest.raises(Unanswered, match="refused"):
        JsonServer("http://rewards.example", 0.5).send()
    assert connected == ["8.8.8.8", "8.8.4.4"]
    resolve_to(monkeypatch, "127.0.0.1")
    with pytest.raises(ConfigError, match="private"):
        JsonServer("http://rewards.example", 0.5).send()


def test_proxies_of_the_environment_are_not_used(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert ask(server) == {"scores": [4.0, 1.0]}


# --- retries --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failures", "attempts"), [(0, 1), (2, 3), (3, 4)])
def test_waits_double_and_the_answer_counts(monkeypatch: pytest.MonkeyPatch, failures: int, attempts: int) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    calls = iter([Unanswered("down")] * failures)

    def once() -> str:
        for failure in calls:
            raise failure
        return "answer"

    assert retried(once, attempts=attempts, wait_s=0.5) == "answer"
    assert waits == [0.5, 1.0, 2.0][:failures]


def test_the_last_failure_is_the_one_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    told = iter(["first", "second", "third", "fourth"])

    def once() -> None:
        raise Unanswered(next(told))

    with pytest.raises(Unanswered, match="third"):
        retried(once, attempts=3, wait_s=1.0)
    assert next(told) == "fourth"
