"""The values of one row: texts, turns, prompts, answers and numbers, each checked; errors name the key at fault."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rlhf.errors import DataError
from rlhf.types import Message, Prompt

Fields = Mapping[str, Any]

ROLES = ("system", "user", "assistant")
_FOREIGN_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


class FieldError(DataError):
    """One value of one row is not what its format asks for.

    Args:
        key: the key at fault, with its path: `messages[2].role`.
        problem: continues "key 'x' ".
        fix: what to write instead.
    """

    def __init__(self, key: str, problem: str, *, fix: str) -> None:
        super().__init__(f"key {key!r} {problem}", fix=fix)
        self.key = key


def as_chat(prompt: Prompt) -> list[Message]:
    """A plain text as a user turn; turns stay."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def value_at(fields: Fields, key: str) -> Any:
    if fields.get(key) is None:
        raise FieldError(key, "is missing", fix=f"add {key!r} or remove the row")
    return fields[key]


def text_at(value: Any, key: str) -> str:
    """`value`, when it is a text with something in it.

    Raises:
        FieldError: it is not a text, blank, or holds half of a character.
    """
    if not isinstance(value, str):
        raise FieldError(key, f"is {type(value).__name__}, not a string", fix="write it as text in quotes")
    if not value.strip():
        raise FieldError(key, "is empty", fix="fill it in or remove the row")
    return encodable(value, key)


def encodable(value: str, key: str) -> str:
    """JSON can spell half of a UTF-16 pair, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"has the lone surrogate {value[error.start]!r} at character {error.start + 1}"
        raise FieldError(key, problem, fix="remove that half of a character, or the row") from None
    return value


def turns_at(value: Any, key: str) -> list[Message]:
    """Checked turns, reduced to role and content.

    Raises:
        FieldError: not a list of turns, a wrong role, a blank content, or a system turn after the first.
    """
    if not isinstance(value, list) or not value:
        problem = "is an empty list" if value == [] else f"is {type(value).__name__}, not a list of turns"
        raise FieldError(key, problem, fix='write [{"role": "user", "content": "..."}]')
    turns: list[Message] = []
    for i, turn in enumerate(value):
        at = f"{key}[{i}]"
        if not isinstance(turn, Mapping):
            raise FieldError(at, f"is {type(turn).__name__}, not a turn", fix='write {"role": ..., "content": ...}')
        role = _get_in(turn, "role", at)
        if role not in ROLES:
            near = _FOREIGN_ROLES.get(role) if isinstance(role, str) else None
            fix = f"write {near!r}" if near else f"use one of {', '.join(ROLES)}"
            raise FieldError(f"{at}.role", f"is {role!r}, an unknown role", fix=fix)
        if role == "system" and i:
            raise FieldError(f"{at}.role", "is 'system' after the first turn", fix="put the system turn first")
        turns.append({"role": role, "content": text_at(_get_in(turn, "content", at), f"{at}.content")})
    return turns


def _get_in(turn: Mapping[str, Any], key: str, at: str) -> Any:
    if key not in turn:
        raise FieldError(f"{at}.{key}", "is missing", fix=f"give every turn a {key!r}")
    return turn[key]


def prompt_at(value: Any, key: str = "prompt") -> Prompt:
    if not isinstance(value, list):
        return text_at(value, key)
    turns = turns_at(value, key)
    if turns[-1]["role"] != "user":
        last = f"{key}[{len(turns) - 1}].role"
        raise FieldError(last, f"is {turns[-1]['role']!r} at the end", fix="end a prompt with a user turn")
    return turns


def response_at(value: Any, key: str, prompt: Prompt) -> str:
    """The one answer in `value`: a text, or an assistant turn, perhaps after a repetition of the prompt's turns."""
    if not isinstance(value, list):
        return text_at(value, key)
    turns = turns_at(value, key)
    asked = as_chat(prompt)
    if turns[: len(asked)] == asked:
        turns = turns[len(asked) :]
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        roles = ", ".join(turn["role"] for turn in turns) or "nothing"
        raise FieldError(
            key,
            f"has {roles} after the prompt, not one assistant turn",
            fix="move all turns but the last into the prompt, the same for both sides of a pair",
        )
    return turns[0]["content"]


def is_number(value: Any) -> bool:
    """A finite one; NaN is below nothing."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
