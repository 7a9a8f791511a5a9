"""What a judge's stored judgments on a pair say together: the soft label that `judge.soft_label` made."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence

from reward_model.labeling.records import Judgment


def judge_probability(judgment: Judgment) -> float | None:
    """P(response 1 is better), canonical, by one judgment of a judge on a pair; None of any other."""
    if judgment.labeler != "judge" or judgment.answer.choice != "compare":
        return None
    try:
        p_first = float(json.loads(judgment.answer.notes)["p_first"])
    except (ValueError, TypeError, KeyError):
        return None
    return 1 - p_first if judgment.order == [0, 1] else p_first


def soft_share(judgments: Sequence[Judgment]) -> float | None:
    """P(response 1 is better) by all judges of a pair, each with one voice; None where one states no probability.

    A judge's voice is the mean over the orders in which it was asked; orders that contradict each other make it 1/2.
    """
    voices: dict[str, list[float]] = defaultdict(list)
    for judgment in judgments:
        p = judge_probability(judgment)
        if p is None:
            return None
        voices[judgment.annotator].append(p)
    if not voices:
        return None
    said = [0.5 if min(own) < 0.5 < max(own) else sum(own) / len(own) for own in voices.values()]
    return sum(said) / len(said)
