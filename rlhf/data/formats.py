"""What one row may look like, and how to read a prompt, a demonstration or a ranking out of it.

| format | keys |
|---|---|
| prompt | `prompt` |
| prompt_completion | `prompt`, `completion` |
| messages | `messages`; the last turn, the assistant's, is the completion |
| text | `text`, all of it completion; the prompt is "" (TRL: language modelling) |
| preference | `chosen`, `rejected` and `prompt`; without it both sides start with the prompt (TRL: implicit) |
| hh | `chosen`, `rejected`: one text of "\\n\\nHuman:" and "\\n\\nAssistant:" turns each |
| ranking | the fields of `rlhf.types.Ranking` |
| rating | `prompt`, `response`, `rating`: a number, the higher the better |

Each value is a text (TRL's standard format) or turns (its conversational format). UltraFeedback's mixture,
a text prompt beside turns that repeat it, is read as `preference`. Pure functions.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

from rlhf.data.fields import (
    FieldError,
    Fields,
    encodable,
    is_int,
    is_number,
    prompt_at,
    response_at,
    text_at,
    turns_at,
    value_at,
)
from rlhf.types import Message, Preference, Prompt, Ranking, Rating

_COMPARISON_KEYS = {"chosen", "rejected", "responses", "ranks"}
_CONTENT_KEYS = {"prompt", "completion", "messages", *_COMPARISON_KEYS}
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def detect_format(fields: Fields) -> str:
    """The name of the row's format.

    A row with several kinds of content, as UltraFeedback's with `messages` beside `chosen`, is a preference.

    Raises:
        FieldError: the row has no known keys, or one half of a pair only.
    """
    keys = {key for key, value in fields.items() if value is not None}
    if {"tokens", "action_mask", "logprobs"} <= keys:
        return "rollouts"
    if _whole_pair(keys, "responses", "ranks"):
        return "ranking"
    if _whole_pair(keys, "chosen", "rejected"):
        return "hh" if "prompt" not in keys and _starts_like_hh(fields["chosen"]) else "preference"
    if "messages" in keys:
        return "messages"
    if {"response", "rating"} <= keys:
        return "rating"
    if _whole_pair(keys - {"prompt"} if "completion" not in keys else keys, "completion", "prompt"):
        return "prompt_completion"
    if "prompt" in keys:
        return "prompt"
    if "text" in keys:
        return "text"
    if null := sorted(_CONTENT_KEYS & fields.keys()):  # none of them has a value, or it would be known by now
        raise FieldError(null[0], "is null", fix="fill it in or remove the row")
    found = ", ".join(sorted(map(str, fields))) or "none"
    raise FieldError("prompt", f"is missing, and no other known key is there (found: {found})", fix=_KNOWN_KEYS)


_KNOWN_KEYS = "rename the columns to prompt, completion, messages, text, chosen, rejected, responses or ranks"


def _whole_pair(keys: set[str], one: str, other: str) -> bool:
    """Whether both keys are there.

    Raises:
        FieldError: one of them is there without the other.
    """
    for present, absent in ((one, other), (other, one)):
        if present in keys and absent not in keys:
            raise FieldError(absent, f"is missing beside {present!r}", fix=f"add {absent!r} or remove the row")
    return one in keys


def _starts_like_hh(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


# --- prompts and demonstrations ----------------------------------------------------------------------------


def _completion(fields: Fields) -> tuple[Prompt, str]:
    prompt = prompt_at(value_at(fields, "prompt"))
    return prompt, response_at(value_at(fields, "completion"), "completion", prompt)


def _messages(fields: Fields) -> tuple[Prompt, str]:
    turns = turns_at(value_at(fields, "messages"), "messages")
    last = len(turns) - 1
    if turns[-1]["role"] != "assistant":
        key = f"messages[{last}].role"
        raise FieldError(key, f"is {turns[-1]['role']!r} at the end", fix="end a demonstration with an assistant turn")
    if not last:
        raise FieldError("messages", "has an answer without a question", fix="add the user turn before it")
    return prompt_at(turns[:-1], "messages"), turns[-1]["content"]


def _messages_prompt(fields: Fields) -> Prompt:
    turns = turns_at(value_at(fields, "messages"), "messages")
    return prompt_at(turns, "messages") if turns[-1]["role"] == "user" else _messages(fields)[0]


def _plain_text(fields: Fields) -> tuple[Prompt, str]:
    """No other format yields an empty prompt; `templates.prompt_tokens` knows this one by it."""
    return "", text_at(value_at(fields, "text"), "text")


def _chosen(fields: Fields, pair: Callable[[Fields], Preference]) -> tuple[Prompt, str]:
    preference = pair(fields)
    return preference.prompt, preference.chosen


def _ranking_prompt(fields: Fields) -> Prompt:
    return prompt_at(value_at(fields, "prompt"))


# --- pairs -------------------------------------------------------------------------------------------------


def _preference(fields: Fields) -> Preference:
    chosen, rejected = value_at(fields, "chosen"), value_at(fields, "rejected")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise FieldError("rejected", "is not of the kind of 'chosen'", fix="write both as text, or both as turns")
    prompt = fields.get("prompt")
    # UltraFeedback: a text prompt beside turns that repeat it, perhaps after a system turn. The turns are what
    # was answered, so the prompt is read from them.
    repeated = isinstance(prompt, str) and isinstance(chosen, list) and len(chosen) > 1
    if prompt is None or repeated:
        implicit = _common_turns if isinstance(chosen, list) else _common_words
        prompt, chosen, rejected = implicit(chosen, rejected)
    prompt = prompt_at(prompt)
    return Preference(prompt, response_at(chosen, "chosen", prompt), response_at(rejected, "rejected", prompt))


def _common_turns(chosen: list[Any], rejected: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """The turns both sides start with; the last turn of a side is always its answer."""
    chosen, rejected = list(turns_at(chosen, "chosen")), list(turns_at(rejected, "rejected"))
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    if not same:
        raise FieldError("prompt", "is missing, and the two sides share no turn", fix="add 'prompt'")
    return chosen[:same], chosen[same:], rejected[same:]


def _common_words(chosen: Any, rejected: Any) -> tuple[str, str, str]:
    """The words both texts start with. The answers keep their leading white space."""
    chosen, rejected = text_at(chosen, "chosen"), text_at(rejected, "rejected")
    _differ(chosen, rejected)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    # A word that only begins alike ("green", "grey") belongs to the answers, and so does the space before it.
    while same and not (chosen[same : same + 1].isspace() and rejected[same : same + 1].isspace()):
        same -= 1
    prompt = chosen[:same].rstrip()
    if not prompt:
        raise FieldError("prompt", "is missing, and the two sides share no first word", fix="add 'prompt'")
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def _hh(fields: Fields) -> Preference:
    prompt, chosen = _hh_side(fields, "chosen")
    other_prompt, rejected = _hh_side(fields, "rejected")
    if prompt != other_prompt:
        fix = "make the two sides equal up to the last Human turn, or remove the row"
        raise FieldError("rejected", "does not answer the same dialogue as 'chosen'", fix=fix)
    return Preference(prompt, chosen, rejected)


def _hh_side(fields: Fields, key: str) -> tuple[list[Message], str]:
    """The turns up to the last Human turn, and the answer. Turns of one speaker in a row become one turn."""
    text = text_at(value_at(fields, key), key)
    if not _starts_like_hh(text):
        fix = "set format: preference if it is no HH dialogue"
        raise FieldError(key, "does not start with '\\n\\nHuman:'", fix=fix)
    turns: list[Message] = []
    speakers = _HH_TURN.split(text)[1:]
    for speaker, said in zip(speakers[::2], speakers[1::2], strict=True):
        role, content = _HH_ROLES[speaker], said.strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content}".strip()
        else:
            turns.append({"role": role, "content": content})
    if turns[-1]["role"] != "assistant":
        raise FieldError(key, "ends with a Human turn", fix="end it with the Assistant's answer or remove the row")
    turns = turns_at(turns, key)
    return turns[:-1], turns[-1]["content"]


def _differ(chosen: str, rejected: str) -> None:
    if chosen == rejected:
        raise FieldError("rejected", "equals 'chosen'", fix="remove the row: equal sides teach nothing")


# --- rankings ----------------------------------------------------------------------------------------------


def _pair_ranking(fields: Fields, pair: Callable[[Fields], Preference]) -> Ranking:
    """K = 2: chosen first. A `probability` becomes the matrix of wins; a `margin` stays."""
    preference = pair(fields)
    _differ(preference.chosen, preference.rejected)
    wins = None
    if fields.get("probability") is not None:
        p = _probability(fields["probability"])
        wins = [[0.5, p], [1 - p, 0.5]]
    responses = [preference.chosen, preference.rejected]
    return Ranking(preference.prompt, responses, ranks=[1, 2], wins=wins, margin=_margin(fields))


def _probability(value: Any) -> float:
    if not is_number(value) or not 0 <= value <= 1:
        raise FieldError("probability", f"is {value!r}, not a number from 0 to 1", fix="correct or remove it")
    if value < 0.5:
        raise FieldError("probability", f"is {value}: rejected wins", fix="swap chosen and rejected, write 1 - p")
    return float(value)


def _margin(fields: Fields) -> float | None:
    """The lead asked of the better side. A negative one would ask the worse side to win."""
    value = fields.get("margin")
    if value is None:
        return None
    if not is_number(value) or value < 0:
        fix = "write by how much the better side's score shall lead, or rename the column if it means something else"
        raise FieldError("margin", f"is {value!r:.60}, not a number of 0 or more", fix=fix)
    return float(value)


def _ranking(fields: Fields) -> Ranking:
    """A row that `write_rankings` wrote, or one like it. A sampled response may be empty."""
    responses = value_at(fields, "responses")
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(r, str) for r in responses):
        raise FieldError("responses", "is not a list of two or more strings", fix="rank at least two responses")
    k = len(responses)
    ranks = _k_items(fields, "ranks", k, is_int)
    if ranks is None or min(ranks) != 1:
        raise FieldError("ranks", f"is {ranks}: the best rank is not 1", fix="count ranks from 1, the best")
    responses = [encodable(response, f"responses[{i}]") for i, response in enumerate(responses)]
    tokens = _k_items(fields, "tokens", k, lambda row: isinstance(row, list) and all(is_int(t) and t >= 0 for t in row))
    _empty_ones_tie(responses, tokens, ranks)
    meta = fields.get("meta") or {}
    if not isinstance(meta, Mapping):
        raise FieldError("meta", f"is {type(meta).__name__}, not an object", fix="write {} or remove it")
    return Ranking(
        prompt=_ranking_prompt(fields),
        responses=responses,
        ranks=ranks,
        wins=_wins(fields, k),
        tokens=tokens,
        gold_scores=_k_items(fields, "gold_scores", k, is_number),
        prompt_id=str(fields.get("prompt_id") or ""),
        meta=dict(meta),
        margin=_margin(fields),
    )


def _empty_ones_tie(responses: list[str], tokens: list[list[int]] | None, ranks: list[int]) -> None:
    """One empty response may be ranked. Of two, with tokens that are equal or not known, none is the better."""
    first: dict[Any, int] = {}
    for i, response in enumerate(responses):
        j = first.setdefault(tokens and tuple(tokens[i]), i) if not response.strip() else i
        if ranks[i] != ranks[j]:
            problem = f"equals responses[{j}], which has another rank"
            raise FieldError(f"responses[{i}]", problem, fix="give both one rank, or leave one out")


def _k_items(fields: Fields, key: str, k: int, valid: Callable[[Any], bool]) -> list[Any] | None:
    """The list at `key` when it has one valid item per response; None when there is none."""
    value = fields.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != k:
        size = f"{len(value)} items" if isinstance(value, list) else type(value).__name__
        raise FieldError(key, f"is {size} for {k} responses", fix=f"give {key!r} one item per response")
    for i, item in enumerate(value):
        if not valid(item):
            raise FieldError(f"{key}[{i}]", f"is {item!r:.60}", fix=f"correct it, or leave {key!r} out")
    return value


def _wins(fields: Fields, k: int) -> list[list[float]] | None:
    """A K x K matrix of probabilities with wins[i][j] + wins[j][i] = 1."""
    wins = _k_items(fields, "wins", k, lambda row: isinstance(row, list) and len(row) == k and all(map(is_number, row)))
    if wins is None:
        return None
    for i, j in itertools.product(range(k), repeat=2):
        here, there = wins[i][j], wins[j][i]
        if not 0 <= here <= 1 or abs(here + there - 1) > 1e-6:
            problem = f"is {here} beside wins[{j}][{i}] {there}: not a probability and its complement"
            raise FieldError(f"wins[{i}][{j}]", problem, fix="make the two add up to 1, with 0.5 on the diagonal")
    return wins


# --- ratings -----------------------------------------------------------------------------------------------


def _rating(fields: Fields) -> Rating:
    prompt = prompt_at(value_at(fields, "prompt"))
    rating = value_at(fields, "rating")
    if not is_number(rating):
        raise FieldError("rating", f"is {rating!r:.60}, not a number", fix="correct it or remove the row")
    return Rating(prompt, response_at(value_at(fields, "response"), "response", prompt), float(rating))


def labels_of(fields: Fields) -> str:
    """What a row says about answers: "comparisons", "ratings" or ""."""
    keys = {key for key, value in fields.items() if value is not None}
    if keys & _COMPARISON_KEYS:
        return "comparisons"
    return "ratings" if {"response", "rating"} <= keys else ""


# --- one line per format -----------------------------------------------------------------------------------

PROMPTS: dict[str, Callable[[Fields], Prompt]] = {
    "prompt": _ranking_prompt,
    "prompt_completion": lambda fields: _completion(fields)[0],
    "messages": _messages_prompt,
    "preference": lambda fields: _preference(fields).prompt,
    "hh": lambda fields: _hh(fields).prompt,
    "ranking": _ranking_prompt,
    "rating": _ranking_prompt,
}
DEMONSTRATIONS: dict[str, Callable[[Fields], tuple[Prompt, str]]] = {
    "prompt_completion": _completion,
    "messages": _messages,
    "text": _plain_text,
    "preference": lambda fields: _chosen(fields, _preference),
    "hh": lambda fields: _chosen(fields, _hh),
}
RANKINGS: dict[str, Callable[[Fields], Ranking]] = {
    "preference": lambda fields: _pair_ranking(fields, _preference),
    "hh": lambda fields: _pair_ranking(fields, _hh),
    "ranking": _ranking,
}
RATINGS: dict[str, Callable[[Fields], Rating]] = {"rating": _rating}


def scalar_meta(fields: Fields) -> dict[str, Any]:
    """The row's other columns that hold a single value."""
    kept = {key: value for key, value in fields.items() if key not in _CONTENT_KEYS}
    return {key: value for key, value in kept.items() if isinstance(value, str | int | float | bool)}
