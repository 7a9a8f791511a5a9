"""Simulated annotators around a gold score, for demonstrations and for experiments whose truth is known.

Sides are counterbalanced, as for people: a left bias adds noise to a label, not a preference for a response.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from rlhf.config_schema import AnnotatorConfig
from rlhf.errors import ConfigError, DataError


@dataclass(frozen=True)
class Judgment:
    """One choice between two responses to prompt `item`; `left` and `right` are their indices, as shown."""

    item: int
    left: int
    right: int
    annotator: str
    choice: Literal["left", "right"]


def left_probability(gold_left: float, gold_right: float, annotator: AnnotatorConfig) -> float:
    """The probability that `annotator` chooses the response on the left.

        P(left) = (1 - careless) sigmoid((gold_left - gold_right) / noise + left_bias) + careless / 2

    Scores and `noise` share one unit; `left_bias` is in logits.
    Source: Bradley & Terry 1952, with an order effect as in Davidson & Beaver 1977.
    """
    logit = (gold_left - gold_right) / annotator.noise + annotator.left_bias
    # sigmoid by tanh: exp would overflow for a precise annotator and a wide gap.
    attentive = 0.5 * (1.0 + math.tanh(0.5 * logit))
    return (1.0 - annotator.careless) * attentive + 0.5 * annotator.careless


def judge_pairs(
    gold_scores_BK: Sequence[Sequence[float]], annotators: Sequence[AnnotatorConfig], seed: int
) -> list[Judgment]:
    """Every annotator judges every pair of every prompt's responses once.

    Which response stands left is counterbalanced, over an annotator's pairs and over a pair's annotators. An
    annotator's judgments of a prompt depend on `seed`, the prompt's index and scores, and on the annotator's
    name and place in the list; not on how many prompts there are or which annotators come after.

    Args:
        gold_scores_BK: one row per prompt, one score per response; rows may differ in length.
        annotators: their names must differ.
        seed: of everything random here.

    Returns:
        By prompt, then annotator, then pair (i < j in lexicographic order).

    Raises:
        ConfigError: two annotators share a name.
        DataError: a score is not finite.
    """
    names = [annotator.name for annotator in annotators]
    if len(set(names)) < len(names):
        raise ConfigError(f"annotators share a name: {names}", fix="give every annotator a name of its own")
    judgments: list[Judgment] = []
    for item, scores_K in enumerate(gold_scores_BK):
        if not all(map(math.isfinite, scores_K)):
            raise DataError(f"gold scores of prompt {item}: {[*scores_K]} not finite", fix="mend the scorer")
        pairs = list(combinations(range(len(scores_K)), 2))
        flips = _balanced_flips(len(pairs), random.Random(f"sides/{seed}/{item}"))
        for turn, annotator in enumerate(annotators):
            # A generator per annotator and prompt: no one's choices move when others are added.
            rng = random.Random(f"choice/{seed}/{item}/{annotator.name}")
            for (i, j), flip in zip(pairs, flips, strict=True):
                left, right = (j, i) if (flip + turn) % 2 else (i, j)
                p_left = left_probability(scores_K[left], scores_K[right], annotator)
                choice: Literal["left", "right"] = "left" if rng.random() < p_left else "right"
                judgments.append(Judgment(item, left, right, annotator.name, choice))
    return judgments


def _balanced_flips(n: int, rng: random.Random) -> list[int]:
    """`n` zeros and ones in random order, as many of each as can be; the odd one out is drawn too.

    Annotators in turn take the flips and their opposite, so that a pair is shown both ways round and each
    annotator sees the lower index on either side equally often.
    """
    first = int(rng.random() < 0.5)
    flips = [(first + k) % 2 for k in range(n)]
    # Sorting by random() and not shuffle(): Python promises that random() alone stays the same over versions.
    return [flip for _, flip in sorted((rng.random(), flip) for flip in flips)]
