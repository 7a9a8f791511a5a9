"""Programmatic scorers: rewards whose truth is known, for simulated labels, experiments and evaluation.

A scorer is a `RewardFn`: rollouts in, one score per rollout out, the higher the better. A new one is a
function and a line in `SCORERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlhf.types import Rollout

WORST_GRADE = 25.0
"""School years. The upper clip of the grade, and the grade of an answer that is no answer."""

MIN_WORDS = 5
"""Fewer words are no explanation, and the grade of so short a text means nothing (one short word: -40)."""


def count_words(text: str) -> int:
    """Whitespace-separated words that hold a letter; `- - -`, `1 2 3` and emojis are none."""
    return sum(any(char.isalpha() for char in word) for word in text.split())


def coleman_liau_grade(text: str) -> float:
    """The US school grade needed to read `text`, clipped to [0, 25].

        grade = 0.058 L - 0.296 S - 15.8,   L letters and S sentences per 100 words

    textstat says 0, its easiest grade, of a text without words; here that is the worst, or silence would win.
    textstat cuts the published coefficient 0.0588 to 0.058: grades lie about 0.4 below the paper's.

    Returns:
        School years; `WORST_GRADE` for a text without a letter.

    Source: Coleman & Liau 1975, A computer readability formula designed for machine scoring.
    """
    from textstat.textstat import textstat  # here, as it costs a second and only this scorer needs it

    if count_words(text) == 0:
        return WORST_GRADE
    return min(max(float(textstat.coleman_liau_index(text)), 0.0), WORST_GRADE)


def grade_answer(text: str, *, finished: bool) -> float:
    """The grade of an answer in [0, 25]: `WORST_GRADE` when it has no end or fewer than `MIN_WORDS` words.

    Without this rule the lowest grades would go to fragments and to texts that never stop.

    Args:
        text: the response, decoded.
        finished: the policy ended it itself (EOS), rather than the length limit.
    """
    if not finished or count_words(text) < MIN_WORDS:
        return WORST_GRADE
    return coleman_liau_grade(text)


def readability(rollouts: Sequence[Rollout]) -> list[float]:
    """Minus the grade of each answer, in school years: 0 the best, -25 the worst.

    It measures word and sentence length only, not sense: short repeated words reach 0. A policy trained on it
    for long will find that out; the evaluation's other metrics are there to show it.
    """
    return [-grade_answer(rollout.response, finished=rollout.stop.finished) for rollout in rollouts]


SCORERS: dict[str, Callable[[Sequence[Rollout]], list[float]]] = {"readability": readability}


def write_gold_scores(rollouts: Sequence[Rollout], scorer: str | None) -> None:
    """What PPO is watched by but does not learn from; None: nothing."""
    if scorer is not None:
        for rollout, gold in zip(rollouts, SCORERS[scorer](rollouts), strict=True):
            rollout.gold_score = gold
