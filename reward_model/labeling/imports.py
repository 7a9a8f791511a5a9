"""What a row of a foreign file holds: an item, and what was said about it. One small parser per format.

| format | rows |
|---|---|
| ranking, preference, hh | as `rlhf.data.formats` reads them; a ranking of two is a pair |
| tldr | openai/summarize_from_feedback, comparisons: `info`, `summaries`, `choice`, `worker` |
| ultrafeedback | openbmb/UltraFeedback: `instruction`, `completions` with `overall_score` |
| label_studio, argilla | exports of these tools; see `other_tools` |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reward_model.labeling.preferences import LABELERS, RATED
from reward_model.labeling.records import STRONGEST, Answer, Candidate, Item, Labeler
from rlhf.data.fields import FieldError, Fields, encodable, prompt_at
from rlhf.data.formats import RANKINGS, scalar_meta
from rlhf.data.records import prompt_id
from rlhf.types import Prompt, Ranking

MAX_NAME = 64
NAMELESS = "imported "
"""How the annotators are called whom a file does not name."""


@dataclass
class Said:
    """An answer that came with a row, in the order of the row's responses.

    `was_soft`: the row gave a probability, which no answer can hold.
    """

    annotator: str
    labeler: Labeler
    answer: Answer
    was_soft: bool = False


@dataclass
class Imported:
    """An item and its labels; `where` is its place in the file."""

    item: Item
    said: list[Said] = field(default_factory=list)
    where: str = ""


Parser = Callable[[Fields], Imported]


def item_of(prompt: Prompt, responses: Sequence[Candidate], meta: Mapping[str, Any] | None = None) -> Item:
    """A pair of two responses, a ranking of more.

    Raises:
        FieldError: fewer than two, or two alike; no prompt; halves of characters.
    """
    prompt = prompt_at(prompt)
    texts = [encodable(response.text, f"responses[{i}]") for i, response in enumerate(responses)]
    if len(texts) < 2:
        raise FieldError("responses", f"are {len(texts)}", fix="give two responses or more to compare")
    for i, text in enumerate(texts):
        if text in texts[:i]:
            raise FieldError(f"responses[{i}]", "equals another one", fix="remove the row: there is nothing to compare")
    kind = "pair" if len(texts) == 2 else "ranking"
    return Item(prompt, list(responses), kind, prompt_id=prompt_id(prompt), meta=dict(meta or {}))


def answer_of_ranks(ranks: Sequence[float]) -> Answer:
    """Ranks without gaps, low is best; a pair without a strength is answered by ranks, too."""
    places = sorted(set(ranks))
    return Answer("rank", ranks=[1 + places.index(rank) for rank in ranks])


def answer_of_strength(value: float) -> Answer:
    """A comparison: `value` in favour of response 1, cut to -3 .. 3. One that is not 0 stays so."""
    sign = (value > 0) - (value < 0)
    return Answer("compare", value=sign * max(1, min(STRONGEST, round(abs(value)))) if sign else 0)


def name_of(value: Any, default: str) -> str:
    """An annotator's name that the store takes."""
    name = str(value).strip()[:MAX_NAME] if value is not None else ""
    return name or default


def get(fields: Mapping[str, Any], key: str, kind: type, at: str = "") -> Any:
    """The value at `key`.

    Raises:
        FieldError: it is not there, or of another type.
    """
    value = fields.get(key)
    name = f"{at}.{key}" if at else key
    if value is None:
        raise FieldError(name, "is missing", fix=f"add {name!r} or remove the row")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise FieldError(name, f"is {type(value).__name__}, not {kind.__name__}", fix="correct it, or remove the row")
    return value


def objects(value: Any, key: str) -> list[dict[str, Any]]:
    """A list of objects; none where there is nothing.

    Raises:
        FieldError: it is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise FieldError(key, "is not a list of objects", fix="export the file again, or remove the row")
    return value


# --- preferences and rankings ---------------------------------------------------------------------------------


def _from_ranking(name: str) -> Parser:
    def parse(fields: Fields) -> Imported:
        ranking = RANKINGS[name](fields)
        meta = ranking.meta if name == "ranking" else scalar_meta(fields)
        policies = meta.get("policies")
        if not isinstance(policies, list):
            policies = [meta.get("chosen_policy", ""), meta.get("rejected_policy", "")]
        item = item_of(ranking.prompt, _candidates(ranking, policies))
        item.prompt_id = str(ranking.prompt_id or meta.get("prompt_id") or item.prompt_id)[:MAX_NAME]
        item.meta = {key: meta[key] for key in ("sampling",) if meta.get(key)}
        return Imported(item, [_label_of(ranking, meta, fields, name)])

    return parse


def _candidates(ranking: Ranking, policies: Sequence[Any]) -> list[Candidate]:
    policies = policies if len(policies) == len(ranking.responses) else [""] * len(ranking.responses)
    tokens = ranking.tokens or [None] * len(ranking.responses)
    return [Candidate(*row) for row in zip(ranking.responses, map(str, policies), tokens, strict=True)]


def _label_of(ranking: Ranking, meta: Mapping[str, Any], fields: Fields, name: str) -> Said:
    """Our own files say who labeled; of others, people are taken to have done so."""
    known: dict[str, Labeler] = {label: labeler for labeler, label in LABELERS.items()}
    labeler = known.get(str(meta.get("labels")), "person")
    if (scores := _binarised_scores(fields)) is not None:
        return Said(f"{RATED}imported", "judge", answer_of_ranks([-score for score in scores]))
    rated = RATED if meta.get("label_source") == "ratings" else ""
    annotator = rated + name_of(fields.get("annotator") or meta.get("annotator"), f"{NAMELESS}{name}")[: MAX_NAME - 11]
    # A tie is a pair of probability 1/2, though one of the two is called chosen.
    ranks = [1, 1] if ranking.wins == [[0.5, 0.5], [0.5, 0.5]] else ranking.ranks
    soft = any(p not in (0.0, 0.5, 1.0) for row in ranking.wins or [] for p in row)
    if len(ranks) == 2 and ranking.margin:
        return Said(annotator, labeler, answer_of_strength(ranking.margin * (ranks[0] - ranks[1])), soft)
    return Said(annotator, labeler, answer_of_ranks(ranks), soft)


def _binarised_scores(fields: Fields) -> list[float] | None:
    """UltraFeedback as chosen and rejected, by the score of each (HuggingFaceH4's and argilla's columns)."""
    for chosen, rejected in (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")):
        if fields.get(chosen) is not None and fields.get(rejected) is not None:
            return [number_of(fields[chosen], chosen), number_of(fields[rejected], rejected)]
    return None


def number_of(value: Any, key: str) -> float:
    """A number, or the text of one.

    Raises:
        FieldError: it is something else, or not finite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise FieldError(key, f"is {value!r:.60}, not a number", fix="correct it, or remove the row")
    return number


# --- data sets ------------------------------------------------------------------------------------------------


def _tldr(fields: Fields) -> Imported:
    """The prompt as in Stiennon et al. 2020, appendix B.2; of news, the article."""
    info, summaries = get(fields, "info", dict), objects(get(fields, "summaries", list), "summaries")
    if info.get("post") is not None:
        subreddit, title = info.get("subreddit") or "", info.get("title") or ""
        post = get(info, "post", str, "info")
        prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    else:
        prompt = f"Article: {get(info, 'article', str, 'info')}\n\nTL;DR:"
    if len(summaries) != 2:
        raise FieldError("summaries", "is not a list of two summaries", fix="give the comparisons, not the ratings")
    responses = [
        Candidate(get(summary, "text", str, f"summaries[{i}]").strip(), name_of(summary.get("policy"), ""))
        for i, summary in enumerate(summaries)
    ]
    choice = get(fields, "choice", int)
    if choice not in (0, 1):
        raise FieldError("choice", f"is {choice}", fix="give 0 or 1, the index of the better summary")
    item = item_of(prompt, responses)
    item.batch = str(fields.get("batch") or "")[:MAX_NAME]
    answer = answer_of_ranks([choice, 1 - choice])
    return Imported(item, [Said(name_of(fields.get("worker"), f"{NAMELESS}tldr"), "person", answer)])


def _ultrafeedback(fields: Fields) -> Imported:
    responses, scores = [], []
    for i, completion in enumerate(objects(get(fields, "completions", list), "completions")):
        at = f"completions[{i}]"
        responses.append(Candidate(get(completion, "response", str, at), name_of(completion.get("model"), "")))
        score = completion.get("overall_score", completion.get("score"))
        scores.append(number_of(score, f"{at}.overall_score"))
    item = item_of(get(fields, "instruction", str), responses)
    answer = answer_of_ranks([-score for score in scores])
    return Imported(item, [Said(f"{RATED}{name_of(fields.get('annotator'), 'gpt-4')}", "judge", answer)])


PARSERS: dict[str, Parser] = {
    **{name: _from_ranking(name) for name in RANKINGS},
    "tldr": _tldr,
    "ultrafeedback": _ultrafeedback,
}
