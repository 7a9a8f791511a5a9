"""What the rows of Label Studio and Argilla have in common: an item, and answers to it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reward_model.labeling.imports import (
    answer_of_ranks,
    answer_of_strength,
    item_of,
    name_of,
    number_of,
    objects,
)
from reward_model.labeling.records import Answer, Candidate, Item, Judgment
from rlhf.data.fields import FieldError, prompt_at
from rlhf.types import Prompt

VERDICTS = {"tie": "tie", "both bad": "both_bad", "skip": "skip", "flag": "flag"}
_PROMPT_KEYS = ("messages", "prompt", "instruction", "question", "context", "input", "text")
_NUMBERED = re.compile(r"(answer|response|text|reply|completion|generation|summary|option)[ _-]?(\d+|[ab])", re.I)


def by_item(items: Sequence[Item], judgments: Sequence[Judgment]) -> list[tuple[Item, list[Judgment]]]:
    """Every item but gold questions, with the first looks at it."""
    own: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        if judgment.presentation == 0:
            own[judgment.item_key].append(judgment)
    return [(item, own[item.key]) for item in items if item.gold_ranks is None]


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """As JSON; no file where there are none."""
    if rows:
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def item_of_data(data: Mapping[str, Any]) -> tuple[Item, list[str]]:
    """The item, and the name under which each response is ranked."""
    if isinstance(data.get("items"), list):
        entries = objects(data["items"], "items")
        ids = [str(entry.get("id", i)) for i, entry in enumerate(entries)]
        texts = [str(entry.get("body") or entry.get("title") or "") for entry in entries]
    else:
        found = [(m[2], key) for key in data if (m := _NUMBERED.fullmatch(key)) and isinstance(data[key], str)]
        ids = [key for number, key in sorted(found, key=lambda one: (len(one[0]), *one))]  # 2 before 10
        texts = [data[key] for key in ids]
    policies = data.get("policies")
    policies = policies if isinstance(policies, list) and len(policies) == len(texts) else [""] * len(texts)
    item = item_of(_prompt_of(data), [Candidate(text, str(p)) for text, p in zip(texts, policies, strict=True)])
    if isinstance(data.get("items"), list):
        item.kind = "ranking"
    item.prompt_id = name_of(data.get("prompt_id"), item.prompt_id)
    return item, ids


def _prompt_of(data: Mapping[str, Any]) -> Prompt:
    key = next((key for key in _PROMPT_KEYS if data.get(key)), None)
    if key is None:
        raise FieldError("prompt", "is missing", fix=f"name it one of {', '.join(_PROMPT_KEYS)}")
    return prompt_at(data[key], key)


def answer_of_values(values: Mapping[str, Any], ids: Sequence[str], at: str) -> Answer:
    """By `ranker`, else by `selected` with its `strength`, else by `verdict`."""
    key = f"{at}.result" if at else "comparison"
    if "ranker" in values:
        return _ranked(values["ranker"], ids, key)
    if (selected := values.get("selected")) is not None:
        if selected not in ("left", "right") or len(ids) != 2:
            raise FieldError(key, f"selects {selected!r}", fix="it must be left or right, of two")
        strength = number_of(values.get("strength") or 0, f"{key}.strength")
        if strength < 0:
            raise FieldError(
                f"{key}.strength", f"is {strength}", fix="count from 1: the side is said by the comparison"
            )
        right = selected == "right"
        return answer_of_strength(strength if right else -strength) if strength else answer_of_ranks([right, not right])
    verdict = VERDICTS.get(str(values.get("verdict")).replace("_", " "))
    if verdict is None:
        raise FieldError(key, "has no comparison, ranking or verdict", fix="label the task, or remove the annotation")
    if verdict == "tie":
        return Answer("compare", value=0) if len(ids) == 2 else Answer("rank", ranks=[1] * len(ids))
    return Answer(verdict)  # type: ignore[arg-type]


def _ranked(ranker: Any, ids: Sequence[str], key: str) -> Answer:
    """Buckets by rank, or one list from the best to the worst."""
    if not isinstance(ranker, dict) or not all(isinstance(members or [], list) for members in ranker.values()):
        raise FieldError(key, "has a ranker without ranks", fix="export the project again as JSON")
    filled = {name: members for name, members in ranker.items() if members}
    if len(filled) == 1 and not next(iter(filled)).isdecimal():
        groups = [[member] for member in next(iter(filled.values()))]
    elif all(name.isdecimal() for name in filled):
        groups = [filled[name] for name in sorted(filled, key=int)]
    else:
        raise FieldError(key, f"ranks into {', '.join(filled)}", fix="name the buckets 1, 2, ..., 1 the best")
    return ranks_of_groups(groups, ids, key)


def ranks_of_groups(groups: Sequence[Sequence[Any]], ids: Sequence[str], key: str) -> Answer:
    """Names by rank, the best first."""
    if not all(isinstance(group, list) for group in groups):
        raise FieldError(key, "has ranks that are no lists", fix="export the project again as JSON")
    ranks = {str(member): rank for rank, group in enumerate(groups) for member in group}
    if ranks.keys() != set(ids):
        raise FieldError(key, f"ranks {sorted(ranks)}", fix=f"rank each of {', '.join(ids)} once")
    return answer_of_ranks([ranks[name] for name in ids])


def timed(answer: Answer, values: Mapping[str, Any], row: Mapping[str, Any] | None = None) -> Answer:
    """The answer with confidence and notes of `values`, and the seconds of `row`."""
    confidence, seconds = values.get("confidence"), (row or {}).get("lead_time")
    ms = round(1000 * seconds) if isinstance(seconds, int | float) and 0 <= seconds < 1e6 else 0
    confidence = confidence if confidence in (1, 2, 3, 4, 5) else None
    return Answer(answer.choice, answer.value, answer.ranks, confidence, str(values.get("notes") or "")[:2000], ms)
