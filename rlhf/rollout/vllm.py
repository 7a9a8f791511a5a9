"""Sampling by a vLLM server (https://docs.vllm.ai, its OpenAI-compatible `/v1/completions`).

    vllm serve FOLDER --served-model-name NAME --logprobs-mode processed_logprobs

The server keeps the weights with which it was started, so only stages that do not train can use it. Prompts travel as
token ids and answers come back as token ids: nothing is tokenized twice. The request names every sampling parameter,
because the server otherwise takes those in the model's generation_config.json.

Without `processed_logprobs` the server's log-probabilities are those at temperature 1. It gives no entropies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlhf.errors import ConfigError, DataError
from rlhf.rollout.generate import Completion, GenerationSettings
from rlhf.rollout.http import JsonServer, Refused, Unanswered, retried
from rlhf.types import StopReason

_SERVE = "start it with `vllm serve FOLDER --served-model-name {model}`, or correct sampling.server"


class VllmEngine:
    """See `rlhf.rollout.engines.Engine`.

    Args:
        server: its URL, without `/v1`.
        model: the name under which it serves the model.
        attempts: per request; between two of them the wait doubles, from `wait_s` seconds on.
    """

    def __init__(
        self,
        server: str,
        model: str,
        *,
        context: int | None = None,
        timeout_s: float = 600.0,
        attempts: int = 5,
        wait_s: float = 1.0,
    ) -> None:
        self.context = context
        self._server = JsonServer(server.rstrip("/"), timeout_s, allow_private=True)  # most often on this machine
        self._model = model
        self._attempts, self._wait_s = attempts, wait_s

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: GenerationSettings,
        *,
        seeds: Sequence[int],
        copies: int = 1,
        on_tokens: Callable[[int], None] = lambda n: None,
    ) -> list[Completion]:
        """See `Engine`. One request per prompt, as many at a time as `batch_size` rows need.

        Raises:
            ConfigError: the server is absent, does not serve the model, or refuses the request.
            DataError: its answer is not what was asked for.
        """
        if settings.constrain is not None:
            raise ConfigError(
                "engine vllm cannot apply a constraint written in Python", fix="use engine native or transformers"
            )
        self._check_model()
        firsts = [seed % 2**31 for seed in seeds[::copies]]  # the server makes the seeds of further copies
        bodies = [self._body(list(p), settings, copies, seed) for p, seed in zip(prompts, firsts, strict=True)]
        results: list[Completion] = []
        with ThreadPoolExecutor(max(1, settings.batch_size // copies)) as pool:
            for body, answer in zip(bodies, pool.map(lambda b: self._ask("/v1/completions", b), bodies), strict=True):
                completions = _completions(answer, body, settings)
                on_tokens(sum(len(c.tokens) for c in completions))
                results += completions
        return results

    def _body(self, prompt: list[int], settings: GenerationSettings, copies: int, seed: int) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": prompt,
            "n": copies,
            "seed": seed,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop": list(settings.stop),
            "stop_token_ids": list(settings.eos_ids),
            "skip_special_tokens": True,
            "logprobs": 1,
            "return_token_ids": True,
        }

    def _check_model(self) -> None:
        answer = self._ask("/v1/models", None)
        try:
            served = [model["id"] for model in answer["data"]]
        except (KeyError, TypeError):
            raise _malformed("/v1/models gave no list of models", answer) from None
        if self._model not in served:
            raise ConfigError(
                f"{self._server.url} serves {', '.join(map(repr, served)) or 'nothing'}, not {self._model!r}",
                fix=_SERVE.format(model=self._model),
            )

    def _ask(self, path: str, body: dict[str, Any] | None) -> Any:
        """GET, or POST of a JSON body; tried again when nobody answers or the server is overloaded."""
        try:
            return retried(lambda: self._server.send(path, body), attempts=self._attempts, wait_s=self._wait_s)
        except Refused as refusal:
            raise ConfigError(
                f"{self._server.url}{path} refused the request ({refusal})",
                fix="read the server's message; vLLM 0.11 or newer knows all fields of the request",
            ) from None
        except Unanswered as failure:
            raise ConfigError(
                f"no answer from {self._server.url}{path} in {self._attempts} attempts ({failure})",
                fix=_SERVE.format(model=self._model),
            ) from None


def _completions(answer: Any, body: dict[str, Any], settings: GenerationSettings) -> list[Completion]:
    """The choices of one answer, in order.

    Raises:
        DataError: it does not have the form that was asked for.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        if len(choices) != body["n"]:
            raise _malformed(f"{len(choices)} choices where {body['n']} were asked for")
        return [_completion(choice, body, settings) for choice in choices]
    except (KeyError, TypeError) as error:
        raise _malformed(f"{type(error).__name__} {error}", answer) from None


def _completion(choice: dict[str, Any], body: dict[str, Any], settings: GenerationSettings) -> Completion:
    tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    if choice.get("prompt_token_ids") not in (None, body["prompt"]):
        raise _malformed("it answers another prompt than the one that was sent", choice)
    if not 0 < len(tokens) == len(logprobs) <= settings.max_new_tokens:
        raise _malformed(f"{len(tokens)} tokens with {len(logprobs)} log-probabilities", choice)
    if not all(type(token) is int for token in tokens) or not all(map(math.isfinite, logprobs)):
        raise _malformed("tokens that are no integers, or log-probabilities that are not finite", choice)
    if tokens[-1] in settings.eos_ids:
        stop = StopReason.EOS
    elif choice["finish_reason"] == "stop" and choice.get("stop_reason") in settings.stop:
        stop = StopReason.STOP
    elif choice["finish_reason"] == "length":
        stop = StopReason.LENGTH
    else:
        raise _malformed(f"finish_reason {choice['finish_reason']!r}, {choice.get('stop_reason')!r}", choice)
    return Completion(tokens, logprobs, stop)


def _malformed(what: str, answer: Any = None) -> DataError:
    shown = "" if answer is None else f": {json.dumps(answer)[:300]}"
    return DataError(
        f"the server's answer is not vLLM's: {what}{shown}",
        fix="serve with vLLM 0.11 or newer; older ones do not return token ids",
    )
