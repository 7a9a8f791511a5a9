"""Questions to a judge whose answer everybody knows, to see that it reads: a real response against a spoiled one.

They are asked like any other pair, in both orders, and are never part of what is exported.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlhf.config_judge import JudgeControlsConfig
from rlhf.types import Prompt

MIN_WORDS = 8
"""Of a real response: a shorter one may be no better than its beginning."""


class HasResponses(Protocol):
    """A prompt with its responses."""

    @property
    def prompt(self) -> Prompt: ...

    @property
    def responses(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Control:
    """`real` is better than `bad`."""

    kind: str
    prompt: Prompt
    real: str
    bad: str


def truncated(text: str) -> str:
    """The first third of a text's words, so that it breaks off."""
    words = text.split()
    return " ".join(words[: len(words) // 3])


SPOILED: dict[str, Callable[[str], str]] = {"empty": lambda text: "", "colon": lambda text: ":", "truncated": truncated}


def controls_for(contests: Sequence[HasResponses], cfg: JudgeControlsConfig, *, seed: str) -> list[Control]:
    """Control pairs out of a batch's own responses, the kinds in turn; none where all responses are short."""
    real = [(c.prompt, text) for c in contests for text in c.responses if len(text.split()) >= MIN_WORDS]
    if not real:
        return []
    kinds = [*SPOILED]
    chosen = []
    for number in range(cfg.per_batch):
        prompt, text = real[int(random.Random(f"controls/{seed}/{number}").random() * len(real))]
        kind = kinds[number % len(kinds)]
        chosen.append(Control(kind, prompt, text, SPOILED[kind](text)))
    return chosen
