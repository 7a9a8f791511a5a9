"""Several annotators' judgments of one item as one: the probability that each response beats each other one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Literal

from reward_model.labeling.agreement import DawidSkene, dawid_skene, wins_matrix
from reward_model.labeling.judge_votes import soft_wins
from reward_model.labeling.records import Item, Judgment
from reward_model.labeling.simulate import Judgment as Vote

Wins = list[list[float]]


def by_item(judgments: Iterable[Judgment]) -> dict[str, list[Judgment]]:
    """Judgments by the key of their item, in the given order."""
    grouped: dict[str, list[Judgment]] = defaultdict(list)
    for judgment in judgments:
        grouped[judgment.item_key].append(judgment)
    return dict(grouped)


def aggregate(
    items: Mapping[str, Item], judgments: Sequence[Judgment], method: Literal["majority", "dawid_skene"]
) -> dict[str, Wins]:
    """`wins[i][j]` by item: the probability that response i beats response j.

    `majority` is the share of the annotators who say so, a tie counts half; judges say so with a probability.
    `dawid_skene` weighs them by how reliable they turn out to be; it knows no ties, so a tie says nothing,
    and a pair with ties only stays at 1/2.

    Args:
        judgments: those that decide; of items in `items`.
    """
    if method == "majority":
        return {key: shares(own) for key, own in by_item(judgments).items()}
    fit = fit_dawid_skene(judgments)
    posteriors: dict[str, dict[tuple[int, int], float]] = {key: {} for key in by_item(judgments)}
    keys = list(posteriors)
    for (item, i, j), p in fit.posteriors.items() if fit else ():
        posteriors[keys[item]][i, j] = p
    return {key: wins_matrix(own, len(items[key].responses)) for key, own in posteriors.items()}


def fit_dawid_skene(judgments: Sequence[Judgment]) -> DawidSkene | None:
    """Our model of annotators with a side bias on all untied comparisons; None where there are none."""
    votes = votes_of(judgments)
    return dawid_skene(votes) if votes else None


def votes_of(judgments: Sequence[Judgment]) -> list[Vote]:
    """Every untied comparison of two responses, as it was shown; items are numbered in order of appearance."""
    number = {key: n for n, key in enumerate(by_item(judgments))}
    votes = []
    for judgment in judgments:
        ranks = judgment.ranks
        if ranks is None:
            continue
        for left, right in combinations(judgment.order, 2):
            if ranks[left] != ranks[right]:
                choice: Literal["left", "right"] = "left" if ranks[left] < ranks[right] else "right"
                votes.append(Vote(number[judgment.item_key], left, right, judgment.annotator, choice))
    return votes


def shares(judgments: Sequence[Judgment]) -> Wins:
    """`aggregate` by majority of one item's judgments, at least one."""
    if (soft := soft_wins(judgments)) is not None:
        return wins_matrix(soft, len(judgments[0].order))
    rankings = [ranks for judgment in judgments if (ranks := judgment.ranks)]
    K, n = len(rankings[0]), len(rankings)

    def beats(i: int, j: int) -> float:
        return sum(1.0 if ranks[i] < ranks[j] else 0.5 if ranks[i] == ranks[j] else 0.0 for ranks in rankings) / n

    return wins_matrix({(i, j): beats(i, j) for i, j in combinations(range(K), 2)}, K)
