"""A served reward whose server fails as told: who gets a score, who gets none, and when the run ends."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from faulty_server import serving
from scripted_server import ScriptedServer

from rlhf.config_schema import RewardEndpointConfig
from rlhf.errors import ConfigError, RewardError
from rlhf.rollout import endpoint as endpoint_module
from rlhf.rollout.endpoint import RewardEndpoint
from rlhf.types import Rollout, StopReason

TEXTS = ["a", "four", "", "seven..", "two"]
LENGTHS = [1.0, 4.0, 0.0, 7.0, 3.0]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with serving(ScriptedServer()) as scripted:
        yield scripted


@pytest.fixture
def endpoint(server: ScriptedServer, runtime: Any) -> Callable[..., RewardEndpoint]:
    """`endpoint(batch_size=2, ...)` asks the server; it waits little and tolerates nearly all."""

    def build(**changes: Any) -> RewardEndpoint:
        settings = {"url": server.url, "timeout_s": 5.0, "allow_private": True, "max_invalid": 0.99, "parallel": 1}
        ranks = changes.pop("runtime", runtime)
        return RewardEndpoint(RewardEndpointConfig.model_validate(settings | changes), ranks, wait_s=0.001)

    return build


def rollouts(texts: list[str] = TEXTS) -> list[Rollout]:
    chat = [{"role": "user", "content": "Why?"}]
    stops = [StopReason.EOS, StopReason.LENGTH]
    return [
        Rollout(chat if i == 1 else "why", text, [1, 2], [False, True], [0.0, -1.0], stops[i % 2], prompt_id=f"p{i}")
        for i, text in enumerate(texts)
    ]


def texts_of(requests: list[list[dict[str, Any]]]) -> list[list[str]]:
    return [[row["response"] for row in rows] for rows in requests]


def test_the_request_says_what_was_asked_and_answered(server: ScriptedServer, endpoint: Any) -> None:
    assert endpoint()(rollouts()) == LENGTHS
    assert server.requests[0][:2] == [
        {"prompt": "why", "response": "a", "stop": "eos", "prompt_id": "p0"},
        {"prompt": [{"role": "user", "content": "Why?"}], "response": "four", "stop": "length", "prompt_id": "p1"},
    ]


@pytest.mark.parametrize("parallel", [1, 3])
@pytest.mark.parametrize(("size", "requests"), [(1, 5), (2, 3), (5, 1), (9, 1)])
def test_scores_come_in_order_however_they_are_asked_for(
    server: ScriptedServer, endpoint: Any, size: int, requests: int, parallel: int
) -> None:
    assert endpoint(batch_size=size, parallel=parallel)(rollouts()) == LENGTHS
    assert sorted(text for request in texts_of(server.requests) for text in request) == sorted(TEXTS)
    assert len(server.requests) == requests


FAULTS = [500, 503, 429, "slow", "drip", "close", "drop", "garbage", "deep", "list", "short"]
ROW_FAULTS = ["nan", "huge", "text", "true", "null"]


@pytest.mark.parametrize("fault", FAULTS + ROW_FAULTS)
def test_a_fault_that_passes_costs_nothing(server: ScriptedServer, endpoint: Any, fault: Any) -> None:
    server.script = [fault, fault]
    assert endpoint(timeout_s=0.2 if fault in ("slow", "drip") else 5.0)(rollouts()) == LENGTHS
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_leaves_its_rollouts_without_a_score(
    server: ScriptedServer, endpoint: Any, fault: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """And the other requests' alone: the second one, of the third and fourth rollout, fails three times."""
    server.always = lambda rows: fault if rows[0]["response"] == "" else None
    with caplog.at_level(logging.WARNING):
        scores = endpoint(batch_size=2, timeout_s=0.2 if fault in ("slow", "drip") else 5.0)(rollouts())
    assert scores == [1.0, 4.0, None, None, 3.0]
    assert texts_of(server.requests) == [["a", "four"], *[["", "seven.."]] * 3, ["two"]]
    assert "2 of 5 rollouts have no score" in caplog.text


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_only_rollouts_that_lack_a_score_are_sent_again(server: ScriptedServer, endpoint: Any, fault: str) -> None:
    server.always = lambda rows: fault if rows[0]["response"] == "a" else None
    assert endpoint()(rollouts()) == [None, *LENGTHS[1:]]
    assert texts_of(server.requests) == [TEXTS, ["a"], ["a"]]


@pytest.mark.parametrize(
    ("score", "kept"), [(-3, -3.0), (0, 0.0), (1e38, 1e38), (1e39, None), (-1e39, None), (float("-inf"), None)]
)
def test_a_score_is_a_number_that_float32_can_hold(
    server: ScriptedServer, endpoint: Any, score: float, kept: float | None
) -> None:
    server.score = lambda row: score if row["response"] == "a" else 0.0
    scores = endpoint(attempts=1)(rollouts())
    assert scores == [kept, 0.0, 0.0, 0.0, 0.0]
    assert all(type(score) in (float, type(None)) for score in scores)


def test_a_server_that_is_down(endpoint: Any) -> None:
    with pytest.raises(RewardError, match=r"no score for 100\.0% .*\(5 of 5, allowed: 99\.0%\).*refused"):
        endpoint(url="http://127.0.0.1:1")(rollouts())


@pytest.mark.parametrize("status", [301, 302, 400, 401, 404])
def test_a_refusal_ends_the_run_at_once(server: ScriptedServer, endpoint: Any, status: int) -> None:
    server.always = status
    with pytest.raises(ConfigError, match=rf"refused the request \(status {status}") as caught:
        endpoint(batch_size=1)(rollouts())
    assert len(server.requests) == 1, "neither again nor for the other rollouts"
    assert "token_env" in caught.value.fix


# --- how many may lack one ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "stops"), [(0.0, True), (0.39, True), (0.4, False), (0.5, False)])
def test_the_limit_is_a_share_of_the_rollouts(server: ScriptedServer, endpoint: Any, limit: float, stops: bool) -> None:
    server.always = lambda rows: 503 if rows[0]["response"] == "" else None
    reward = endpoint(batch_size=2, max_invalid=limit)
    if not stops:
        assert reward(rollouts()).count(None) == 2
        return
    with pytest.raises(RewardError, match=r"no score for 40\.0% .*2 of 5.*last failure: status 503") as caught:
        reward(rollouts())
    assert server.url in str(caught.value)
    assert "mend the endpoint" in caught.value.fix


def test_a_share_that_is_the_limit_itself_is_allowed(server: ScriptedServer, endpoint: Any) -> None:
    """0.29 x 100 is 28.999999999999996."""
    server.score = lambda row: None if len(row["response"]) < 29 else 1.0
    reward = endpoint(attempts=1, batch_size=100, max_invalid=0.29)
    assert reward(rollouts(["x" * i for i in range(100)])).count(None) == 29


class Together:
    """Stands in for a run on two ranks, of which the other one counted `theirs` and said `said`."""

    def __init__(self, theirs: list[float], said: list[str]) -> None:
        self.theirs, self.said = torch.tensor(theirs, dtype=torch.float64), said

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.theirs

    def gather_objects(self, values: list[str]) -> list[str]:
        return values + self.said


def test_ranks_count_together(server: ScriptedServer, endpoint: Any) -> None:
    """5 rollouts here, 5 there: a share that one rank alone would bear, or not bear, is that of both."""
    with pytest.raises(RewardError, match=r"50\.0% .*5 of 10.*last failure: theirs"):
        endpoint(max_invalid=0.4, runtime=Together([0, 5, 5], ["theirs"]))(rollouts())
    server.always = 503
    with pytest.raises(RewardError, match=r"50\.0% .*5 of 10.*last failure: status 503"):
        endpoint(max_invalid=0.4, runtime=Together([0, 0, 5], []))(rollouts())
    assert endpoint(max_invalid=0.5, runtime=Together([0, 0, 5], []))(rollouts()) == [None] * 5


def test_a_rank_hears_of_the_refusal_that_another_one_got(endpoint: Any) -> None:
    with pytest.raises(ConfigError, match=r"refused the request \(status 401"):
        endpoint(runtime=Together([1, 5, 5], ["status 401"]))(rollouts())


def test_a_step_does_not_remember_the_failure_of_the_one_before(
    server: ScriptedServer, endpoint: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reward = endpoint(attempts=1, max_invalid=0.5, batch_size=4)
    server.script = [None, 500]
    assert reward(rollouts())[4] is None
    caplog.clear()
    assert reward(rollouts()) == LENGTHS
    assert not caplog.records


# --- what is refused before a run ------------------------------------------------------------------------------


def test_the_address_is_checked_at_the_start(server: ScriptedServer, endpoint: Any) -> None:
    with pytest.raises(ConfigError, match="private, loopback or link-local"):
        endpoint(allow_private=False)
    with pytest.raises(ConfigError, match="does not resolve"):
        endpoint(url="http://no-such-host.invalid")
    assert server.requests == []


def test_the_token_comes_from_the_environment(
    server: ScriptedServer, endpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "s3cret-of-the-test\n")
    assert endpoint(token_env="REWARD_TOKEN")(rollouts()) == LENGTHS
    assert server.headers[0]["Authorization"] == "Bearer s3cret-of-the-test"
    server.always = 401
    with pytest.raises(ConfigError) as caught:
        endpoint(token_env="REWARD_TOKEN")(rollouts())
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "  ", "two\nlines", "ümlaut"])
def test_a_token_that_is_none_is_said_at_the_start(
    endpoint: Any, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("REWARD_TOKEN", value)
    with pytest.raises(ConfigError, match="variable REWARD_TOKEN is not set, or holds no token"):
        endpoint(token_env="REWARD_TOKEN")


def test_the_server_of_the_documentation_serves(runtime: Any) -> None:
    code = textwrap.dedent(str(endpoint_module.__doc__).split("A whole server:\n")[1])
    assert "8080" in code
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", code.replace("8080", port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        cfg = RewardEndpointConfig(url=f"http://127.0.0.1:{port}", allow_private=True, attempts=10)
        scores = RewardEndpoint(cfg, runtime, wait_s=0.05)(rollouts(["word " * 40, "word " * 38, "word " * 50]))
        process.kill()
    assert scores == [0.0, -2.0, -10.0]
