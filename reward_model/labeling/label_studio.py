"""Label Studio: tasks that it imports, and its JSON and JSON-MIN exports.

Machines' labels are predictions. What our scale has and its own templates lack (strength, tie, both bad, flag,
confidence, notes) stands in further controls, whose configuration is written beside the data.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_model.labeling.imports import NAMELESS, Imported, Said, get, name_of, objects
from reward_model.labeling.records import Answer, Item, Judgment
from reward_model.labeling.reliability import order_of
from reward_model.labeling.tool_rows import answer_of_values, by_item, item_of_data, timed, write_rows
from rlhf.data.fields import FieldError, Fields
from rlhf.types import Prompt

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


# --- write ---------------------------------------------------------------------------------------------------


def write_label_studio(folder: Path, items: Sequence[Item], judgments: Sequence[Judgment]) -> None:
    """`label_studio.pairs.json` and `label_studio.rankings.json`, each with the XML of its labeling interface."""
    tasks: dict[str, list[Any]] = {"pair": [], "ranking": []}
    for number, (item, own) in enumerate(by_item(items, judgments), 1):
        tasks[item.kind].append(_task(number, item, own))
    most = max((len(item.responses) for item in items if item.kind == "ranking"), default=0)
    buckets = "".join(f'<Bucket name="{rank}" title="{rank}"/>' for rank in range(1, most + 1))
    extras = PAIR_CONFIG[PAIR_CONFIG.index("  <Choices") :]
    ranking_config = (
        '<View>\n  <Text name="prompt" value="$prompt"/>\n  <List name="items" value="$items" title="Responses"/>\n'
        f'  <Ranker name="rank" toName="items">{buckets}</Ranker>\n' + extras
    )
    for kind, name, config in (("pair", "pairs", PAIR_CONFIG), ("ranking", "rankings", ranking_config)):
        write_rows(folder / f"label_studio.{name}.json", tasks[kind])
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


# --- read ----------------------------------------------------------------------------------------------------


def label_studio(fields: Fields) -> Imported:
    """A task of the JSON export, or of JSON-MIN, which has one row per annotation and no `data`."""
    if "data" not in fields:
        return _label_studio_min(fields)
    item, ids = item_of_data(get(fields, "data", dict))
    said = []
    for i, annotation in enumerate(objects(fields.get("annotations"), "annotations")):
        at = f"annotations[{i}]"
        values = {key: value for result in get(annotation, "result", list, at) for key, value in _values(result, at)}
        answer = Answer("skip") if annotation.get("was_cancelled") else answer_of_values(values, ids, at)
        by = annotation.get("completed_by")
        by = by.get("email") or by.get("id") if isinstance(by, dict) else by
        said.append(Said(name_of(by, f"{NAMELESS}label_studio"), "person", timed(answer, values, annotation)))
    for i, prediction in enumerate(objects(fields.get("predictions"), "predictions")):
        at = f"predictions[{i}]"
        values = {key: value for result in get(prediction, "result", list, at) for key, value in _values(result, at)}
        kind, colon, name = str(prediction.get("model_version") or "").partition(": ")
        labeler = "simulated" if colon and kind == "simulated" else "judge"
        said.append(
            Said(name_of(name or kind, "label_studio model"), labeler, timed(answer_of_values(values, ids, at), values))
        )
    return Imported(item, said)


def _label_studio_min(fields: Fields) -> Imported:
    item, ids = item_of_data(fields)
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
    return Imported(item, [Said(annotator, "person", timed(answer_of_values(values, ids, ""), values, fields))])


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
