"""A reward that another program gives over HTTP.

    POST url   {"rollouts": [{"prompt": "Why?", "response": "Because.", "stop": "eos", "prompt_id": "7"}, ...]}
    answer     {"scores": [0.25, null, ...]}

One finite number for each rollout, in their order, the higher the better; null where there is none. `prompt` is text
or the turns of a chat; `stop` says why the response ended: `eos`, `stop` (a stop string) or `length`.

A request that is not answered validly (nobody there, too slow, status 429 or 5xx, no JSON, another number of scores)
is sent again, and so are those of its rollouts that got no number. What has none after the last attempt stays without
a score: PPO masks it out and never takes a number in its place. With N rollouts of a process a step waits at most
ceil(N / batch_size / parallel) times as long as one request: attempts x timeout_s, and the waits between them. Any
other status than these and 2xx ends the run. A whole server:

    import json
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Rewards(BaseHTTPRequestHandler):
        def do_POST(self):
            rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["rollouts"]
            scores = [-abs(len(row["response"].split()) - 40) for row in rows]  # as near to 40 words as can be
            answer = json.dumps({"scores": scores}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    ThreadingHTTPServer(("127.0.0.1", 8080), Rewards).serve_forever()
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from rlhf.config_schema import RewardEndpointConfig
from rlhf.errors import ConfigError, RewardError
from rlhf.rollout.http import JsonServer, Refused, Unanswered, retried
from rlhf.runtime import Runtime
from rlhf.types import Rollout

LARGEST = float(torch.finfo(torch.float32).max)  # a larger score would become infinity in the batch
_log = logging.getLogger(__name__)


class RewardEndpoint:
    """See `rlhf.types.RewardFn`; all ranks call it in the same step.

    Args:
        wait_s: before the second attempt; it doubles from there on.

    Raises:
        ConfigError: the token is not in the environment, the host does not resolve or its address is not allowed.
    """

    def __init__(self, cfg: RewardEndpointConfig, runtime: Runtime, *, wait_s: float = 1.0) -> None:
        self._cfg, self._runtime, self._wait_s = cfg, runtime, wait_s
        self._server = JsonServer(cfg.url, cfg.timeout_s, _token(cfg.token_env), allow_private=cfg.allow_private)
        self._failure = self._refusal = ""  # the last of this step
        try:
            self._server.addresses()
        except Unanswered as failure:
            raise ConfigError(f"reward_endpoint: {failure}", fix="correct reward_endpoint.url") from None

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """The score of each rollout, None where there is none.

        Raises:
            ConfigError: a request was refused; on all ranks alike, as the next one.
            RewardError: more than `max_invalid` of all ranks' rollouts have no score.
        """
        self._failure = self._refusal = ""
        size = self._cfg.batch_size
        parts = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
        with ThreadPoolExecutor(self._cfg.parallel) as pool:
            scores = [score for part in pool.map(self._score, parts) for score in part]
        self._stop_together(scores)
        return scores

    def _score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """The scores of one request's rollouts. Only those that lack one are sent again."""
        scores: list[float | None] = [None] * len(rollouts)

        def ask() -> None:
            missing = [i for i, score in enumerate(scores) if score is None]
            answer = self._server.send(body={"rollouts": [_row(rollouts[i]) for i in missing]})
            for i, score in zip(missing, _scores(answer, len(missing)), strict=True):
                scores[i] = score
            if lacking := scores.count(None):
                raise Unanswered(f"no finite number for {lacking} of {len(rollouts)} rollouts")

        if self._refusal:
            return scores
        try:
            retried(ask, attempts=self._cfg.attempts, wait_s=self._wait_s)
        except Unanswered as failure:
            self._failure = str(failure)
        except Refused as refusal:
            self._refusal = str(refusal)
        return scores

    def _stop_together(self, scores: Sequence[float | None]) -> None:
        """End the step on all ranks, or on none: one that goes on alone would wait for the others."""
        mine = [bool(self._refusal), scores.count(None), len(scores)]
        refused, invalid, rows = self._runtime.sum(torch.tensor(mine, dtype=torch.float64)).tolist()
        url, largest = self._cfg.url, self._cfg.max_invalid
        if self._failure:
            _log.warning("%s: %d of %d rollouts have no score (%s)", url, *mine[1:], self._failure)
        if refused:
            said = self._runtime.gather_objects([self._refusal] if self._refusal else [])
            raise ConfigError(
                f"{url} refused the request ({said[-1]})",
                fix="check reward_endpoint.url and, with a token, that reward_endpoint.token_env names a valid one",
            )
        if invalid / rows > largest:
            said = self._runtime.gather_objects([self._failure] if self._failure else [])
            raise RewardError(
                f"{url} gave no score for {invalid / rows:.1%} of the step's rollouts ({invalid:.0f} of {rows:.0f}, "
                f"allowed: {largest:.1%}); last failure: {said[-1]}",
                fix="mend the endpoint and run the same command again, or raise reward_endpoint.timeout_s, attempts or "
                "max_invalid",
            )


def _token(name: str | None) -> str | None:
    """The bearer token in the environment variable `name`."""
    if name is None:
        return None
    token = os.environ.get(name, "").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"reward_endpoint.token_env: the environment variable {name} is not set, or holds no token",
            fix=f"export {name}=... in the shell that starts the run, or remove the key",
        )
    return token


def _row(rollout: Rollout) -> dict[str, Any]:
    return {
        "prompt": rollout.prompt,
        "response": rollout.response,
        "stop": rollout.stop.value,
        "prompt_id": rollout.prompt_id,
    }


def _scores(answer: Any, count: int) -> list[float | None]:
    """The scores of an answer; None for what is no number that a score can be.

    Raises:
        Unanswered: it is not of the form {"scores": [...]} with that many of them.
    """
    found = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(found, list) or len(found) != count:
        what = f"{len(found)} scores" if isinstance(found, list) else "no list of scores"
        raise Unanswered(f"{what} for {count} rollouts")
    return [float(score) if _is_number(score) else None for score in found]


def _is_number(score: Any) -> bool:
    return type(score) in (int, float) and abs(score) <= LARGEST  # false for NaN, too
