"""A judge behind an OpenAI-compatible endpoint. The package `openai` speaks the protocol; the bytes go through
`rlhf.rollout.http`: a hard time limit, a largest size, addresses that are checked, neither redirects nor proxies.

Tried again, after a wait that doubles or that the server asks for: nobody there, too slow, broken off, status 408, 409,
429 and 5xx, and what is no completion. Any other 4xx leaves this one question without an answer. 401, 403, 404 and
redirects end the run: no other question would fare better.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reward_model.labeling.judge_backend import UNASKED, Failure, NoVerdict
from reward_model.labeling.judge_ledger import Ledger, Size
from reward_model.labeling.judge_prompt import Question, Verdict, messages, read_verdict, response_format
from rlhf.config_judge import JudgeConfig, JudgeEndpointConfig
from rlhf.errors import ConfigError
from rlhf.rollout.http import JsonServer, Unanswered, Unreached

MAX_ANSWER_BYTES = 2**21
TEMPLATE_TOKENS = 256
"""More than any chat template adds; beside it a text has no more tokens than bytes."""

TOP_LOGPROBS = 20  # the most that OpenAI and vLLM give
_FOREIGN = ("response_format", "json_schema", "logprobs", "max_tokens", "temperature", "seed")


@dataclass(eq=False)
class _Unanswered(Exception):
    """No answer to this request. `billed`: the server may have worked for it; `again`: another attempt may do."""

    failure: Failure
    billed: bool = False
    again: bool = True
    retry_after_s: float = 0.0


class EndpointJudge:
    """See `Backend`.

    Raises:
        ConfigError: the key is not in the environment, the host does not resolve or its address is not allowed.
    """

    chunk = 1

    def __init__(self, cfg: JudgeConfig, endpoint: JudgeEndpointConfig, seed: int) -> None:
        self._cfg, self._endpoint, self._seed = cfg, endpoint, seed
        self.parallel = endpoint.parallel
        self._server = JsonServer(
            endpoint.url.rstrip("/"),
            endpoint.timeout_s,
            _key(endpoint.key_env),
            allow_private=endpoint.allow_private,
            max_bytes=MAX_ANSWER_BYTES,
        )
        self._stopped = threading.Event()
        self._free_from = 0.0  # monotonic time before which the server wants no request
        try:
            self._server.addresses()
        except Unanswered as failure:
            raise ConfigError(f"judge.endpoint: {failure}", fix="correct judge.endpoint.url") from None
        self._client = _client(self._server)

    def identity(self) -> list[Any]:
        """See `Backend`. The URL is not among it: a server that moves stays the same judge."""
        return ["endpoint", self._cfg.model, self._settings()]

    def stop(self) -> None:
        """See `Backend`."""
        self._stopped.set()

    def ask(self, questions: Sequence[Question], keys: Sequence[str], ledger: Ledger) -> list[dict[str, Any] | Failure]:
        """See `Backend`."""
        return [self._ask(question, key, ledger) for question, key in zip(questions, keys, strict=True)]

    def verdict(self, answer: dict[str, Any]) -> Verdict:
        """See `Backend`."""
        content = answer["content"] or ""
        if answer["refusal"] or answer["finish"] == "content_filter" or not content.strip():
            raise NoVerdict("refusal", str(answer["refusal"] or "an empty answer")[:200])
        try:
            return read_verdict(content, self._cfg.answer, answer["p_first"])
        except (ValueError, RecursionError):
            kind = "cut" if answer["finish"] == "length" else "no_verdict"
            raise NoVerdict(kind, f"{content[:200]!r}") from None

    def _ask(self, question: Question, key: str, ledger: Ledger) -> dict[str, Any] | Failure:
        """One question, in as many attempts as it takes."""
        body = self._body(question)
        text = "".join(turn["content"] for turn in body["messages"])
        limits = [body.get(key) for key in ("max_tokens", "max_completion_tokens")]
        written = max((limit for limit in limits if isinstance(limit, int)), default=self._endpoint.max_answer_tokens)
        most = Size(len(text.encode()) + TEMPLATE_TOKENS, written)
        for attempt in range(1, self._endpoint.attempts + 1):
            result = self._attempt(body, key, most, ledger)
            if not isinstance(result, _Unanswered):
                return result
            if not result.again or attempt == self._endpoint.attempts:
                return result.failure
            self._wait(attempt, result.retry_after_s)
        raise AssertionError("no attempt was made")

    def _attempt(
        self, body: dict[str, Any], key: str, most: Size, ledger: Ledger
    ) -> dict[str, Any] | Failure | _Unanswered:
        """One request, if it may be sent, and its row in the ledger."""
        self._stopped.wait(max(0.0, self._free_from - time.monotonic()))
        rows = [] if self._stopped.is_set() else ledger.reserve([key], [most])
        if not rows:
            return UNASKED
        answer, used = None, None
        try:
            answer, used = self._once(body)
            return answer
        except _Unanswered as unanswered:
            used = None if unanswered.billed else Size(0, 0)
            return unanswered
        except ConfigError:
            self._stopped.set()
            used = Size(0, 0)
            raise
        finally:
            ledger.settle(rows[0], used, answer)

    def _once(self, body: dict[str, Any]) -> tuple[dict[str, Any], Size | None]:
        """Send one request: what is kept of its answer, and the tokens that it took, if the server says so.

        Raises:
            _Unanswered: there is none.
            ConfigError: there will be none to any question.
        """
        import openai

        try:
            raw = self._client.chat.completions.with_raw_response.create(model="", messages=[], extra_body=body)
            content = raw.content
        except openai.APIStatusError as error:
            raise self._failed(error.response.status_code, error.response.headers, error.response.content) from None
        except Unanswered as failure:
            sent = not isinstance(failure, Unreached)
            raise _Unanswered(Failure("unanswered", str(failure)), billed=sent) from None
        try:
            completion = json.loads(content)
            return _kept(completion), _used(completion)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            what = f"no completion ({type(error).__name__}): {self._server.shown(content)!r}"
            raise _Unanswered(Failure("malformed", what), billed=True) from None

    def _failed(self, status: int, headers: Mapping[str, str], content: bytes) -> Exception:
        """What to raise for an answer with another status than 2xx."""
        said = f"status {status}: {self._server.shown(content)}"
        if status in (408, 409, 429) or status >= 500:
            kind = "overloaded" if status == 429 else "server_error"
            return _Unanswered(Failure(kind, said), retry_after_s=_retry_after(headers.get("retry-after")))
        url = self._endpoint.url
        if status in (401, 403):
            name = self._endpoint.key_env
            fix = f"check the key in {name}" if name else "set judge.endpoint.key_env to the variable with the key"
            return ConfigError(f"{url} refused us ({said})", fix=fix)
        if status == 404 or status < 400:
            fix = "check judge.endpoint.url, with its version (/v1), and judge.model"
            return ConfigError(f"{url} does not serve {self._cfg.model!r} ({said})", fix=fix)
        if any(field in said for field in _FOREIGN) and "context" not in said:  # it may be one question's length
            fix = "set judge.endpoint.logprobs or .structured to false, or change the field in .request"
            return ConfigError(f"{url} does not know a field of the request ({said})", fix=fix)
        return _Unanswered(Failure("refused", said), again=False)

    def _wait(self, attempt: int, retry_after_s: float) -> None:
        """Wait before the next attempt; where the server names a time, all threads do."""
        longest = self._endpoint.max_wait_s
        if retry_after_s:
            self._free_from = max(self._free_from, time.monotonic() + min(longest, retry_after_s))
        self._stopped.wait(min(longest, self._endpoint.wait_s * 2 ** (attempt - 1)))

    def _settings(self) -> dict[str, Any]:
        """Every field of a request but its texts."""
        endpoint = self._endpoint
        fields: dict[str, Any] = {"temperature": 0, "seed": self._seed, "max_tokens": endpoint.max_answer_tokens}
        if endpoint.structured and (schema := response_format(self._cfg.answer)):
            fields["response_format"] = schema
        if endpoint.logprobs and self._cfg.answer == "letter":
            fields |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return {key: value for key, value in (fields | endpoint.request).items() if value is not None}

    def _body(self, question: Question) -> dict[str, Any]:
        turns = messages(question, form=self._cfg.answer, criteria=self._cfg.criteria, seed=self._seed)
        return {"model": self._cfg.model, "messages": turns, **self._settings()}


def _key(name: str | None) -> str | None:
    """The API key in the environment variable `name`."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"judge.endpoint.key_env: the environment variable {name} is not set, or holds no key",
            fix=f"export {name}=... in the shell that starts the run, or remove the entry",
        )
    return key


def _client(server: JsonServer) -> Any:
    """OpenAI's client, whose requests all go to `server`; of their headers it takes none."""
    import httpx2
    import openai

    class Checked(httpx2.BaseTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            answer = server.exchange("/chat/completions", request.read())
            kept = {key: answer.headers[key] for key in ("content-type", "retry-after") if key in answer.headers}
            return httpx2.Response(answer.status, headers=kept, content=answer.content)

    client = openai.DefaultHttpxClient(transport=Checked(), trust_env=False, follow_redirects=False)
    return openai.OpenAI(api_key="in the transport", base_url=server.url, max_retries=0, http_client=client)


def _kept(completion: Any) -> dict[str, Any]:
    """What a verdict can be read from.

    Raises:
        TypeError, KeyError, IndexError, AttributeError: it is no completion.
    """
    choice = completion["choices"][0]
    said = choice["message"]
    content, refusal, finish = said.get("content"), said.get("refusal"), choice.get("finish_reason")
    for value in (content, refusal, finish):
        if not isinstance(value, str | None):
            raise TypeError(f"{type(value).__name__} in place of a text")
    p_first = _p_first(choice.get("logprobs"), (content or "").strip())
    return {"content": content, "refusal": refusal, "finish": finish, "p_first": p_first}


def _p_first(logprobs: Any, letter: str) -> float | None:
    """P(A) / (P(A) + P(B)) at the token that is the answer's letter; None where the server gives no such figures.

    Spellings of a letter (with a space before it) count together, a letter that is not among the likeliest as 0.
    """
    try:
        token = next(token for token in reversed(logprobs["content"]) if token["token"].strip() == letter)
        mass = {"A": 0.0, "B": 0.0}
        for one in token["top_logprobs"]:
            if (spelled := one["token"].strip()) in mass:
                mass[spelled] += math.exp(one["logprob"])
        p_first = mass["A"] / (mass["A"] + mass["B"])
    except (TypeError, KeyError, AttributeError, StopIteration, ZeroDivisionError, OverflowError):
        return None
    return p_first if math.isfinite(p_first) else None


def _used(completion: Any) -> Size | None:
    """The tokens that the server counted."""
    usage = completion.get("usage")
    if not isinstance(usage, dict):
        return None
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(read) is int and type(written) is int and min(read, written) >= 0 and max(read, written) < 2**40:
        return Size(read, written)
    return None


def _retry_after(header: str | None) -> float:
    """Seconds that a server asks to wait, given as such or as a date; 0 where it does not."""
    try:
        wait = float(header or 0)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(str(header)).timestamp() - time.time()
        except ValueError:
            return 0.0
    return wait if 0 < wait < math.inf else 0.0
