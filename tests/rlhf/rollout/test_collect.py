"""From prompts to rollouts: masks, order, text, and what an answer without EOS costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.config_schema import MissingEOSConfig, SamplingConfig
from rlhf.data.records import PromptRecord
from rlhf.data.templates import TokenizedPrompt, prompt_tokens
from rlhf.models.load import load_causal_lm
from rlhf.rollout.collect import collect, missing_eos_penalty, settings_from
from rlhf.rollout.engines import NativeEngine
from rlhf.rollout.generate import GenerationSettings
from rlhf.types import Rollout, StopReason


@pytest.fixture(scope="module")
def collected(tiny: Any) -> list[Rollout]:
    """Eight answers to each of three prompts."""
    texts = ["explain the sun", "why", "how is rain water"]
    prompts = [
        TokenizedPrompt(PromptRecord(t, f"id-{t}", {}, ""), prompt_tokens(tiny.tokenizer, t, chat=True)) for t in texts
    ]
    return collect(
        NativeEngine(load_causal_lm(tiny.path, dtype=torch.float32).eval()),
        prompts,
        GenerationSettings((tiny.eos,), 8),
        decode=lambda tokens: tiny.tokenizer.decode(tokens),
        seeds=range(24),
        copies=8,
        policy="sft",
    )


def test_copies_follow_their_prompt(collected: list[Rollout], tiny: Any) -> None:
    assert [r.prompt_id for r in collected] == [
        f"id-{t}" for t in ("explain the sun", "why", "how is rain water") for _ in range(8)
    ]
    for r in collected:
        prompt = prompt_tokens(tiny.tokenizer, r.prompt, chat=True)
        assert r.tokens[: len(prompt)] == prompt
        assert r.action_mask == [False] * len(prompt) + [True] * (len(r.tokens) - len(prompt))
        assert r.policy == "sft"


def test_the_sampled_eos_is_an_action_with_a_logprob_but_no_text(collected: list[Rollout], tiny: Any) -> None:
    ended = [r for r in collected if r.stop is StopReason.EOS]
    assert 0 < len(ended) < len(collected)
    for r in collected:
        assert len(r.tokens) == len(r.action_mask) == len(r.logprobs)
        assert all((logprob < 0) == action for logprob, action in zip(r.logprobs, r.action_mask, strict=True))
        assert (r.response_tokens[-1] == tiny.eos) == (r.stop is StopReason.EOS)
        shown = r.response_tokens[:-1] if r.stop is StopReason.EOS else r.response_tokens
        assert r.response == tiny.tokenizer.decode(shown)
        assert tiny.tokenizer.eos_token not in r.response


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("none", -1.0, [2.0, -4.0, 0.5]),
        ("set", -1.0, [2.0, -1.0, 0.5]),
        ("subtract", 3.0, [2.0, -7.0, 0.5]),
    ],
)
def test_missing_eos_penalty(kind: Any, value: float, expected: list[float]) -> None:
    rows = [Rollout("p", "", [1], [True], [0.0], stop) for stop in (StopReason.EOS, StopReason.LENGTH, StopReason.STOP)]
    assert missing_eos_penalty([2.0, -4.0, 0.5], rows, MissingEOSConfig(kind=kind, value=value)) == expected


def test_a_stop_string_is_an_action_but_no_text(tiny: Any) -> None:
    prompt = prompt_tokens(tiny.tokenizer, "why", chat=True)
    rollouts = collect(
        NativeEngine(load_causal_lm(tiny.path, dtype=torch.float32).eval()),
        [TokenizedPrompt(PromptRecord("why", "id", {}, ""), prompt)],
        settings_from(
            SamplingConfig(max_new_tokens=20, stop=[" sun", "the "]), [tiny.eos], lambda t: tiny.tokenizer.decode(t)
        ),
        decode=lambda tokens: tiny.tokenizer.decode(tokens),
        seeds=range(60),
        copies=60,
    )
    stopped = [r for r in rollouts if r.stop is StopReason.STOP]
    assert stopped
    for r in stopped:
        text = tiny.tokenizer.decode(r.response_tokens)
        assert text.startswith(r.response)
        assert text[len(r.response) :].startswith((" sun", "the "))
        assert not any(s in r.response for s in (" sun", "the "))
        assert r.stop.finished
