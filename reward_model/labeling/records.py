"""What is labeled and what was said about it, as plain data: the same for people, judge models and simulations.

Two orientations, never mixed:
    shown      places on the screen, 0 the leftmost or topmost; what was clicked, and what is stored
    canonical  indices of the item's responses, as they were queued; what aggregates and exports speak of

`order[place]` is the index of the response that was shown at that place, so it leads from one to the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # it brings torch along, and the labeling server starts without
    from rlhf.types import Prompt

Kind = Literal["pair", "ranking"]
Labeler = Literal["person", "judge", "simulated"]
Choice = Literal["compare", "rank", "both_bad", "skip", "flag", "undo"]

STRONGEST = 3
"""Largest strength of a comparison: the scale of seven points is -3 .. 3."""


@dataclass
class Candidate:
    """One response of an item, and where it comes from; the browser learns the latter after the judgment only."""

    text: str
    policy: str = ""
    tokens: list[int] | None = None
    score: float | None = None


def neutral_order(responses: Sequence[Candidate]) -> list[int]:
    """Indices of the responses, sorted by a hash of their texts.

    Files name the chosen one first, and buffers the older model's: numbered so, "response 0" would mostly win, and
    coefficients of agreement take a common answer for chance. A hash knows nothing of either.
    """
    hashes = [hashlib.sha256(response.text.encode("utf-8", "surrogatepass")).digest() for response in responses]
    return sorted(range(len(responses)), key=lambda i: hashes[i])


@dataclass
class Item:
    """A prompt with the K responses to compare: two of a `pair`, two or more of a `ranking`.

    `wanted` judgments by different people are asked for, never more. Higher `priority` comes first. `gold_ranks`,
    by response, 1 the best, makes it a gold question: everybody may get it, and its answers are not exported.
    """

    prompt: Prompt
    responses: list[Candidate]
    kind: Kind = "pair"
    prompt_id: str = ""
    source: str = ""
    batch: str = ""
    wanted: int = 1
    priority: float = 0.0
    gold_ranks: list[int] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """16 hexadecimal digits that stand for kind, prompt and texts: queueing the same again adds nothing."""
        content = [self.kind, self.prompt, [response.text for response in self.responses]]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Answer:
    """What was clicked, in the shown orientation.

    `compare`: `value` -3 .. 3, negative where the left one is better, 0 a tie. `rank`: `ranks[place]`, 1 the best,
    ties allowed; of a pair, it names the better one without a strength. Neither with `both_bad` (all responses are
    bad), `skip` (not for me), `flag` (something is wrong with the item) and `undo` (the judgment that this one
    supersedes is withdrawn).
    """

    choice: Choice
    value: int | None = None
    ranks: list[int] | None = None
    confidence: int | None = None
    notes: str = ""
    ms_active: int = 0


@dataclass(frozen=True)
class Judgment:
    """One stored answer: a row that never changes. A later row may supersede it (undo, or a change of mind).

    `presentation` is 0, or 1 where the item came back to the same annotator with the sides swapped.
    """

    id: int
    item_key: str
    kind: Kind
    annotator: str
    labeler: Labeler
    order: list[int]
    answer: Answer
    presentation: int = 0
    supersedes: int | None = None
    created_ms: int = 0

    @property
    def decides(self) -> bool:
        """Whether it says something about the responses: not so of skip, flag and undo."""
        return self.answer.choice in ("compare", "rank", "both_bad")

    @property
    def ranks(self) -> list[int] | None:
        """Ranks by response (canonical), 1 the best; all 1 for a tie or both bad; None where it decides nothing."""
        if not self.decides:
            return None
        return canonical_ranks(self.answer, self.order)

    @property
    def value(self) -> int | None:
        """Of a comparison, its strength in favour of response 1 (canonical): -3 .. 3, negative for response 0."""
        if self.answer.choice != "compare" or self.answer.value is None:
            return None
        return self.answer.value if self.order == [0, 1] else -self.answer.value


def canonical_ranks(answer: Answer, order: list[int]) -> list[int]:
    """Ranks by response of an answer that was given by place.

    Raises:
        ValueError: the answer ranks nothing.
    """
    if answer.choice == "both_bad":
        return [1] * len(order)
    if answer.choice == "compare" and answer.value is not None:
        shown = [1 + (answer.value > 0), 1 + (answer.value < 0)]
    elif answer.choice == "rank" and answer.ranks is not None:
        shown = answer.ranks
    else:
        raise ValueError(f"{answer.choice} ranks nothing")
    ranks = [0] * len(order)
    for place, response in enumerate(order):
        ranks[response] = shown[place]
    return ranks


@dataclass(frozen=True)
class Task:
    """What one annotator has before them. Blind: texts alone, by place; nothing says where they come from."""

    assignment_id: int
    item_id: int
    kind: Kind
    prompt: Prompt
    responses: list[str]
    lease_expires_ms: int
    previous: Answer | None = None
    """After an undo: the answer that was withdrawn."""
    passed_over: int = 0
    """Of the undo itself: later skips and flags that it could not take back, since their items are gone."""


@dataclass(frozen=True)
class Receipt:
    """That a judgment is stored. `policies`, by place, are told only now.

    `repeated`: the submission was stored before, the same click came twice. `paused`: "", or why this annotator gets
    no further items.
    """

    judgment_id: int
    repeated: bool
    policies: list[str]
    paused: str


@dataclass(frozen=True)
class Added:
    """How many of the items that were brought are new, and how many were there before."""

    new: int
    known: int


@dataclass(frozen=True)
class Progress:
    """Where a project stands, in judgments that decide; gold questions and retired items are not in the last four.

    Attributes:
        judged: by this user, gold questions and repeats included; without a user by all people.
        paused: "", or why this user gets no items.
        wanted: asked for in all.
        done: of those, given.
        open: of those, neither given nor before an annotator now, and not held back by a flag.
        flagged: items held back by a flag.
    """

    judged: int
    paused: str
    wanted: int
    done: int
    open: int
    flagged: int
