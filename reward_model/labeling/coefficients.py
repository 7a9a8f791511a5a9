"""Coefficients of agreement, each a `Figure`: a number with its interval, or the reason why there is none.

Letters: I items, C categories, M annotators, K responses. `counts_IC[i, c]` is how many annotators put item i into
category c. krippendorff computes alpha, statsmodels Fleiss' kappa, scipy Kendall's tau; Cohen's kappa and Kendall's W
are written out here, because a project asks for the former a thousand times at once and nobody has the latter.

Where all answers are alike, chance alone would agree too, and every coefficient is 0 / 0. The libraries then raise,
warn or return NaN; here the figure is None and its note says "undefined (all agree)".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from rlhf.eval.winrate import wilson_interval

ALL_AGREE = "undefined (all agree)"
NOTHING = "undefined (no judgments)"
ONE_ANNOTATOR = "undefined (one annotator)"
NO_OVERLAP = "undefined (no item was judged by two)"
ALL_TIED = "undefined (somebody ranks all alike)"
RANGE = 0.95
"""Coverage of every interval."""


@dataclass(frozen=True)
class Figure:
    """A number from `n` items or judgments, with a 95% interval where one was asked for; None: `note` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    note: str = ""

    def json(self) -> dict[str, Any]:
        """Plain data, without NaN."""
        return dict(vars(self))


def raw_agreement(counts_IC: np.ndarray) -> Figure:
    """The share of equal answers among all pairs of answers to one item; not corrected for chance."""
    pairable_IC, note = _pairable(counts_IC)
    if note and note != ALL_AGREE:
        return Figure(None, note=note)
    n_I = pairable_IC.sum(1)
    agreeing = (pairable_IC * (pairable_IC - 1)).sum() / (n_I * (n_I - 1)).sum()
    return Figure(float(agreeing), n=len(pairable_IC))


def alpha(counts_IC: np.ndarray, level: Literal["nominal", "ordinal"]) -> Figure:
    """Krippendorff's alpha of the items with two answers or more: 1 is agreement, 0 chance, below 0 worse.

    `ordinal`: the categories are in order, and near ones disagree less.
    Source: Krippendorff 2011, Computing Krippendorff's alpha-reliability.
    """
    pairable_IC, note = _pairable(counts_IC)
    if note:
        return Figure(None, note=note)
    import krippendorff

    # A category that nobody used stands at no distance from its neighbours: leaving it out changes nothing.
    used_IC = pairable_IC[:, pairable_IC.any(0)]
    value = krippendorff.alpha(value_counts=used_IC, level_of_measurement=level)
    return Figure(float(value), n=len(pairable_IC))


def fleiss_kappa(counts_IC: np.ndarray) -> Figure:
    """Fleiss' kappa, which wants the same number of answers of every item: of the items with the commonest number.

    Source: Fleiss 1971, Measuring nominal scale agreement among many raters.
    """
    pairable_IC, note = _pairable(counts_IC)
    if note and note != ALL_AGREE:
        return Figure(None, note=note)
    sizes, items = np.unique(pairable_IC.sum(1), return_counts=True)
    even_IC = pairable_IC[pairable_IC.sum(1) == sizes[items.argmax()]]
    if (even_IC.sum(0) > 0).sum() == 1:
        return Figure(None, n=len(even_IC), note=ALL_AGREE)
    from statsmodels.stats.inter_rater import fleiss_kappa as kappa

    return Figure(float(kappa(even_IC)), n=len(even_IC))


def cohen_kappa(confusion_CC: np.ndarray, weights: Literal["none", "quadratic"] = "none") -> Figure:
    """Cohen's kappa of two annotators, 1 - sum w O / sum w E.

    `confusion_CC[a, b]` counts the items that one put into category a and the other into b; E is what it would be
    if they were independent. w is 1 off the diagonal, or the squared distance of the categories.
    Source: Cohen 1960, 1968.
    """
    n = int(confusion_CC.sum())
    if not n:
        return Figure(None, note=NO_OVERLAP)
    distance_CC = np.abs(np.subtract.outer(np.arange(len(confusion_CC)), np.arange(len(confusion_CC))))
    weight_CC = distance_CC**2 if weights == "quadratic" else distance_CC > 0
    expected = (weight_CC * np.outer(confusion_CC.sum(1), confusion_CC.sum(0))).sum() / n
    if not expected:
        return Figure(None, n=n, note=ALL_AGREE)
    return Figure(float(1 - (weight_CC * confusion_CC).sum() / expected), n=n)


def item_tau(ranks_MK: np.ndarray) -> float:
    """Kendall's tau-b of two annotators of one item, averaged over such pairs; NaN where there is none.

    Who ranks all alike has no tau and is left out.
    Source: Kendall 1945, The treatment of ties in ranking problems.
    """
    from scipy.stats import kendalltau

    untied = [ranks_K for ranks_K in ranks_MK if len(set(ranks_K.tolist())) > 1]
    taus: list[Any] = [kendalltau(a, b)[0] for a, b in combinations(untied, 2)]
    return math.fsum(taus) / len(taus) if taus else math.nan


def item_kendall_w(ranks_MK: np.ndarray) -> float:
    """Kendall's coefficient of concordance, corrected for ties; 1 is agreement, 0 none, NaN: all rank all alike.

        W = 12 S / (M^2 (K^3 - K) - M sum_m T_m),    T_m = sum over ties of t responses (t^3 - t)

    S is the sum of squared deviations of the responses' rank sums from their mean, with tied ranks averaged.
    Source: Kendall & Babington Smith 1939; Kendall 1962, chapter 6, for the ties.
    """
    from scipy.stats import rankdata

    M, K = ranks_MK.shape
    sums_K = rankdata(ranks_MK, axis=1).sum(0)
    ties = sum(int(t**3 - t) for ranks_K in ranks_MK for t in np.unique(ranks_K, return_counts=True)[1])
    widest = M**2 * (K**3 - K) - M * ties
    return float(12 * ((sums_K - sums_K.mean()) ** 2).sum() / widest) if widest else math.nan


def mean_of_items(values_I: np.ndarray) -> Figure:
    """The mean over the items that have a value."""
    known_I = values_I[~np.isnan(values_I)]
    if not len(known_I):
        return Figure(None, note=ALL_TIED)
    return Figure(float(known_I.mean()), n=len(known_I))


def share(successes: int, n: int, nothing: str) -> Figure:
    """successes / n with Wilson's interval; `nothing` says why there is none where n is 0."""
    if not n:
        return Figure(None, note=f"undefined ({nothing})")
    return Figure(successes / n, *wilson_interval(successes, n), n)


def bootstrap(statistic: Callable[[np.ndarray], Figure], items: int, *, resamples: int, seed: int) -> Figure:
    """The figure of all items, with the percentile interval of `resamples` draws of as many items.

    Items are drawn and not judgments, because the judgments of one item hang together. Draws in which the figure is
    undefined are left out; where those are more than half, there is no interval.

    Args:
        statistic: of the items with these indices.
    """
    figure = statistic(np.arange(items))
    if figure.value is None or not resamples or items < 2:
        return figure
    rng = np.random.default_rng(seed)
    drawn = (statistic(rng.integers(0, items, items)).value for _ in range(resamples))
    values = [value for value in drawn if value is not None]
    if len(values) <= resamples / 2:
        return Figure(figure.value, n=figure.n, note="too few different answers for an interval")
    low, high = np.quantile(values, [(1 - RANGE) / 2, (1 + RANGE) / 2])
    return Figure(figure.value, float(low), float(high), figure.n)


def _pairable(counts_IC: np.ndarray) -> tuple[np.ndarray, str]:
    """The items with two answers or more, and why a coefficient of them is undefined, or ""."""
    pairable_IC = counts_IC[counts_IC.sum(1) > 1]
    if not len(pairable_IC):
        return pairable_IC, NO_OVERLAP if counts_IC.any() else NOTHING
    return pairable_IC, ALL_AGREE if (pairable_IC.sum(0) > 0).sum() == 1 else ""
