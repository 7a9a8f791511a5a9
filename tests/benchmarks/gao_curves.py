"""Gold against d = sqrt(KL): the forms of Gao et al. 2022 fitted by least squares, peaks, and the picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.eval.charts import nice_ticks, number, smooth

Points = list[tuple[float, float]]
"""(d, gold's gain)."""

STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
text { fill: #6f6b64; font-size: 11px; } .title { fill: #1d1c1a; font-size: 13px; font-weight: 600; }
.grid { stroke: #e4e1da; } .fit { fill: none; stroke: currentColor; stroke-width: 1.8; }
circle { fill: currentColor; fill-opacity: .3; }
.tone1 { color: #0b7a6b; } .tone2 { color: #b4530a; } .tone3 { color: #5b4bb7; } .tone4 { color: #a8326b; }
.tone5 { color: #2f6fb0; } .tone6 { color: #1d1c1a; }
text[class] { fill: currentColor; font-weight: 600; } text.title { fill: #1d1c1a; }
"""
PANEL_WIDTH, PANEL_HEIGHT, LEFT, TOP, BOTTOM = 300, 220, 40, 26, 34


@dataclass(frozen=True)
class Fit:
    """R(d) = d (alpha - beta d) if `kind` is "bon", d (alpha - beta log d) if it is "rl"; r2 is that of the fit."""

    kind: str
    alpha: float
    beta: float
    r2: float

    def __call__(self, d: float) -> float:
        """R(d)."""
        return d * (self.alpha - self.beta * (d if self.kind == "bon" else math.log(d))) if d > 0 else 0.0

    @property
    def peak(self) -> float | None:
        """The d where the form has its maximum; None where it only rises or only falls."""
        if self.beta <= 0 or (self.kind == "bon" and self.alpha <= 0):
            return None
        return self.alpha / (2 * self.beta) if self.kind == "bon" else math.exp(self.alpha / self.beta - 1)


def fit(kind: str, points: Points) -> Fit:
    """Least squares over all points with d > 0; both forms are linear in alpha and beta and pass through the origin."""
    d_N, gain_N = np.array([point for point in points if point[0] > 0]).T
    columns_N2 = np.stack([d_N, -d_N * (d_N if kind == "bon" else np.log(d_N))], 1)
    (alpha, beta), *_ = np.linalg.lstsq(columns_N2, gain_N, rcond=None)
    residual = gain_N - columns_N2 @ np.array([alpha, beta])
    r2 = 1 - float(residual @ residual) / float(((gain_N - gain_N.mean()) ** 2).sum())
    return Fit(kind, float(alpha), float(beta), r2)


def ppo_points(steps: Sequence[tuple[float, float, float]], start: float) -> Points:
    """(d, gold - start) of the steps of one run, which measure (KL, proxy, gold)."""
    return [(math.sqrt(max(kl, 0.0)), gold - start) for kl, _, gold in steps]


def peak_of(points: Points, span: int = 7) -> tuple[float, float, float]:
    """(d at the peak, gain there, gain at the end) of one run in order of its steps, both coordinates smoothed."""
    d = smooth([x for x, _ in points], span)
    gain = smooth([y for _, y in points], span)
    best = max(range(len(gain)), key=gain.__getitem__)
    return d[best], gain[best], gain[-1]


def gain_at(points: Points, d: float, span: int = 7) -> float | None:
    """The smoothed gain where the run first gets as far as `d`, between two steps; None where it never does."""
    xs, ys = smooth([x for x, _ in points], span), smooth([y for _, y in points], span)
    for i in range(1, len(xs)):
        if xs[i - 1] < d <= xs[i]:
            part = (d - xs[i - 1]) / (xs[i] - xs[i - 1])
            return ys[i - 1] + part * (ys[i] - ys[i - 1])
    return None


def best_curve(runs: Sequence[Sequence[tuple[float, float, float]]]) -> Points:
    """Best-of-n over some seeds, whose KLs are the same: (d, mean gain over n = 1)."""
    return [
        (
            math.sqrt(max(point[0][0], 0.0)),
            statistics.fmean(p[2] - run[0][2] for p, run in zip(point, runs, strict=True)),
        )
        for point in zip(*runs, strict=True)
    ]


# --- the picture ------------------------------------------------------------------------------------------------


def picture(rows: Mapping[str, Mapping[str, Mapping[str, tuple[Points, Fit]]]]) -> str:
    """A row per way of optimising, a column per size, a colour per rule; dots are measured, lines fitted."""
    rules = list(dict.fromkeys(rule for panels in rows.values() for panel in panels.values() for rule in panel))
    columns = max(len(panels) for panels in rows.values())
    parts = []
    for r, (way, panels) in enumerate(rows.items()):
        ys = [y for panel in panels.values() for points, _ in panel.values() for _, y in points]
        for c, (size, series) in enumerate(panels.items()):
            x, y = c * PANEL_WIDTH, 30 + r * PANEL_HEIGHT
            inner = _panel(
                f"{way}, {size} pairs", {rules.index(k) + 1: v for k, v in series.items()}, (min(ys), max(ys))
            )
            parts.append(f'<svg x="{x}" y="{y}" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}">{inner}</svg>')
    legend = "".join(
        f'<text class="tone{i}" x="{LEFT + 110 * (i - 1)}" y="20">{rule}</text>' for i, rule in enumerate(rules, 1)
    )
    width, height = columns * PANEL_WIDTH, 30 + len(rows) * PANEL_HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{legend}{"".join(parts)}</svg>\n'
    )


def _panel(title: str, series: Mapping[int, tuple[Points, Fit]], span: tuple[float, float]) -> str:
    """One panel; all panels of a row share their y axis."""
    furthest = max(x for points, _ in series.values() for x, _ in points)
    x_ticks, y_ticks = nice_ticks(0.0, furthest), nice_ticks(*span)
    right, bottom = PANEL_WIDTH - 12, PANEL_HEIGHT - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (right - LEFT) * x / x_ticks[-1]
        down = bottom - (bottom - TOP) * (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(across, 1), round(down, 1)

    parts = [f'<text class="title" x="{LEFT}" y="16">{title}</text>']
    for tick in y_ticks:
        _, y = at(0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{at(tick, 0)[0]}" y="{bottom + 14}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{PANEL_HEIGHT - 4}" text-anchor="middle">d = sqrt(KL)</text>')
    for tone, (points, form) in series.items():
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="1.8"/>' for x, y in (at(*point) for point in points))
        end = max(x for x, _ in points)
        line = " ".join(f"{x},{y}" for x, y in (at(end * i / 60, form(end * i / 60)) for i in range(61)))
        parts.append(f'<g class="tone{tone}">{dots}<polyline class="fit" points="{line}"/></g>')
    return "".join(parts)
