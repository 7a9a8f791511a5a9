"""From judgments to what is trained on: one label per item, as a `Ranking` and as TRL's prompt / chosen / rejected.

Of each item the people's judgments count; where no person decided, the judge's, then the simulated annotators'.
Comparisons count before rankings that an importer derived from ratings: the two are never averaged. A person's
swapped repeat is left out. A judge was asked in both orders, and both count: two answers that contradict each other
are a tie.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from reward_model.labeling.aggregation import Wins, aggregate, by_item
from reward_model.labeling.agreement import TIE, ranks_from_wins
from reward_model.labeling.judge_votes import judge_wins
from reward_model.labeling.records import Item, Judgment, Labeler
from reward_model.labeling.reliability import order_of
from rlhf.config_labeling import ExportConfig
from rlhf.data.fields import FieldError, as_chat
from rlhf.data.formats import RANKINGS
from rlhf.data.records import prompt_id
from rlhf.errors import DataError
from rlhf.types import Preference, Prompt, Ranking

LABELERS: dict[Labeler, str] = {"person": "people", "judge": "judge model", "simulated": "simulated"}
"""In the order in which their judgments count, with the name that every exported line carries as `labels`."""

RATED = "ratings of "
"""How the name of an imported annotator begins whose rankings were derived from ratings."""

Source = Literal["comparisons", "ratings"]


@dataclass
class Labeled:
    """An item with its label. `wins[i][j]` is the probability that response i beats response j.

    `margin` is the mean strength, 0 .. 3, in favour of the better of a pair; None where no strength was asked, and of a
    judge that states a probability.
    `agreement` is the share of the annotators who gave the commonest answer.
    """

    item: Item
    wins: Wins
    labels: str
    source: Source
    annotators: int
    agreement: float
    margin: float | None

    @property
    def ranks(self) -> list[int]:
        """By response, 1 the best."""
        return ranks_from_wins(self.wins)

    @property
    def tied(self) -> bool:
        """Whether no response is better than another one."""
        return all(abs(p - 0.5) <= TIE for row in self.wins for p in row)


def label_items(
    items: Sequence[Item], states: Mapping[str, str], judgments: Sequence[Judgment], cfg: ExportConfig
) -> tuple[list[Labeled], Counter[str]]:
    """The labeled items in the order of the queue, and how many were left out, by reason.

    Args:
        states: by key, as the store has them; flagged and retired items are left out.
        judgments: the effective ones.
    """
    grouped, left_out = by_item(judgments), Counter[str]()
    used: dict[str, list[Judgment]] = {}
    for item in items:
        own = grouped.get(item.key, [])
        if reason := _reason_to_leave_out(item, states.get(item.key, "open"), own):
            left_out[reason] += 1
        else:
            used[item.key] = judgments_that_count(own)
    by_key = {item.key: item for item in items}
    wins = aggregate(by_key, [judgment for own in used.values() for judgment in own], cfg.aggregate)
    labeled = [_label(by_key[key], wins[key], own) for key, own in used.items()]
    if cfg.ties == "drop":
        left_out["tied"] = sum(label.tied for label in labeled)
        labeled = [label for label in labeled if not label.tied]
    return labeled, +left_out


def judgments_that_count(own: Sequence[Judgment]) -> list[Judgment]:
    """Of one item's judgments, those that its label is made of."""
    deciding = [j for j in own if j.decides and not (j.labeler == "person" and j.presentation)]
    for labeler in LABELERS:
        theirs = [j for j in deciding if j.labeler == labeler]
        if theirs:
            return [j for j in theirs if not is_rating(j)] or theirs
    return []


def is_rating(judgment: Judgment) -> bool:
    """Whether it was derived from ratings."""
    return judgment.annotator.startswith(RATED)


def _reason_to_leave_out(item: Item, state: str, own: Sequence[Judgment]) -> str:
    if item.gold_ranks is not None:
        return "gold questions"
    if state in ("flagged", "retired"):
        return state
    if judgments_that_count(own):
        return ""
    return "skipped by all" if own else "not judged"


def _label(item: Item, wins: Wins, own: Sequence[Judgment]) -> Labeled:
    answers = Counter(tuple(order_of(j.ranks)) for j in own)
    better = 1 if wins[1][0] > 0.5 + TIE else 0
    # The strength of a probability is the probability, which trains as a soft label: a margin would count it twice.
    strengths = [j.value if better else -j.value for j in own if j.value is not None and judge_wins(j) is None]
    lead = sum(strengths) / len(strengths) if strengths else None
    if lead is not None:
        # A tie has no better side that could lead. Weighted votes may contradict the strengths; a lead below 0 would
        # ask the worse response to win.
        lead = 0.0 if abs(wins[1][0] - 0.5) <= TIE else max(0.0, lead)
    return Labeled(
        item=item,
        wins=wins,
        labels=LABELERS[own[0].labeler],
        source="ratings" if is_rating(own[0]) else "comparisons",
        annotators=len({j.annotator for j in own}),
        agreement=answers.most_common(1)[0][1] / len(own),
        margin=lead,
    )


def is_held_out(prompt: Prompt, fraction: float, seed: int) -> bool:
    """Whether a prompt is kept for testing. It depends on the prompt alone, so none changes sides as labels grow.

    A text and a chat of that one user turn are the same prompt: files of several formats hold both.
    """
    digest = hashlib.sha256(f"{seed}/{prompt_id(as_chat(prompt))}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


# --- rankings -------------------------------------------------------------------------------------------------


def ranking_of(label: Labeled) -> Ranking:
    """The record that `rlhf reward` reads; tokens stay where every response came with its own."""
    item = label.item
    tokens = [response.tokens for response in item.responses if response.tokens is not None]
    meta = {**_origin(label), "policies": [response.policy for response in item.responses]}
    return Ranking(
        prompt=item.prompt,
        responses=[response.text for response in item.responses],
        ranks=label.ranks,
        wins=label.wins,
        tokens=tokens if len(tokens) == len(item.responses) else None,
        prompt_id=item.prompt_id or prompt_id(item.prompt),
        meta=meta,
        margin=label.margin,
    )


def unreadable(ranking: Ranking) -> str:
    """Why `rlhf reward` would refuse this ranking, or ""."""
    try:
        RANKINGS["ranking"](asdict(ranking))
    except FieldError as error:
        return error.message
    return ""


def _origin(label: Labeled) -> dict[str, Any]:
    """Who labeled, from what, and how surely; on every line."""
    item = label.item
    return {
        "labels": label.labels,
        "label_source": label.source,
        "annotators": label.annotators,
        "agreement": round(label.agreement, 6),
        "item": item.key,
        "source": item.source,
        "batch": item.batch,
        "sampling": str(item.meta.get("sampling", "")),
    }


# --- TRL ------------------------------------------------------------------------------------------------------


def is_conversational(labeled: Sequence[Labeled], cfg: ExportConfig) -> bool:
    """Whether rows are written as turns: TRL wants one way for a whole file."""
    if cfg.format == "auto":
        return any(not isinstance(label.item.prompt, str) for label in labeled)
    return cfg.format == "conversational"


def preference_row(label: Labeled, cfg: ExportConfig, *, conversational: bool, margins: bool) -> dict[str, Any]:
    """A pair in TRL's preference format, with who labeled it.

    The implicit standard format is a dialogue of "\\n\\nHuman:" and "\\n\\nAssistant:" turns: of other texts nobody
    could tell where the prompt ends.

    Raises:
        DataError: the item cannot be written so that `rlhf reward` reads the same pair again.
    """
    item = label.item
    ranks = label.ranks
    best, worst = (1, 0) if ranks[1] < ranks[0] else (0, 1)
    prompt = item.prompt
    pair = Preference(prompt, item.responses[best].text, item.responses[worst].text)
    row = _as_turns(pair, cfg) if conversational else _as_text(pair, cfg)
    row |= {
        "probability": round(label.wins[best][worst], 6),
        **({"margin": label.margin or 0.0} if margins else {}),
        **_origin(label),
        "prompt_id": item.prompt_id or prompt_id(prompt),
        "chosen_policy": item.responses[best].policy,
        "rejected_policy": item.responses[worst].policy,
    }
    hh = not conversational and cfg.prompt == "implicit"
    read = RANKINGS["hh" if hh else "preference"](row)
    same = [text.strip() for text in read.responses] == [pair.chosen.strip(), pair.rejected.strip()]
    if not same or not _equal_prompts(read.prompt, prompt):
        raise DataError("the pair would be read as another one", fix="set export.format: conversational")
    return row


def _equal_prompts(read: Prompt, written: Prompt) -> bool:
    turns, wanted = as_chat(read), as_chat(written)
    strip = [(turn["role"], turn["content"].strip()) for turn in turns]
    return strip == [(turn["role"], turn["content"].strip()) for turn in wanted]


def _as_turns(pair: Preference, cfg: ExportConfig) -> dict[str, Any]:
    prompt = as_chat(pair.prompt)
    sides = {
        side: [{"role": "assistant", "content": text}]
        for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
    if cfg.prompt == "explicit":
        return {"prompt": prompt, **sides}
    return {side: [*prompt, *answer] for side, answer in sides.items()}


def _as_text(pair: Preference, cfg: ExportConfig) -> dict[str, Any]:
    turns = as_chat(pair.prompt)
    if cfg.prompt == "explicit":
        if len(turns) > 1 or turns[0]["role"] != "user":
            raise DataError("a chat of several turns is no plain text", fix="set export.format: conversational")
        return {"prompt": turns[0]["content"], "chosen": pair.chosen, "rejected": pair.rejected}
    speakers = {"user": "Human", "assistant": "Assistant"}
    if turns[0]["role"] == "system":
        raise DataError("dialogues of Human and Assistant have no system turn", fix="set export.format: conversational")
    asked = "".join(f"\n\n{speakers[turn['role']]}: {turn['content']}" for turn in turns)
    return {
        side: f"{asked}\n\nAssistant: {text}" for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
    }
