"""Grades by the formula with letters and words counted by hand; what is no answer gets the worst grade."""

import socket

import pytest

from rlhf.rollout.scorers import (
    SCORERS,
    WORST_GRADE,
    coleman_liau_grade,
    count_words,
    grade_answer,
    readability,
)
from rlhf.types import Rollout, StopReason

# 10 words, 29 letters, 2 sentences
EASY = "The sun is a big star. It keeps us warm."
# 7 words, 69 letters, 1 sentence
HARD = "Photosynthesis transforms electromagnetic radiation into biochemical energy."


def rollout(text: str, stop: StopReason = StopReason.EOS) -> Rollout:
    return Rollout(prompt="p", response=text, tokens=[1], action_mask=[True], logprobs=[0.0], stop=stop)


def test_grade_follows_the_formula() -> None:
    text = "Plants turn bright sunlight into sugar."  # 6 words, 33 letters, 1 sentence
    assert coleman_liau_grade(text) == pytest.approx(0.058 * 3300 / 6 - 0.296 * 100 / 6 - 15.8, abs=1e-9)


def test_grade_is_clipped_to_school_years() -> None:
    assert coleman_liau_grade(EASY) == 0.0  # 16.8 - 5.9 - 15.8 = -4.9
    assert coleman_liau_grade(HARD) == WORST_GRADE  # 57.2 - 4.2 - 15.8 = 37.1


@pytest.mark.parametrize(
    "text",
    ["", " ", "\n\n", "😀😀 🎉 🎉 🎉 🎉", "... !!! ???", "- - - - - -", "1 2 3 4 5 6", "\u200b" * 9],
)
def test_text_without_a_word_gets_the_worst_grade_and_not_textstats_zero(text: str) -> None:
    assert coleman_liau_grade(text) == WORST_GRADE
    assert grade_answer(text, finished=True) == WORST_GRADE


@pytest.mark.parametrize(
    "text",
    [
        "no sentence end at all\nand a second line without one",
        "one 😀 two 🎉 three four five six",
        "x" * 5000,
        "a. b. c. d. e. f.",
        "The sky looks blue today" * 2000,
        "\x00 null \ud7ff bytes in a text with words",
        "Ein Wörterbuch erklärt schwierige Wörter ganz einfach.",
    ],
)
def test_degenerate_texts_get_a_grade_within_the_clip(text: str) -> None:
    assert 0.0 <= coleman_liau_grade(text) <= WORST_GRADE


def test_grading_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a grade must not need the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert coleman_liau_grade("A text that no cache has seen before, graded offline.") >= 0.0


@pytest.mark.parametrize(
    ("text", "words"), [("", 0), ("one two", 2), ("don't stop\nnow", 3), ("a - b 7 c3", 3), ("😀 hi", 1)]
)
def test_words_are_those_that_hold_a_letter(text: str, words: int) -> None:
    assert count_words(text) == words


def test_unfinished_answer_gets_the_worst_grade() -> None:
    assert grade_answer(EASY, finished=True) == 0.0
    assert grade_answer(EASY, finished=False) == WORST_GRADE


def test_five_words_are_an_answer_and_four_are_none() -> None:
    assert grade_answer("It is a hot star.", finished=True) == 0.0
    assert grade_answer("It is a star.", finished=True) == WORST_GRADE


def test_readability_is_minus_the_grade_per_rollout_in_order() -> None:
    rollouts = [rollout(EASY), rollout(HARD), rollout(EASY, StopReason.LENGTH)]
    assert readability(rollouts) == [0.0, -WORST_GRADE, -WORST_GRADE]
    assert SCORERS["readability"] is readability
