"""What held-out labels say of a reward model: accuracy, calibration, length bias, best-of-n. Numbers in, JSON out.

A score difference is taken for log odds, as the ranking losses make it: P(i beats j) = sigmoid(s_i - s_j) in raw units.
Calibration is measured in the direction that does not know the label: the confidence is the probability of the side
that the model prefers. Scores that are no log odds (ratings, another's reward model) show as a temperature far from 1.
Intervals are 95% and over prompts, for pairs of one prompt are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from reward_model.data import RankedTokens, RatingScale
from rlhf.eval.winrate import mean_interval, share_interval

BINS = 10
"""Of the reliability plot, each with as many pairs."""
PARTS = 4
"""Of accuracy by margin and by length gap, each with as many pairs."""


@dataclass(frozen=True)
class Units:
    """What normalised scores stand for: raw score = mean + std * score, and where the model learned ratings, rating =
    ratings.mean + ratings.std * raw score."""

    mean: float = 0.0
    std: float = 1.0
    ratings: RatingScale | None = None


@dataclass(frozen=True)
class Scored:
    """A labeled item with its scores.

    `members`: for an ensemble, every member's scores, [M][K].
    """

    item: RankedTokens
    scores: list[float]
    members: list[list[float]]


@dataclass(frozen=True)
class JudgedPair:
    """Two responses of one prompt with different ranks, the better one first.

    Attributes:
        logit: difference of the raw scores, first - second.
        target: labeled probability that the first is the better one.
        gap: difference of the lengths, in tokens.
        spread: standard deviation over an ensemble's members of the difference, in normalised scores.
        is_right: whether the scores are in the labels' order; .5 where they are equal.
    """

    logit: float
    target: float
    gap: int
    group: str
    spread: float

    @property
    def is_right(self) -> float:
        return 0.5 if self.logit == 0 else float(self.logit > 0)


def outcomes_of(scores: Sequence[float], ranks: Sequence[float]) -> list[float]:
    """1 for every untied pair whose scores are in the order of `ranks` (low is best), 0 if not, .5 at equal scores."""
    outcomes = []
    for i, j in combinations(range(len(ranks)), 2):
        if ranks[i] != ranks[j]:
            difference = (scores[i] - scores[j]) * (1 if ranks[i] < ranks[j] else -1)
            outcomes.append(0.5 if difference == 0 else float(difference > 0))
    return outcomes


def judged_pairs(scored: Sequence[Scored], std: float) -> list[JudgedPair]:
    """Every untied pair; `std`: raw units per normalised one."""
    pairs = []
    for one in scored:
        item, lengths = one.item, one.item.response_lengths
        for i, j in combinations(range(len(item.ranks)), 2):
            if item.ranks[i] == item.ranks[j]:
                continue
            best, worst = (i, j) if item.ranks[i] < item.ranks[j] else (j, i)
            differences = [scores[best] - scores[worst] for scores in one.members]
            pairs.append(
                JudgedPair(
                    logit=std * (one.scores[best] - one.scores[worst]),
                    target=item.wins[best][worst],
                    gap=lengths[best] - lengths[worst],
                    group=item.group,
                    spread=float(torch.tensor(differences).std(correction=0)) if len(differences) > 1 else 0.0,
                )
            )
    return pairs


# --- calibration ---------------------------------------------------------------------------------------------


def calibration(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Expected calibration error (`ece`), Brier score, log-loss in nats, the labels' entropy, and the temperature.

        ece = sum over bins of (pairs in bin / pairs) * |mean confidence - mean accuracy|
        brier = mean of (p - t)^2,  log_loss = mean of -t log p - (1 - t) log(1 - p)

    `entropy_floor` is the least log-loss that soft labels allow, 0 for hard ones. Few pairs make the ece too large,
    by about sqrt(bins / pairs) / 2, even where a model is calibrated.

    Sources: Guo et al. 2017 (arXiv:1706.04599); bins of equal mass: Nixon et al. 2019 (arXiv:1904.01685).
    """
    logit_N = torch.tensor([pair.logit for pair in pairs], dtype=torch.float64)
    target_N = torch.tensor([pair.target for pair in pairs], dtype=torch.float64)
    bins = reliability(logit_N, target_N)
    temperature = best_temperature(logit_N, target_N)
    found: dict[str, Any] = {
        "ece": sum(b["pairs"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(pairs),
        "brier": float((logit_N.sigmoid() - target_N).square().mean()),
        "log_loss": _log_loss(logit_N, target_N),
        "entropy_floor": float(_entropy(target_N).mean()),
        "temperature": temperature,
        "log_loss_at_temperature": None if temperature is None else _log_loss(logit_N / temperature, target_N),
        "reliability": bins,
    }
    return found


def reliability(logit_N: Tensor, target_N: Tensor, bins: int = BINS) -> list[dict[str, float]]:
    """Mean confidence and accuracy of bins with equally many pairs, from unsure to sure; at equal scores .5 and .5."""
    confidence_N = logit_N.abs().sigmoid()
    right_N = torch.where(logit_N > 0, target_N, torch.where(logit_N < 0, 1 - target_N, 0.5))
    found = []
    for index in torch.tensor_split(confidence_N.argsort(stable=True), bins):
        if len(index):
            means = confidence_N[index].mean(), right_N[index].mean()
            found.append({"confidence": float(means[0]), "accuracy": float(means[1]), "pairs": len(index)})
    return found


def best_temperature(logit_N: Tensor, target_N: Tensor) -> float | None:
    """The T that makes sigmoid(logit / T) the most likely; None where no finite one does: no better than a coin, or
    never wrong.

    The log-loss is convex in 1/T, so the root of its slope, mean((sigmoid(logit / T) - t) logit), is found by halving.
    """

    def slope(inverse: float) -> float:
        return float((((inverse * logit_N).sigmoid() - target_N) * logit_N).mean())

    low, high = 1e-4, 1e4
    if slope(low) >= 0 or slope(high) <= 0:
        return None
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / middle


def _log_loss(logit_N: Tensor, target_N: Tensor) -> float:
    return float((target_N * softplus(-logit_N) + (1 - target_N) * softplus(logit_N)).mean())


def _entropy(p_N: Tensor) -> Tensor:
    return -(torch.xlogy(p_N, p_N) + torch.xlogy(1 - p_N, 1 - p_N))


# --- accuracy ------------------------------------------------------------------------------------------------


def accuracy(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Share of pairs in the labels' order, with its interval."""
    found = share_interval([pair.is_right for pair in pairs], [pair.group for pair in pairs])
    return {"value": found.value, "low": found.low, "high": found.high, "pairs": len(pairs)}


def accuracy_by(pairs: Sequence[JudgedPair], keys: Sequence[float], parts: int = PARTS) -> list[dict[str, Any]]:
    """Accuracy in parts of equally many pairs, from the smallest key to the largest; each with its range of keys."""
    order = sorted(range(len(pairs)), key=lambda i: keys[i])
    found = []
    for part in torch.tensor_split(torch.tensor(order, dtype=torch.long), parts):
        if len(part):
            rows = part.tolist()
            of_part = accuracy([pairs[i] for i in rows])
            found.append({"from": float(keys[rows[0]]), "to": float(keys[rows[-1]]), **of_part})
    return found


# --- length --------------------------------------------------------------------------------------------------


def length_bias(scored: Sequence[Scored], pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """How scores follow length in tokens: over all responses, and within prompts, where a long prompt topic explains
    nothing; and how often the longer of two wins, by the labels and by the model (pairs of one length left out).

    A figure is None where there is nothing to measure it on.
    """
    scores, lengths, inner_scores, inner_lengths = [], [], [], []
    for one in scored:
        n = len(one.scores)
        scores += one.scores
        lengths += one.item.response_lengths
        inner_scores += [score - sum(one.scores) / n for score in one.scores]
        inner_lengths += [length - sum(one.item.response_lengths) / n for length in one.item.response_lengths]
    unlike = [pair for pair in pairs if pair.gap]
    groups = [pair.group for pair in unlike]
    by_label = [pair.target if pair.gap > 0 else 1 - pair.target for pair in unlike]
    by_model = [pair.is_right if pair.gap > 0 else 1 - pair.is_right for pair in unlike]
    return {
        "correlation": correlation(scores, lengths),
        "correlation_within_prompts": correlation(inner_scores, inner_lengths),
        "longer_wins_in_labels": share_interval(by_label, groups)._asdict() if unlike else None,
        "longer_wins_in_model": share_interval(by_model, groups)._asdict() if unlike else None,
        "pairs": len(unlike),
    }


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's; None where one of the two is constant, or with fewer than three values."""
    stacked_2N = torch.tensor([x, y], dtype=torch.float64)
    if len(x) < 3 or bool((stacked_2N.std(dim=1) < 1e-12).any()):
        return None
    return float(torch.corrcoef(stacked_2N)[0, 1])


# --- best of n -----------------------------------------------------------------------------------------------


def best_of_n(scored: Sequence[Scored]) -> list[dict[str, Any]]:
    """What picking the best of n by score brings, for n up to the fewest responses that a prompt has.

    Each row: n; the KL of best-of-n to the sampler, log n - (n - 1)/n nats; mean `proxy` score of the pick with its
    interval, and `gold` score where every response has one.

    Sources: Stiennon et al. 2020 (arXiv:2009.01325), KL; Nakano et al. 2021 (arXiv:2112.09332), the estimator.
    """
    several = [one for one in scored if len(one.scores) > 1]
    if not several:
        return []
    groups = [one.item.group for one in several]
    rows = []
    for n in range(1, min(len(one.scores) for one in several) + 1):
        proxy = [expected_pick(one.scores, one.scores, n) for one in several]
        row = {"n": n, "kl": math.log(n) - (n - 1) / n, "proxy": mean_interval(proxy, groups)._asdict()}
        if all(one.item.gold for one in several):
            gold = [expected_pick(one.scores, one.item.gold or [], n) for one in several]
            row["gold"] = mean_interval(gold, groups)._asdict()
        rows.append(row)
    return rows


def expected_pick(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """The mean of `values` at the highest of n `scores`, over all choices of n of the K without replacement:

        sum over k = n..K of C(k - 1, n - 1) / C(K, n) * value of the k-th lowest score

    Responses of one score share their values: of equals the pick is any one.
    """
    ordered = sorted(zip(scores, values, strict=True), key=lambda pair: pair[0])
    total, below = 0.0, 0
    for _, equals in groupby(ordered, key=lambda pair: pair[0]):
        shared = [value for _, value in equals]
        # C(k - 1, n - 1), summed over the k of these scores.
        ways = math.comb(below + len(shared), n) - math.comb(below, n)
        total += ways * sum(shared) / len(shared)
        below += len(shared)
    return total / math.comb(len(ordered), n)


# --- ratings -------------------------------------------------------------------------------------------------


def rating_fit(scored: Sequence[Scored], units: Units) -> dict[str, Any]:
    """Squared error in units of the rating, beside that of a constant guess, and correlation."""
    assert units.ratings is not None
    given = [rating for one in scored for rating in one.item.ratings or []]
    raw = [units.mean + units.std * score for one in scored for score in one.scores]
    guessed = [units.ratings.mean + units.ratings.std * value for value in raw]
    return {
        "mse": sum((a - b) ** 2 for a, b in zip(guessed, given, strict=True)) / len(given),
        "mse_of_a_constant": sum((units.ratings.mean - b) ** 2 for b in given) / len(given),
        "correlation": correlation(guessed, given),
        "ratings": len(given),
    }
