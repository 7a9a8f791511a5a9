"""Label Studio and Argilla: files that they import, and files that they export, without either of them installed.

Written with responses in the order of the queue (the sides as shown are not kept), and read back to the same items
and answers. Machines' labels become predictions (Label Studio) or suggestions (Argilla, one a record).
What our scale has and the tools' own templates lack (strength, tie, both bad, flag, confidence, notes) stands in
further controls, whose configuration is written beside the data.
"""

from __future__ import annotations

import json
import re
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reward_model.labeling.imports import (
    NAMELESS,
    Imported,
    Said,
    answer_of_ranks,
    answer_of_strength,
    get,
    item_of,
    name_of,
    number_of,
    objects,
)
from reward_model.labeling.records import Answer, Candidate, Item, Judgment
from reward_model.labeling.reliability import order_of
from rlhf.data.fields import FieldError, Fields, prompt_at
from rlhf.types import Prompt

VERDICTS = {"tie": "tie", "both bad": "both_bad", "skip": "skip", "flag": "flag"}
_PROMPT_KEYS = ("messages", "prompt", "instruction", "question", "context", "input", "text")
_NUMBERED = re.compile(r"(answer|response|text|reply|completion|generation|summary|option)[ _-]?(\d+|[ab])", re.I)
_USERS = uuid.UUID("6f1c1e0a-1d53-5d0e-9b53-0d6d9a0b5a11")

PAIR_CONFIG = """<View>
  <Text name="prompt" value="$prompt"/>
  <Pairwise name="comparison" toName="answer1,answer2"/>
  <Text name="answer1" value="$answer1"/>
  <Text name="answer2" value="$answer2"/>
  <Rating name="strength" toName="prompt" maxRating="3"/>
  <Choices name="verdict" toName="prompt">
    <Choice value="tie"/><Choice value="both bad"/><Choice value="flag"/>
  </Choices>
  <Rating name="confidence" toName="prompt" maxRating="5"/>
  <TextArea name="notes" toName="prompt"/>
</View>
"""


def _shown_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt)


def _by_item(items: Sequence[Item], judgments: Sequence[Judgment]) -> list[tuple[Item, list[Judgment]]]:
    """Every item but gold questions, with the first looks at it."""
    own: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        if judgment.presentation == 0:
            own[judgment.item_key].append(judgment)
    return [(item, own[item.key]) for item in items if item.gold_ranks is None]


def _write(path: Path, rows: Sequence[Any]) -> None:
    if rows:
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --- Label Studio: write --------------------------------------------------------------------------------------


def write_label_studio(folder: Path, items: Sequence[Item], judgments: Sequence[Judgment]) -> None:
    """`label_studio.pairs.json` and `label_studio.rankings.json`, each with the XML of its labeling interface."""
    tasks: dict[str, list[Any]] = {"pair": [], "ranking": []}
    for number, (item, own) in enumerate(_by_item(items, judgments), 1):
        tasks[item.kind].append(_task(number, item, own))
    most = max((len(item.responses) for item in items if item.kind == "ranking"), default=0)
    buckets = "".join(f'<Bucket name="{rank}" title="{rank}"/>' for rank in range(1, most + 1))
    extras = PAIR_CONFIG[PAIR_CONFIG.index("  <Choices") :]
    ranking_config = (
        '<View>\n  <Text name="prompt" value="$prompt"/>\n  <List name="items" value="$items" title="Responses"/>\n'
        f'  <Ranker name="rank" toName="items">{buckets}</Ranker>\n' + extras
    )
    for kind, name, config in (("pair", "pairs", PAIR_CONFIG), ("ranking", "rankings", ranking_config)):
        _write(folder / f"label_studio.{name}.json", tasks[kind])
        if tasks[kind]:
            (folder / f"label_studio.{name}.xml").write_text(config, encoding="utf-8")


def _task(number: int, item: Item, own: Sequence[Judgment]) -> dict[str, Any]:
    data: dict[str, Any] = {"prompt": _shown_text(item.prompt), "prompt_id": item.prompt_id}
    if not isinstance(item.prompt, str):
        data["messages"] = item.prompt
    texts = [response.text for response in item.responses]
    if item.kind == "pair":
        data |= {"answer1": texts[0], "answer2": texts[1]}
    else:
        data["items"] = [{"id": f"response-{i}", "title": "", "body": text} for i, text in enumerate(texts, 1)]
    data["policies"] = [response.policy for response in item.responses]
    task: dict[str, Any] = {"id": number, "data": data, "annotations": [], "predictions": []}
    for judgment in own:
        if judgment.labeler == "person":
            annotation = {
                "id": judgment.id,
                "completed_by": {"email": judgment.annotator},
                "result": _results(judgment),
                "was_cancelled": judgment.answer.choice == "skip",
                "lead_time": judgment.answer.ms_active / 1000,
            }
            task["annotations"].append(annotation)
        else:
            prediction = {"model_version": f"{judgment.labeler}: {judgment.annotator}", "result": _results(judgment)}
            task["predictions"].append(prediction)
    return task


def _results(judgment: Judgment) -> list[dict[str, Any]]:
    """Label Studio's controls, set as the judgment says."""
    answer, found = judgment.answer, []

    def add(name: str, kind: str, value: Any, to: str = "prompt") -> None:
        found.append({"id": f"{judgment.id}-{name}", "from_name": name, "to_name": to, "type": kind, "value": value})

    if judgment.kind == "ranking" and judgment.ranks and answer.choice == "rank":
        buckets: dict[str, list[str]] = defaultdict(list)
        for i, rank in enumerate(order_of(judgment.ranks), 1):
            buckets[str(rank + 1)].append(f"response-{i}")
        add("rank", "ranker", {"ranker": dict(sorted(buckets.items()))}, "items")
    elif judgment.ranks and judgment.ranks[0] != judgment.ranks[1]:
        selected = "left" if judgment.ranks[0] < judgment.ranks[1] else "right"
        add("comparison", "pairwise", {"selected": selected}, "answer1,answer2")
        if judgment.value is not None:
            add("strength", "rating", {"rating": abs(judgment.value)})
    elif answer.choice in ("compare", "rank"):
        add("verdict", "choices", {"choices": ["tie"]})
    elif answer.choice in ("both_bad", "flag"):
        add("verdict", "choices", {"choices": [answer.choice.replace("_", " ")]})
    if answer.confidence is not None:
        add("confidence", "rating", {"rating": answer.confidence})
    if answer.notes:
        add("notes", "textarea", {"text": [answer.notes]})
    return found


# --- Label Studio: read ---------------------------------------------------------------------------------------


def label_studio(fields: Fields) -> Imported:
    """A task of the JSON export, or of JSON-MIN, which has one row per annotation and no `data`."""
    if "data" not in fields:
        return _label_studio_min(fields)
    item, ids = _item_of_data(get(fields, "data", dict))
    said = []
    for i, annotation in enumerate(objects(fields.get("annotations"), "annotations")):
        at = f"annotations[{i}]"
        values = {key: value for result in get(annotation, "result", list, at) for key, value in _values(result, at)}
        answer = Answer("skip") if annotation.get("was_cancelled") else _answer(values, ids, at)
        by = annotation.get("completed_by")
        by = by.get("email") or by.get("id") if isinstance(by, dict) else by
        said.append(Said(name_of(by, f"{NAMELESS}label_studio"), "person", _timed(answer, values, annotation)))
    for i, prediction in enumerate(objects(fields.get("predictions"), "predictions")):
        at = f"predictions[{i}]"
        values = {key: value for result in get(prediction, "result", list, at) for key, value in _values(result, at)}
        kind, colon, name = str(prediction.get("model_version") or "").partition(": ")
        labeler = "simulated" if colon and kind == "simulated" else "judge"
        said.append(
            Said(name_of(name or kind, "label_studio model"), labeler, _timed(_answer(values, ids, at), values))
        )
    return Imported(item, said)


def _label_studio_min(fields: Fields) -> Imported:
    item, ids = _item_of_data(fields)
    values = {}
    for key, value in fields.items():
        for control in value if isinstance(value, list) else [value]:
            if isinstance(control, dict):
                values.update({k: v for k, v in control.items() if k in ("selected", "ranker")})
                if "rating" in control:
                    values[key] = control["rating"]
            elif key in ("verdict", "notes", "strength", "confidence"):
                values[key] = control
            elif control in ("left", "right"):
                values["selected"] = control
    annotator = name_of(fields.get("annotator"), f"{NAMELESS}label_studio")
    return Imported(item, [Said(annotator, "person", _timed(_answer(values, ids, ""), values, fields))])


def _values(result: Any, at: str) -> list[tuple[str, Any]]:
    """(meaning, value) of one control."""
    if not isinstance(result, dict) or not isinstance(result.get("value"), dict):
        raise FieldError(f"{at}.result", "holds something else than controls", fix="export the project again as JSON")
    value, kind, name = result["value"], result.get("type"), str(result.get("from_name"))
    if kind == "pairwise":
        return [("selected", value.get("selected"))]
    if kind == "ranker":
        return [("ranker", value.get("ranker"))]
    if kind == "rating":
        return [(name, value.get("rating"))]
    if kind == "choices" and (choices := _texts(value.get("choices"), f"{at}.result.choices")):
        return [("verdict", choices[0])]
    if kind == "textarea" and (texts := _texts(value.get("text"), f"{at}.result.text")):
        return [(name, "\n".join(texts))]
    return []


def _texts(value: Any, key: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise FieldError(key, "is no text and no list of texts", fix="export the project again as JSON")
    return texts


def _answer(values: Mapping[str, Any], ids: Sequence[str], at: str) -> Answer:
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
    return _ranks_of_groups(groups, ids, key)


def _ranks_of_groups(groups: Sequence[Sequence[Any]], ids: Sequence[str], key: str) -> Answer:
    if not all(isinstance(group, list) for group in groups):
        raise FieldError(key, "has ranks that are no lists", fix="export the project again as JSON")
    ranks = {str(member): rank for rank, group in enumerate(groups) for member in group}
    if ranks.keys() != set(ids):
        raise FieldError(key, f"ranks {sorted(ranks)}", fix=f"rank each of {', '.join(ids)} once")
    return answer_of_ranks([ranks[name] for name in ids])


def _timed(answer: Answer, values: Mapping[str, Any], row: Mapping[str, Any] | None = None) -> Answer:
    confidence, seconds = values.get("confidence"), (row or {}).get("lead_time")
    ms = round(1000 * seconds) if isinstance(seconds, int | float) and 0 <= seconds < 1e6 else 0
    confidence = confidence if confidence in (1, 2, 3, 4, 5) else None
    return Answer(answer.choice, answer.value, answer.ranks, confidence, str(values.get("notes") or "")[:2000], ms)


def _item_of_data(data: Mapping[str, Any]) -> tuple[Item, list[str]]:
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


# --- Argilla --------------------------------------------------------------------------------------------------


def write_argilla(folder: Path, items: Sequence[Item], judgments: Sequence[Judgment]) -> None:
    """`argilla.pairs.json` and `argilla.rankings.json`: records as Argilla 2's `records.to_json` writes them."""
    records: dict[str, list[Any]] = {"pair": [], "ranking": []}
    for item, own in _by_item(items, judgments):
        records[item.kind].append(_record(item, own))
    _write(folder / "argilla.pairs.json", records["pair"])
    _write(folder / "argilla.rankings.json", records["ranking"])


def _record(item: Item, own: Sequence[Judgment]) -> dict[str, Any]:
    responses: dict[str, list[Any]] = defaultdict(list)
    suggestions, users = {}, {}
    for judgment in own:
        values = _argilla_values(judgment)
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


def _argilla_values(judgment: Judgment) -> dict[str, Any]:
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


def argilla(fields: Fields) -> Imported:
    """A record of Argilla 2 (`responses` by question) or of a v1 feedback data set (`responses` by user)."""
    metadata = fields.get("metadata") or {}
    metadata = metadata if isinstance(metadata, dict) else {}
    data = dict(get(fields, "fields", dict))
    data |= {"prompt_id": metadata.get("prompt_id"), "policies": _json(metadata.get("policies"), [])}
    item, ids = _item_of_data(data)
    if metadata.get("kind") == "ranking":
        item.kind = "ranking"
    users = _json(metadata.get("annotators"), {})
    said = []
    for user, values in _by_user(fields.get("responses")).items():
        annotator = name_of(users.get(user, user), f"{NAMELESS}argilla")
        said.append(Said(annotator, "person", _argilla_answer(values, ids, "responses")))
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
        said.append(Said(name_of(name or kind, "argilla model"), labeler, _argilla_answer(values, ids, "suggestions")))
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


def _argilla_answer(values: Mapping[str, Any], ids: Sequence[str], at: str) -> Answer:
    """The first question whose value is a ranking, one of the responses, or a verdict."""
    extra = {key: values.get(key) for key in ("confidence", "notes")}
    ms = values.get("ms_active")
    seconds = {"lead_time": ms / 1000 if isinstance(ms, int) and 0 <= ms < 1e9 else 0}
    for question, value in values.items():
        if isinstance(value, list) and value:
            return _timed(_argilla_ranking(value, ids, f"{at}.{question}"), extra, seconds)
        if value in ids and len(ids) == 2:
            side = "right" if value == ids[1] else "left"
            return _timed(_answer({"selected": side, "strength": values.get("strength")}, ids, at), extra, seconds)
        if isinstance(value, str) and value.replace("_", " ") in VERDICTS and question not in extra:
            return _timed(_answer({"verdict": value}, ids, at), extra, seconds)
    raise FieldError(at, "has no ranking, chosen response or verdict", fix="answer the question, or remove it")


def _argilla_ranking(value: Sequence[Any], ids: Sequence[str], key: str) -> Answer:
    """[{value, rank}], ties allowed; or names from the best to the worst."""
    if all(isinstance(entry, dict) for entry in value):
        groups: dict[int, list[Any]] = defaultdict(list)
        for entry in value:
            groups[get(entry, "rank", int, key)].append(entry.get("value"))
        return _ranks_of_groups([groups[rank] for rank in sorted(groups)], ids, key)
    return _ranks_of_groups([[name] for name in value], ids, key)


WRITERS: dict[str, Callable[[Path, Sequence[Item], Sequence[Judgment]], None]] = {
    "label_studio": write_label_studio,
    "argilla": write_argilla,
}
READERS: dict[str, Callable[[Fields], Imported]] = {"label_studio": label_studio, "argilla": argilla}
