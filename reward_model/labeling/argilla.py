"""Argilla: records as version 2 writes them, and those of a v1 feedback data set.

Machines' labels are suggestions, one a record.
"""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reward_model.labeling.imports import NAMELESS, Imported, Said, get, name_of, objects
from reward_model.labeling.records import Answer, Item, Judgment
from reward_model.labeling.reliability import order_of
from reward_model.labeling.tool_rows import (
    VERDICTS,
    answer_of_values,
    by_item,
    item_of_data,
    ranks_of_groups,
    timed,
    write_rows,
)
from rlhf.data.fields import FieldError, Fields

_USERS = uuid.UUID("6f1c1e0a-1d53-5d0e-9b53-0d6d9a0b5a11")


# --- write ----------------------------------------------------------------------------------------------------


def write_argilla(folder: Path, items: Sequence[Item], judgments: Sequence[Judgment]) -> None:
    """`argilla.pairs.json` and `argilla.rankings.json`: records as Argilla 2's `records.to_json` writes them."""
    records: dict[str, list[Any]] = {"pair": [], "ranking": []}
    for item, own in by_item(items, judgments):
        records[item.kind].append(_record(item, own))
    write_rows(folder / "argilla.pairs.json", records["pair"])
    write_rows(folder / "argilla.rankings.json", records["ranking"])


def _record(item: Item, own: Sequence[Judgment]) -> dict[str, Any]:
    responses: dict[str, list[Any]] = defaultdict(list)
    suggestions, users = {}, {}
    for judgment in own:
        values = _values(judgment)
        if judgment.labeler == "person":
            user = str(uuid.uuid5(_USERS, judgment.annotator))
            users[user] = judgment.annotator
            for question, value in values.items():
                responses[question].append({"value": value, "user_id": user})
        elif not suggestions:
            agent = f"{judgment.labeler}: {judgment.annotator}"
            suggestions = {
                question: {"value": value, "score": None, "agent": agent} for question, value in values.items()
            }
    texts = {f"response-{i}": response.text for i, response in enumerate(item.responses, 1)}
    return {
        "id": item.key,
        "fields": {"prompt": item.prompt, **texts},
        "metadata": {
            "prompt_id": item.prompt_id,
            "policies": json.dumps([response.policy for response in item.responses]),
            "annotators": json.dumps(users),
            "kind": item.kind,
        },
        "suggestions": suggestions,
        "responses": dict(responses),
        "vectors": {},
        "status": "completed" if users else "pending",
    }


def _values(judgment: Judgment) -> dict[str, Any]:
    """Values of the questions `preference` (a label), or `ranking`; `strength`, `confidence` and `notes`."""
    answer, ranks = judgment.answer, judgment.ranks
    values: dict[str, Any] = {}
    if answer.choice in ("skip", "flag", "both_bad"):
        values["preference"] = answer.choice.replace("_", " ")
    elif judgment.kind == "ranking":
        values["ranking"] = [{"value": f"response-{i}", "rank": r + 1} for i, r in enumerate(order_of(ranks), 1)]
    elif ranks:
        values["preference"] = "tie" if ranks[0] == ranks[1] else f"response-{1 if ranks[0] < ranks[1] else 2}"
        if judgment.value:
            values["strength"] = abs(judgment.value)
    extra = {"confidence": answer.confidence, "notes": answer.notes, "ms_active": answer.ms_active}
    return values | {name: value for name, value in extra.items() if value}


# --- read -----------------------------------------------------------------------------------------------------


def argilla(fields: Fields) -> Imported:
    """A record of Argilla 2 (`responses` by question) or of a v1 feedback data set (`responses` by user)."""
    metadata = fields.get("metadata") or {}
    metadata = metadata if isinstance(metadata, dict) else {}
    data = dict(get(fields, "fields", dict))
    data |= {"prompt_id": metadata.get("prompt_id"), "policies": _json(metadata.get("policies"), [])}
    item, ids = item_of_data(data)
    if metadata.get("kind") == "ranking":
        item.kind = "ranking"
    users = _json(metadata.get("annotators"), {})
    said = []
    for user, values in _by_user(fields.get("responses")).items():
        annotator = name_of(users.get(user, user), f"{NAMELESS}argilla")
        said.append(Said(annotator, "person", _answer(values, ids, "responses")))
    by_agent: dict[str, dict[str, Any]] = defaultdict(dict)
    suggestions = fields.get("suggestions") or {}
    if isinstance(suggestions, dict):
        suggestions = [{"question_name": name} | _object(one, "suggestions") for name, one in suggestions.items()]
    for suggestion in objects(suggestions, "suggestions"):
        agent, question = str(suggestion.get("agent") or "argilla model"), str(suggestion.get("question_name"))
        by_agent[agent][question] = suggestion.get("value")
    for agent, values in by_agent.items():
        kind, colon, name = agent.partition(": ")
        labeler = "simulated" if colon and kind == "simulated" else "judge"
        said.append(Said(name_of(name or kind, "argilla model"), labeler, _answer(values, ids, "suggestions")))
    return Imported(item, said)


def _object(value: Any, key: str) -> dict[str, Any]:
    return objects([value], key)[0]


def _json(text: Any, default: Any) -> Any:
    try:
        value = json.loads(text) if isinstance(text, str) else default
    except ValueError:
        return default
    return value if isinstance(value, type(default)) else default


def _by_user(responses: Any) -> dict[str, dict[str, Any]]:
    """Question -> value, by user."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    if isinstance(responses, dict):
        for question, answers in responses.items():
            for answer in objects(answers, f"responses.{question}"):
                found[str(answer.get("user_id"))][question] = answer.get("value")
        return found
    for response in objects(responses, "responses"):
        user = str(response.get("user_id"))
        if response.get("status") == "discarded":
            found[user]["preference"] = "skip"
        elif response.get("status") in (None, "submitted"):
            for question, answer in _object(response.get("values") or {}, "responses.values").items():
                found[user][question] = answer.get("value") if isinstance(answer, dict) else answer
    return found


def _answer(values: Mapping[str, Any], ids: Sequence[str], at: str) -> Answer:
    """The first question whose value is a ranking, one of the responses, or a verdict."""
    extra = {key: values.get(key) for key in ("confidence", "notes")}
    ms = values.get("ms_active")
    seconds = {"lead_time": ms / 1000 if isinstance(ms, int) and 0 <= ms < 1e9 else 0}
    for question, value in values.items():
        if isinstance(value, list) and value:
            return timed(_ranking_answer(value, ids, f"{at}.{question}"), extra, seconds)
        if value in ids and len(ids) == 2:
            side = "right" if value == ids[1] else "left"
            return timed(
                answer_of_values({"selected": side, "strength": values.get("strength")}, ids, at), extra, seconds
            )
        if isinstance(value, str) and value.replace("_", " ") in VERDICTS and question not in extra:
            return timed(answer_of_values({"verdict": value}, ids, at), extra, seconds)
    raise FieldError(at, "has no ranking, chosen response or verdict", fix="answer the question, or remove it")


def _ranking_answer(value: Sequence[Any], ids: Sequence[str], key: str) -> Answer:
    """[{value, rank}], ties allowed; or names from the best to the worst."""
    if all(isinstance(entry, dict) for entry in value):
        groups: dict[int, list[Any]] = defaultdict(list)
        for entry in value:
            groups[get(entry, "rank", int, key)].append(entry.get("value"))
        return ranks_of_groups([groups[rank] for rank in sorted(groups)], ids, key)
    return ranks_of_groups([[name] for name in value], ids, key)
