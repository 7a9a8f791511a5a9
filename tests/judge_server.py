"""A judge on this machine that speaks OpenAI's protocol, judges by a function of the two texts, and fails as told."""

from __future__ import annotations

import io
import json
import math
import re
import threading
import time
from collections.abc import Callable
from typing import Any

from faulty_server import FaultyHandler, FaultyServer
from rich.console import Console

from reward_model.labeling.judge import Contest, Judge, Judged
from reward_model.labeling.judge_report import judge_report
from rlhf.progress import Progress

BLOCK = r"\[response {name} (\w+)\]\n(.*)\n\[end of response {name} \1\]"


def longer(first: str, second: str) -> str:
    """A judge that loves length."""
    return "A" if len(first) > len(second) else "B"


def words_better(first: str, second: str) -> str:
    """More different words are better: a judge whose verdict does not depend on the place."""
    return "A" if len(set(first.split())) > len(set(second.split())) else "B"


class JudgeServer(FaultyServer):
    """Answers every question with `judge(first, second)`, a text or the log-probabilities of A and B.

    A request for which `script` holds a fault gets that instead: a status, or (status, headers); `slow`, `drip`,
    `close`, `garbage`, `html`, `deep`, `huge`, `empty` (no choices), `number` (content is none), `message` (it is a
    text), `null`, `refusal`, `filter`, `cut`; or a function of the two responses that gives one of these, or None.
    """

    def __init__(self) -> None:
        super().__init__(_Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.judge: Callable[[str, str], Any] = words_better
        self.message = "sorry"
        self.usage: dict[str, Any] | None = {"prompt_tokens": 100, "completion_tokens": 1}
        self.delay_s = 0.0
        self.asked: list[tuple[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()


class _Handler(FaultyHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        first, second = responses_in(body)
        with server.lock:
            server.times.append(time.monotonic())
            server.asked.append((first, second))
            server.bodies.append({**body, "path": self.path})
            server.headers.append(self.headers)
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
            fault = server.next_fault()
        try:
            server.stopping.wait(server.delay_s)
            self.reply_to(fault(first, second) if callable(fault) else fault, first, second)
        finally:
            with server.lock:
                server.busy -= 1

    def reply_to(self, fault: Any, first: str, second: str) -> None:
        if fault in ("slow", "drip", "close"):
            self.fail(fault)
        elif isinstance(fault, int | tuple):
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            said = {"error": {"message": f"{self.server.message} {self.headers['Authorization']}"}}
            self.reply(json.dumps(said).encode(), status=status, headers=headers)
        else:
            self.answer(fault, first, second)

    def answer(self, fault: str | None, first: str, second: str) -> None:
        said = self.server.judge(first, second)
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": said},
            "finish_reason": "stop",
        }
        if isinstance(said, dict):
            choice["message"]["content"] = max(said, key=said.__getitem__).strip()
            choice["logprobs"] = {"content": [{"token": choice["message"]["content"], "top_logprobs": top(said)}]}
        if fault in ("number", "null", "cut"):
            choice["message"]["content"] = {"number": 3, "null": None, "cut": "The first"}[fault]
        if fault == "refusal":
            choice["message"] |= {"content": None, "refusal": "I will not judge this."}
        choice |= {"message": "A"} if fault == "message" else {}
        choice["finish_reason"] = {"cut": "length", "filter": "content_filter"}.get(str(fault), "stop")
        completion = {"id": "x", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
        completion |= {"choices": []} if fault == "empty" else {}
        completion |= {"usage": self.server.usage} if self.server.usage else {}
        wrong = {"garbage": b'{"choices": [', "html": b"<html>no</html>", "deep": b"[" * 100_000, "huge": b" " * 2**23}
        content = wrong.get(str(fault), json.dumps(completion).encode())
        self.reply(content, headers={"Content-Type": "text/html"} if fault == "html" else {})

    def reply(self, content: bytes, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def top(logprobs: dict[str, float]) -> list[dict[str, Any]]:
    """Log-probabilities by token, as the protocol writes them."""
    return [{"token": token, "logprob": logprob} for token, logprob in logprobs.items()]


def letters(p_first: float) -> dict[str, float]:
    """Log-probabilities of A and B that share 0.9 of the mass."""
    return {"A": math.log(0.9 * p_first), "B": math.log(0.9 * (1 - p_first))}


def responses_in(body: dict[str, Any]) -> tuple[str, str]:
    """The responses A and B of a request."""
    text = body["messages"][-1]["content"]
    found = [re.search(BLOCK.format(name=name), text, re.DOTALL) for name in "AB"]
    return found[0][2], found[1][2]  # type: ignore[index]


def contests(n: int = 4, k: int = 2) -> list[Contest]:
    """Response i has i more words than response 0; to `words_better` the last one is the best."""
    words = [f"w{i}" for i in range(9 + k)]
    return [Contest(f"why {c}?", tuple(f"{c} " + " ".join(words[: 9 + i]) for i in range(k))) for c in range(n)]


def run(judge: Judge, given: list[Contest]) -> list[Judged]:
    """All batches, without a display."""
    progress = Progress("label", console=Console(file=io.StringIO()))
    return [one for batch in judge.batches(given, progress) for one in batch]


def labels(judged: list[Judged]) -> list[Any]:
    """The labels by contest."""
    return [one.labels for one in judged]


def report(judge: Judge, wanted: int, people: Any = None) -> dict[str, Any]:
    """The report, of no time."""
    return judge_report(judge, wanted=wanted, seconds=0.0, people=people)
