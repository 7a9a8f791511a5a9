"""Win rates, accuracies and means with 95% intervals that respect what is independent and what is not.

Several answers to one prompt rise and fall together, so the unit that is resampled is the prompt (the group),
never the answer. Intervals are reproducible: the bootstrap's seed is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlhf.errors import DataError

_RESAMPLES = 4000
_SEED = 20160814
_Z95 = 1.959963984540054
_CHUNK = 256  # resamples drawn at once: bounds memory at 256 x groups, whatever the corpus


class Interval(NamedTuple):
    """A mean and its 95% interval, in the unit of the values."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """Share of comparisons that the candidate wins, ties counting half, with its 95% interval."""

    value: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    n: int


def win_rate(
    candidate_scores: Sequence[float],
    baseline_scores: Sequence[float],
    groups: Sequence[Hashable] | None = None,
) -> WinRate:
    """How often the candidate's answer scores above the baseline's answer at the same position.

        value = (wins + ties / 2) / n

    Args:
        candidate_scores: higher is better; position i is compared with position i of `baseline_scores`.
        baseline_scores: as many, in the same unit.
        groups: the prompt of each comparison; the bootstrap resamples prompts. None: each its own.

    When all prompts agree the bootstrap has no spread, and Wilson's interval over prompts takes its place:
    ten wins in ten are no proof of 100%.

    Raises:
        DataError: no comparison, or a score that is not finite.
        ValueError: lengths differ.
    """
    candidate = _finite(candidate_scores, "candidate score")
    baseline = _finite(baseline_scores, "baseline score")
    if len(candidate) != len(baseline):
        raise ValueError(f"{len(candidate)} candidate scores against {len(baseline)} baseline scores")
    points = np.where(candidate > baseline, 1.0, np.where(candidate < baseline, 0.0, 0.5))
    value, low, high = share_interval(points.tolist(), groups)
    wins, losses = int((points == 1.0).sum()), int((points == 0.0).sum())
    return WinRate(value, low, high, wins, len(points) - wins - losses, losses, len(points))


def share_interval(points: Sequence[float], groups: Sequence[Hashable] | None = None) -> Interval:
    """`mean_interval` of outcomes in [0, 1]; where all resamples agree, Wilson's interval with a trial per group.

    Raises:
        DataError: no outcome, or one that is not finite.
        ValueError: lengths differ.
    """
    value, low, high = mean_interval(points, groups)
    if high - low < 1e-12:
        clusters = len(points) if groups is None else len(set(groups))
        low, high = wilson_interval(value * clusters, clusters)
    return Interval(value, low, high)


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95% score interval of a proportion of `n` independent trials; half successes (ties) are allowed.

        (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),   p = successes / n, z = 1.96

    Unlike p -+ z sqrt(p(1-p)/n) it stays inside [0, 1] and keeps its coverage near 0 and 1.

    Raises:
        DataError: `n` is 0.
        ValueError: `successes` is outside [0, n].

    Source: Wilson 1927, JASA 22:209-212.
    """
    if n <= 0:
        raise DataError("an accuracy over 0 trials has no interval", fix="give at least one pair to judge")
    if not -1e-9 <= successes <= n + 1e-9:
        raise ValueError(f"{successes} successes in {n} trials")
    p = min(max(successes / n, 0.0), 1.0)
    z2 = _Z95**2
    centre = p + z2 / (2 * n)
    spread = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At p = 0 and p = 1 one bound is exactly p; in floating point it would miss by an ulp.
    low = 0.0 if p == 0 else (centre - spread) / (1 + z2 / n)
    high = 1.0 if p == 1 else (centre + spread) / (1 + z2 / n)
    return low, high


def mean_interval(values: Sequence[float], groups: Sequence[Hashable] | None = None) -> Interval:
    """The mean over all values, and its 95% interval by percentile bootstrap clustered over `groups`.

    A resample draws as many groups as there are, with replacement, and takes sum / count over their values;
    groups of unequal size keep their weight. Under about 20 groups the percentile interval is too narrow.

    Args:
        values: any unit.
        groups: the group of each value. None: every value is independent.

    Raises:
        DataError: no value, or a value that is not finite.
        ValueError: lengths differ.

    Source: Efron & Tibshirani 1993, chapters 8 and 13.
    """
    data = _finite(values, "value")
    sums, counts = _cluster(data, groups)
    rng = np.random.default_rng(_SEED)
    means = []
    for start in range(0, _RESAMPLES, _CHUNK):
        rows = min(_CHUNK, _RESAMPLES - start)
        picked = rng.integers(0, len(sums), size=(rows, len(sums)))
        means.append(sums[picked].sum(1) / counts[picked].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(data.mean()), float(low), float(high))


def _finite(values: Sequence[float], name: str) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise DataError(f"0 {name}s: there is nothing to compare", fix="evaluate at least one prompt")
    bad = np.flatnonzero(~np.isfinite(data))
    if bad.size:
        raise DataError(
            f"{name} {int(bad[0])} is {data[bad[0]]}, and {bad.size} of {data.size} are not finite",
            fix="drop those answers, or find out why they have no score",
        )
    return data


def _cluster(data: np.ndarray, groups: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each group, groups in order of first appearance."""
    if groups is None:
        return data, np.ones_like(data)
    if len(groups) != len(data):
        raise ValueError(f"{len(groups)} groups for {len(data)} values")
    index: dict[Hashable, int] = {}
    of_value = np.array([index.setdefault(group, len(index)) for group in groups])
    return np.bincount(of_value, weights=data), np.bincount(of_value).astype(np.float64)
