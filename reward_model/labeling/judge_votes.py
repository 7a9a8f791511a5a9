"""What a judge's stored judgments say together: the soft label of every pair that `judge.soft_label` made.

A judgment by a judge holds its probabilities in its notes, as JSON: `p_first` of a pair is P(the response in the first
place is better); of a ranking a list, P(the one in the earlier place is better) of every two places in the order of
`itertools.combinations`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

from reward_model.labeling.records import Judgment

Wins = dict[tuple[int, int], float]
"""P(response i is better than j) by (i, j), i < j, canonical."""


def judge_wins(judgment: Judgment) -> Wins | None:
    """What one judgment of a judge says of every pair; None of any other, and where it states no probabilities."""
    if judgment.labeler != "judge" or judgment.answer.choice not in ("compare", "rank"):
        return None
    try:
        stated = json.loads(judgment.answer.notes)["p_first"]
        p_first = [float(p) for p in (stated if isinstance(stated, list) else [stated])]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    places = [*combinations(judgment.order, 2)]
    if len(p_first) != len(places) or not all(0 <= p <= 1 for p in p_first):
        return None
    return {(min(i, j), max(i, j)): p if i < j else 1 - p for (i, j), p in zip(places, p_first, strict=True)}


def soft_wins(judgments: Sequence[Judgment]) -> Wins | None:
    """What all judges of an item say, each with one voice per pair; None where one states no probabilities.

    A judge's voice is the mean over the orders in which it was asked; orders that contradict each other make it 1/2.
    """
    voices: dict[str, list[Wins]] = defaultdict(list)
    for judgment in judgments:
        wins = judge_wins(judgment)
        if wins is None:
            return None
        voices[judgment.annotator].append(wins)
    if not voices:
        return None
    found = {}
    for pair in next(iter(voices.values()))[0]:
        said = [_one_voice([wins[pair] for wins in own]) for own in voices.values()]
        found[pair] = sum(said) / len(said)
    return found


def _one_voice(orders: Sequence[float]) -> float:
    return 0.5 if min(orders) < 0.5 < max(orders) else sum(orders) / len(orders)
