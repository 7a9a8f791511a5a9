"""The vLLM client against a server that stands in for vLLM: it checks the request and answers in vLLM's form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from faulty_server import running

from rlhf.errors import ConfigError, DataError
from rlhf.rollout.generate import GenerationSettings
from rlhf.rollout.vllm import VllmEngine
from rlhf.types import StopReason

EOS, BUDGET = 3, 6


class Standin(ThreadingHTTPServer):
    """Answers `n` choices of growing length; notes all requests; fails first as often as told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict[str, Any]] = []
        self.models = ["policy"]
        self.failures: list[int] = []
        self.change: dict[str, Any] = {}

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for k in range(body["n"]):
            # the prompt's last token, then EOS; or a stop string; or the whole budget
            kinds = [([7, EOS], "stop", None), ([7, 8, 9], "stop", "END"), ([7] * BUDGET, "length", None)]
            tokens, reason, stop = kinds[k % 3]
            choice = {
                "index": k,
                "text": "whatever",
                "logprobs": {"token_logprobs": [-0.5 - k] * len(tokens), "tokens": ["x"] * len(tokens)},
                "finish_reason": reason,
                "stop_reason": stop,
                "token_ids": [body["prompt"][-1], *tokens[1:]],
                "prompt_token_ids": body["prompt"],
            }
            choices.append({**choice, **self.change})
        return {"id": "cmpl-1", "object": "text_completion", "model": body["model"], "choices": choices[::-1]}


class Handler(BaseHTTPRequestHandler):
    server: Standin

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]})

    def do_POST(self) -> None:
        assert self.path == "/v1/completions"
        assert self.headers["Content-Type"] == "application/json"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.server.failures:
            self.reply(self.server.failures.pop(0), {"error": {"message": "no such field"}})
        else:
            self.reply(200, self.server.answer(body))

    def reply(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Standin]:
    with Standin() as standin, running(standin):
        yield standin


def engine(server: Standin, model: str = "policy") -> VllmEngine:
    return VllmEngine(f"http://127.0.0.1:{server.server_port}/", model, wait_s=0.01, timeout_s=10, attempts=3)


def sample(server: Standin, *, copies: int = 3, seed: int = 0, **settings: Any) -> list[Any]:
    given = GenerationSettings((EOS, 5), BUDGET, 0.7, 8, stop=("END",), decode=str, **settings)
    return engine(server).generate([[1, 2], [4]], given, seeds=range(seed, seed + 2 * copies), copies=copies)


def test_the_request_names_everything(server: Standin) -> None:
    sample(server)
    one, two = sorted(server.bodies, key=lambda body: len(body["prompt"]), reverse=True)
    assert {k: v for k, v in one.items() if k != "seed"} == {
        "model": "policy",
        "prompt": [1, 2],
        "n": 3,
        "max_tokens": BUDGET,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": ["END"],
        "stop_token_ids": [EOS, 5],
        "skip_special_tokens": True,
        "logprobs": 1,
        "return_token_ids": True,
    }
    assert two["prompt"] == [4]
    assert one["seed"] != two["seed"]


def test_the_first_seed_of_a_prompt_is_sent(server: Standin) -> None:
    """The server draws all copies of a prompt from one."""
    seeds = []
    for seed in (0, 0, 2**31 + 1):
        server.bodies.clear()
        sample(server, seed=seed)
        seeds.append(sorted(body["seed"] for body in server.bodies))
    assert seeds == [[0, 3], [0, 3], [1, 4]]


def test_the_answer_becomes_completions(server: Standin) -> None:
    drawn = sample(server)
    assert [c.tokens for c in drawn] == [
        [2, EOS], [2, 8, 9], [2] + [7] * 5, [4, EOS], [4, 8, 9], [4] + [7] * 5,
    ]  # fmt: skip
    assert [c.stop for c in drawn] == 2 * [StopReason.EOS, StopReason.STOP, StopReason.LENGTH]
    assert [c.logprobs for c in drawn[:2]] == [[-0.5, -0.5], [-1.5, -1.5, -1.5]]
    assert all(c.entropies == [] for c in drawn)


@pytest.mark.parametrize("failures", [[503], [500, 429]])
def test_an_overloaded_server_is_asked_again(server: Standin, failures: list[int]) -> None:
    server.failures = list(failures)
    assert len(sample(server)) == 6
    assert len(server.bodies) == 2 + len(failures)


def test_a_refused_request_is_not_sent_again(server: Standin) -> None:
    server.failures = [400] * 9
    with pytest.raises(ConfigError, match=r"refused the request \(status 400: .*no such field"):
        sample(server, copies=9)


def test_a_server_that_goes_on_failing(server: Standin) -> None:
    server.failures = [503] * 99
    with pytest.raises(ConfigError, match=r"no answer from .* in 3 attempts .*503"):
        sample(server)


def test_an_absent_server(server: Standin) -> None:
    absent = VllmEngine("http://127.0.0.1:1", "policy", wait_s=0.01, attempts=2)
    with pytest.raises(ConfigError, match=r"no answer from http://127.0.0.1:1/v1/models in 2 attempts .*refused") as e:
        absent.generate([[1]], GenerationSettings((3,), 4), seeds=[0])
    assert "vllm serve" in e.value.fix


def test_a_server_of_another_model(server: Standin) -> None:
    server.models = ["base", "sft"]
    with pytest.raises(ConfigError, match="serves 'base', 'sft', not 'policy'"):
        sample(server)
    assert not server.bodies


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_ids": None}, "TypeError"),
        ({"logprobs": None}, "TypeError"),
        ({"token_ids": [7]}, "1 tokens with 2 log-probabilities"),
        ({"token_ids": [], "logprobs": {"token_logprobs": []}}, "0 tokens"),
        ({"token_ids": ["7", "3"]}, "no integers"),
        ({"logprobs": {"token_logprobs": [-0.5, float("nan")]}}, "not finite"),
        ({"prompt_token_ids": [9]}, "another prompt"),
        ({"token_ids": [7, 8], "finish_reason": "abort"}, "finish_reason 'abort'"),
    ],
)
def test_a_malformed_answer(server: Standin, change: dict[str, Any], message: str) -> None:
    server.change = change
    with pytest.raises(DataError, match=message):
        sample(server, copies=1)


def test_fewer_choices_than_asked_for(server: Standin, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = server.answer
    monkeypatch.setattr(server, "answer", lambda body: answer({**body, "n": 2}))
    with pytest.raises(DataError, match="2 choices where 3 were asked for"):
        sample(server)


def test_a_constraint_cannot_travel(server: Standin) -> None:
    with pytest.raises(ConfigError, match="cannot apply a constraint"):
        sample(server, constrain=lambda tokens, logits: logits)
