"""Straight lines through noisy curves, and the law by which a gold score rises and falls. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Sequence


def trend(values: Sequence[float]) -> tuple[float, float]:
    """(slope per step, its standard error) of the least-squares line through evenly spaced values.

    Raises:
        ValueError: fewer than 3 values, of which no error can be told.
    """
    n = len(values)
    if n < 3:
        raise ValueError(f"{n} values; a trend with its error needs 3")
    centre, mean = (n - 1) / 2, sum(values) / n
    spread = sum((i - centre) ** 2 for i in range(n))
    slope = sum((i - centre) * y for i, y in enumerate(values)) / spread
    residuals = (y - mean - slope * (i - centre) for i, y in enumerate(values))
    return slope, math.sqrt(sum(r * r for r in residuals) / (n - 2) / spread)


def project(values: Sequence[float]) -> float:
    """The least-squares line through the values, read off as many steps ahead as there are values."""
    n = len(values)
    slope, _ = trend(values)
    return sum(values) / n + slope * ((n - 1) / 2 + n)


def fit_overoptimization(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """(a, b) of R(d) = d (a - b log d) by least squares over points (d, R), d > 0.

    d is the square root of the KL to the starting policy, R the gold score's gain over it.

    Returns:
        None where the points do not determine both, as when all have nearly the same d.

    Source: Gao et al. 2022 (arXiv:2210.10760), section 3.1, the law for reinforcement learning.
    """
    rows = [(d, -d * math.log(d), gain) for d, gain in points]
    uu, vv = sum(u * u for u, _, _ in rows), sum(v * v for _, v, _ in rows)
    uv = sum(u * v for u, v, _ in rows)
    ur, vr = sum(u * r for u, _, r in rows), sum(v * r for _, v, r in rows)
    determinant = uu * vv - uv * uv
    if determinant <= 1e-6 * uu * vv:
        return None
    return (vv * ur - uv * vr) / determinant, (uu * vr - uv * ur) / determinant


def overoptimization_peak(a: float, b: float) -> float | None:
    """The d at which d (a - b log d) is largest, exp(a / b - 1); None where it only rises, or out of all reach."""
    return math.exp(a / b - 1) if b > 0 and a / b < 20 else None
