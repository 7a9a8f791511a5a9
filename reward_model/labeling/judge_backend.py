"""What a judge model is to the rest, wherever it runs: questions in, answers that can be stored out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from reward_model.labeling.judge_ledger import Ledger
from reward_model.labeling.judge_prompt import Question, Verdict


class NoVerdict(Exception):
    """An answer states no verdict.

    Args:
        kind: no_verdict, refusal, cut or too_long; under that name it is counted.
    """

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass(frozen=True)
class Failure:
    """A question without an answer, for a reason that may pass; a later run asks it again."""

    kind: str
    detail: str


UNASKED = Failure("budget", "the budget is used up")
"""Of a question that was not sent."""


class Backend(Protocol):
    """A judge model. `ask` is called by `parallel` threads, each with at most `chunk` questions."""

    chunk: int
    parallel: int

    def identity(self) -> list[Any]:
        """All that its answers depend on beside a question's texts, ready for JSON."""
        ...

    def ask(self, questions: Sequence[Question], keys: Sequence[str], ledger: Ledger) -> list[dict[str, Any] | Failure]:
        """An answer each, which is in the ledger by then, or why there is none.

        Raises:
            ConfigError: no question can be answered.
        """
        ...

    def verdict(self, answer: dict[str, Any]) -> Verdict:
        """What an answer of `ask` says.

        Raises:
            NoVerdict: nothing that counts.
        """
        ...

    def stop(self) -> None:
        """Waiting threads give up; nothing more is sent."""
        ...
