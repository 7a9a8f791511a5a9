"""What several annotators' judgments say together, and how far each annotator can be trusted.

Two orientations, never mixed:
    canonical  of a pair (item, i, j) with i < j: "is response i the better one?"; aggregates speak in it
    shown      left or right on the screen, which differs between annotators; bias and confusion speak in it

A posterior is P(response i is better). Letters: N judgments, P pairs, A annotators.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from reward_model.labeling.simulate import Judgment
from rlhf.errors import DataError

Pair = tuple[int, int, int]
"""Prompt index and two response indices, the lower first."""

PRIOR_COUNTS = ((2.0, 1.0), (1.0, 2.0))
"""Judgments every annotator is taken to have given beforehand, by side of the better response and choice."""

TIE = 1e-9
"""Sums of wins, or a posterior and 1/2, that differ by less are ties: floats differ in the last digits."""


@dataclass(frozen=True)
class DawidSkene:
    """The fit of `dawid_skene`.

    `confusions[name][t][y]` = P(choice = y | the better response stands on side t), with 0 left and 1 right:
    rows sum to 1, the diagonal is the accuracy by side, and a left bias raises the first column.
    `log_likelihood` is in nats; `objectives` adds the confusions' log prior to it, one value per iteration.
    """

    posteriors: dict[Pair, float]
    confusions: dict[str, list[list[float]]]
    prior: float
    log_likelihood: float
    objectives: list[float]
    iterations: int
    converged: bool


@dataclass(frozen=True)
class _Votes:
    """Judgments as index tensors; `side_if_lower_N` is the lower-indexed response's side, 0 left, 1 right."""

    pairs: list[Pair]
    annotators: list[str]
    pair_N: Tensor
    annotator_N: Tensor
    side_if_lower_N: Tensor
    choice_N: Tensor


def pair_of(vote: Judgment) -> Pair:
    """The judged pair in canonical order."""
    return (vote.item, min(vote.left, vote.right), max(vote.left, vote.right))


def chose_lower(vote: Judgment) -> bool:
    """Whether the response with the lower index was chosen, wherever it stood."""
    return (vote.choice == "left") == (vote.left < vote.right)


def majority(votes: Sequence[Judgment]) -> dict[Pair, float]:
    """The share of the votes for the lower-indexed response of each pair; above 1/2 it has the majority.

    Raises:
        DataError: no votes.
    """
    counts: dict[Pair, list[int]] = defaultdict(lambda: [0, 0])
    for vote in votes:
        counts[pair_of(vote)][chose_lower(vote)] += 1
    if not counts:
        raise DataError("there are no judgments to aggregate", fix="judge at least one pair")
    return {pair: lower / (higher + lower) for pair, (higher, lower) in counts.items()}


def dawid_skene(votes: Sequence[Judgment], *, max_iterations: int = 100, tolerance: float = 1e-8) -> DawidSkene:
    """Weighs votes by how reliable each annotator turns out to be, by expectation-maximisation.

    Model. For pair p, z_p = 1 if its lower-indexed response is the better, with P(z_p = 1) = 1/2: how
    responses are numbered is arbitrary, so the prior is symmetric and is not estimated. Judgment n is
    annotator a_n's choice y_n of a side for pair p_n. Let s_n be the side on which the lower index was shown.
    The better response then stands on side t_n(z) = s_n if z = 1, else the other one, and
    P(y_n | z) = C[a_n, t_n(z), y_n]: the truth is canonical, the confusion matrix is in the shown
    orientation, and so a left bias is a property of C and not of the truth.

    Complete-data log-likelihood: sum_p log 1/2 + sum_n log C[a_n, t_n(z_{p_n}), y_n]. It is linear in the
    indicators of z, hence with q_p = P(z_p = 1 | votes) and w_n(t) = q_{p_n} if t = s_n else 1 - q_{p_n}:

        E   q_p = L_p(1) / (L_p(1) + L_p(0)),   L_p(z) = 1/2 prod_{n: p_n = p} C[a_n, t_n(z), y_n]
        M   C[a, t, y] = (sum_{n: a_n = a, y_n = y} w_n(t) + m[t, y]) / (sum_{n: a_n = a} w_n(t) + 3)

    Smoothing, not in the paper: m = `PRIOR_COUNTS`, per side two right judgments and a wrong one, is a
    Beta(3, 2) prior on the accuracies. It keeps logarithms finite when all agree, prefers of two mirror-image
    solutions the one in which annotators are mostly right, and matters for one or two annotators, whose
    accuracy the votes alone do not determine. EM never lowers the log-likelihood plus sum m log C
    (`objectives`). The start is q_p = the share of votes.

    Limits: a pair's difficulty is not modelled, so posteriors are too sure where annotators err on the same
    hard pairs. Where the sides are not counterbalanced, a preference cannot be told from a side bias, and the
    posteriors stay near 1/2.

    Args:
        votes: any number per pair and annotator, in any orders.
        max_iterations: M and E steps at most, at least 1.
        tolerance: stop when no posterior moves by more.

    Raises:
        DataError: no votes.

    Source: Dawid & Skene 1979, Maximum likelihood estimation of observer error-rates using the EM algorithm.
    """
    shares = majority(votes)
    encoded = _encode(votes, list(shares))
    prior_22 = torch.tensor(PRIOR_COUNTS, dtype=torch.float64)
    q_P = torch.tensor(list(shares.values()), dtype=torch.float64)
    objectives: list[float] = []
    while True:
        log_confusion_A22 = _maximise(encoded, q_P, prior_22).log()
        previous_P, (q_P, log_likelihood) = q_P, _expect(encoded, log_confusion_A22)
        objectives.append(log_likelihood + float((prior_22 * log_confusion_A22).sum()))
        converged = float((q_P - previous_P).abs().max()) <= tolerance
        if converged or len(objectives) >= max_iterations:
            break
    return DawidSkene(
        posteriors=dict(zip(encoded.pairs, q_P.tolist(), strict=True)),
        confusions=dict(zip(encoded.annotators, log_confusion_A22.exp().tolist(), strict=True)),
        prior=0.5,
        log_likelihood=log_likelihood,
        objectives=objectives,
        iterations=len(objectives),
        converged=converged,
    )


def _encode(votes: Sequence[Judgment], pairs: list[Pair]) -> _Votes:
    annotators = list(dict.fromkeys(vote.annotator for vote in votes))
    pair_index = {pair: k for k, pair in enumerate(pairs)}
    annotator_index = {name: k for k, name in enumerate(annotators)}
    return _Votes(
        pairs=pairs,
        annotators=annotators,
        pair_N=torch.tensor([pair_index[pair_of(vote)] for vote in votes]),
        annotator_N=torch.tensor([annotator_index[vote.annotator] for vote in votes]),
        side_if_lower_N=torch.tensor([int(vote.left > vote.right) for vote in votes]),
        choice_N=torch.tensor([int(vote.choice == "right") for vote in votes]),
    )


def _maximise(votes: _Votes, q_P: Tensor, prior_22: Tensor) -> Tensor:
    """M step: confusion matrices `[A, 2, 2]` from the posteriors."""
    counts_A22 = prior_22.repeat(len(votes.annotators), 1, 1)
    q_N = q_P[votes.pair_N]
    for side_N, weight_N in ((votes.side_if_lower_N, q_N), (1 - votes.side_if_lower_N, 1 - q_N)):
        counts_A22.index_put_((votes.annotator_N, side_N, votes.choice_N), weight_N, accumulate=True)
    return counts_A22 / counts_A22.sum(-1, keepdim=True)


def _expect(votes: _Votes, log_confusion_A22: Tensor) -> tuple[Tensor, float]:
    """E step: posteriors `[P]` and the log-likelihood in nats."""
    log_joint = []
    for side_N in (votes.side_if_lower_N, 1 - votes.side_if_lower_N):
        log_joint_P = torch.full((len(votes.pairs),), math.log(0.5), dtype=torch.float64)
        log_joint_P.index_add_(0, votes.pair_N, log_confusion_A22[votes.annotator_N, side_N, votes.choice_N])
        log_joint.append(log_joint_P)
    lower_P, higher_P = log_joint
    return torch.sigmoid(lower_P - higher_P), float(torch.logaddexp(lower_P, higher_P).sum())


def wins_matrix(posteriors: Mapping[tuple[int, int], float], K: int) -> list[list[float]]:
    """`wins[i][j]` = P(response i beats response j) among the `K` responses to one prompt.

    The diagonal and pairs that nobody judged are 1/2. `posteriors` holds P(i is better) by (i, j), i < j.
    """
    wins = [[0.5] * K for _ in range(K)]
    for (i, j), p in posteriors.items():
        wins[i][j], wins[j][i] = p, 1.0 - p
    return wins


def ranks_from_wins(wins: Sequence[Sequence[float]]) -> list[int]:
    """Ranks by expected number of wins (the row sum), 1 the best; ties share the better rank (1, 1, 3).

        rank_i = 1 + #{k : sum_j wins[k][j] > sum_j wins[i][j]}

    With wins of 0, 1/2 and 1 this is Copeland's rule, with shares of votes Borda's.
    """
    sums = [math.fsum(row) for row in wins]
    return [1 + sum(other > own + TIE for other in sums) for own in sums]


def agreement_with_gold(posteriors: Mapping[Pair, float], gold_BK: Sequence[Sequence[float]]) -> float | None:
    """The share of pairs whose better response the posteriors name; an undecided pair counts half.

    Pairs on which gold ties are left out; None (undefined) when those are all pairs.
    """
    credits: list[float] = []
    for (item, i, j), p in posteriors.items():
        gap = gold_BK[item][i] - gold_BK[item][j]
        if gap:
            credits.append(0.5 if abs(p - 0.5) <= TIE else float((p > 0.5) == (gap > 0)))
    return _mean(credits)


def annotator_report(
    votes: Sequence[Judgment],
    posteriors: Mapping[Pair, float],
    gold_BK: Sequence[Sequence[float]] | None = None,
) -> dict[str, Any]:
    """How each annotator judged, and how often any two agree; ready for JSON.

    Per annotator: `judgments`; `left_rate`, share of left choices; `agreement`, with the aggregate, on pairs
    that it decides; `accuracy` against gold, on pairs without a gold tie; `gold_confusion[t][y]`, share of
    choices y (left, right) where gold's better response stood on side t. `pairwise_agreement` is raw, not
    corrected for chance: 1/2 is a coin's. An undefined figure is None, and `notes` says why.

    Args:
        votes: all judgments; where an annotator repeats a pair, `pairwise_agreement` takes the last one.
        posteriors: the aggregate, P(lower index is better) per pair.
        gold_BK: true scores by prompt and response, if there are any.
    """
    by_annotator: dict[str, list[Judgment]] = defaultdict(list)
    for vote in votes:
        by_annotator[vote.annotator].append(vote)
    return {
        "annotators": {name: _one_annotator(own, posteriors, gold_BK) for name, own in by_annotator.items()},
        "pairwise_agreement": [
            {"annotators": [a, b], **_raw_agreement(by_annotator[a], by_annotator[b])}
            for a, b in combinations(by_annotator, 2)
        ],
    }


def _one_annotator(
    votes: Sequence[Judgment], posteriors: Mapping[Pair, float], gold_BK: Sequence[Sequence[float]] | None
) -> dict[str, Any]:
    agrees: list[float] = []
    for vote in votes:
        p = posteriors[pair_of(vote)]
        if abs(p - 0.5) > TIE:
            agrees.append(float(chose_lower(vote) == (p > 0.5)))
    left, right = _left_choices_by_truth(votes, gold_BK)
    notes: dict[str, str] = {}
    if not agrees:
        notes["agreement"] = "undefined (the aggregate decides none of the judged pairs)"
    if not left and not right:
        why = "no gold scores given" if gold_BK is None else "gold ties on every judged pair"
        notes["accuracy"] = notes["gold_confusion"] = f"undefined ({why})"
    elif not left or not right:
        side = "right" if left else "left"
        notes["gold_confusion"] = f"{side} row undefined (gold's better response never stood there)"
    return {
        "judgments": len(votes),
        "left_rate": _mean([float(vote.choice == "left") for vote in votes]),
        "agreement": _mean(agrees),
        "accuracy": _mean(left + [1.0 - chose_left for chose_left in right]),
        "gold_confusion": [None if (p := _mean(row)) is None else [p, 1.0 - p] for row in (left, right)],
        "notes": notes,
    }


def _left_choices_by_truth(
    votes: Sequence[Judgment], gold_BK: Sequence[Sequence[float]] | None
) -> tuple[list[float], list[float]]:
    """1 for each left choice and 0 for each right one, where gold's better stood left, and where right."""
    left: list[float] = []
    right: list[float] = []
    if gold_BK is not None:
        for vote in votes:
            gap = gold_BK[vote.item][vote.left] - gold_BK[vote.item][vote.right]
            if gap:
                (left if gap > 0 else right).append(float(vote.choice == "left"))
    return left, right


def _raw_agreement(votes_a: Sequence[Judgment], votes_b: Sequence[Judgment]) -> dict[str, Any]:
    choices_a, choices_b = ({pair_of(v): chose_lower(v) for v in votes} for votes in (votes_a, votes_b))
    common = choices_a.keys() & choices_b.keys()
    agreement = _mean([float(choices_a[pair] == choices_b[pair]) for pair in common])
    notes = {} if common else {"agreement": "undefined (no pair in common)"}
    return {"pairs": len(common), "agreement": agreement, "notes": notes}


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
