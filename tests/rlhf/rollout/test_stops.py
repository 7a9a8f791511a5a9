"""Stop strings in growing text."""

from __future__ import annotations

import pytest

from rlhf.rollout.stops import StopStrings, before_stop


def text_of(tokens: list[int]) -> str:
    """UTF-8 bytes; negative tokens have no text. Like byte-level tokenizers: half a character is a replacement."""
    return bytes(t for t in tokens if t >= 0).decode("utf-8", errors="replace")


@pytest.mark.parametrize("string", ["\n\n", "END", "ü.", "x"])
def test_found_exactly_when_the_last_byte_is_there(string: str) -> None:
    stops = StopStrings([string, "never there"], text_of)
    tokens = [*f"some words and more {string}".encode()]
    assert stops.ended(tokens)
    assert not any(stops.ended(tokens[:n]) for n in range(len(tokens)))


def test_tokens_without_text_do_not_hide_it() -> None:
    tokens = [*b"answer: E", *[-1] * 50, *b"N", -1, -1, *b"D"]
    assert StopStrings(["END"], text_of).ended(tokens)
    assert not StopStrings(["END"], text_of).ended(tokens[:-1])


def test_only_the_end_is_decoded() -> None:
    seen: list[int] = []

    def decode(tokens: list[int]) -> str:
        seen.append(len(tokens))
        return text_of(tokens)

    StopStrings(["END"], decode).ended([97] * 1000)
    assert max(seen) < 20


def test_without_strings_nothing_is_decoded() -> None:
    assert not StopStrings([], lambda tokens: 1 / 0).ended([1, 2])


def test_the_text_before_the_first_of_them() -> None:
    assert before_stop("a b\n\nc END", ["END", "\n\n"]) == "a b"
    assert before_stop("a b", ["END"]) == "a b"
