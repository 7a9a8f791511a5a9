"""Small charts as inline SVG: no script, no external file, colours from CSS variables of the page.

`line_chart` draws raw points lightly and a smoothed line strongly; `interval_chart` draws one value with its
interval per row. Both return markup that is safe to place in a page: every text in it is escaped here.
The view boxes are close to the width of a phone, so that labels keep their size there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]

_WIDTH, _HEIGHT = 360, 196
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 34
_MAX_DOTS = 160


@dataclass(frozen=True)
class Series:
    """One line: `points` are (step, value), already finite, in order of step; `tone` is a colour 1 to 4."""

    name: str
    points: list[Point]
    tone: int = 1


@dataclass(frozen=True)
class Reference:
    """A horizontal dashed line, for example a KL target, in the unit of the y axis."""

    value: float
    label: str


@dataclass(frozen=True)
class Row:
    """A labelled value with an optional interval."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    tone: int = 1


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) whose range covers [low, high].

    An empty or inverted range is widened around `low`, so that a constant series has an axis too.

    Source: after Heckbert 1990, Graphics Gems, "Nice numbers for graph labels".
    """
    if not high > low:
        margin = abs(low) * 0.1 or 0.5
        low, high = low - margin, low + margin
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Rounding drops the dust of 3 * 0.1 = 0.30000000000000004.
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(i * step, digits) + 0.0 for i in range(first, last + 1)]


def smooth(values: Sequence[float], span: int | None = None) -> list[float]:
    """The values with their noise averaged out and without lag: `smooth_at` every index."""
    return [smooth_at(values, i, span) for i in range(len(values))]


def smooth_at(values: Sequence[float], index: int, span: int | None = None) -> float:
    """A straight line fitted around `index` by weighted least squares, read off at `index` (LOESS).

        min_{a, b} sum_j w_j (values_j - a - b (j - index))^2,   w_j = (1 - (|j - index| / d)^3)^3

    over the `span` points nearest to `index`, d just beyond the farthest. A trailing average would lag behind
    every trend and misstate where a curve ends; the local line is exact on straight stretches to both ends.

    Args:
        values: in order, evenly spaced.
        index: where to read the fit.
        span: points in the fit; None: a third of the series, at most 101. 1 returns the value itself.

    Source: Cleveland 1979, JASA 74:829-836 (degree 1, tricube weights, no robustness passes).
    """
    n = len(values)
    span = max(1, min(n, 101, round(n / 3) if span is None else span))
    start = min(max(0, index - span // 2), n - span)
    offsets = range(start - index, start - index + span)
    reach = max(abs(offsets[0]), abs(offsets[-1])) + 1
    weights = [(1 - (abs(k) / reach) ** 3) ** 3 for k in offsets]
    window = values[start : start + span]
    s0 = sum(weights)
    s1 = sum(w * k for w, k in zip(weights, offsets, strict=True))
    s2 = sum(w * k * k for w, k in zip(weights, offsets, strict=True))
    t0 = sum(w * y for w, y in zip(weights, window, strict=True))
    t1 = sum(w * k * y for w, k, y in zip(weights, offsets, window, strict=True))
    determinant = s0 * s2 - s1 * s1
    # A single point has no slope.
    return (s2 * t0 - s1 * t1) / determinant if span > 1 else t0 / s0


def number(value: float) -> str:
    """Three significant digits without noise: 0.0421, 5.9, 13.6, 1,240, 3.0e-06; a true minus sign."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e6:
        text = f"{value:.1e}"
    elif size >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{2 - math.floor(math.log10(size))}f}"
        # 5.90 is read as 5.9, but 0.030 would lose a digit that was measured only if it were not zero.
        text = text.rstrip("0").rstrip(".") if "." in text else text
    return _minus(text)


def fixed(value: float, digits: int) -> str:
    """`digits` decimals, so that the numbers of a table row line up; smaller ones fall back to `number`."""
    text = f"{value:,.{digits}f}"
    return number(value) if value and not any(c in "123456789" for c in text) else _minus(text)


def _minus(text: str) -> str:
    """A true minus sign in front; the hyphen of an exponent stays."""
    return "\u2212" + text[1:] if text.startswith("-") else text


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    unit: str = "",
    x_unit: str = "step",
    reference: Reference | None = None,
    floor: float | None = None,
) -> Markup:
    """One chart of up to four series over steps; an empty markup when no series has a point.

    Args:
        series: those without points are left out.
        title: for screen readers; the page shows it as a heading.
        unit: of the y axis, repeated in tooltips.
        x_unit: label of the x axis.
        reference: drawn dashed and always inside the axis.
        floor: the y axis reaches down to this value at least, for example 0 for a share.
    """
    drawn = [s for s in series if s.points]
    if not drawn:
        return Markup("")
    ys = [y for s in drawn for _, y in s.points] + ([reference.value] if reference else [])
    ys += [floor] if floor is not None else []
    y_ticks = nice_ticks(min(ys), max(ys))
    x_low, x_high = min(s.points[0][0] for s in drawn), max(s.points[-1][0] for s in drawn)
    x_ticks = [t for t in nice_ticks(x_low, x_high, 5) if x_low <= t <= x_high] or [x_low]
    x_of = _scale(x_low, x_high, _LEFT, _WIDTH - _RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    body = [_grid(x_ticks, y_ticks, x_of, y_of, x_unit)]
    if reference:
        body.append(_reference(reference, y_of))
    body += [_line(s, x_of, y_of, unit, x_unit) for s in drawn]
    last = ", ".join(f"{s.name} ends at {number(smoothed_last(s.points))} {unit}".strip() for s in drawn)
    return _svg(f"{title}: {last}", _WIDTH, _HEIGHT, body)


def point_chart(
    series: Sequence[Series], *, title: str, unit: str = "", x_unit: str = "", diagonal: bool = False
) -> Markup:
    """Few points per series, each drawn as it is and joined by straight lines; an empty markup without points.

    Args:
        series: those without points are left out.
        title: for screen readers.
        unit: of the y axis, in tooltips.
        x_unit: label of the x axis.
        diagonal: both axes have one range, and y = x is drawn dashed.
    """
    drawn = [s for s in series if s.points]
    if not drawn:
        return Markup("")
    xs, ys = ([point[axis] for s in drawn for point in s.points] for axis in (0, 1))
    low, high = (min(xs), max(xs)) if not diagonal else (min(*xs, *ys), max(*xs, *ys))
    y_ticks = nice_ticks(low, high) if diagonal else nice_ticks(min(ys), max(ys))
    x_ticks = y_ticks if diagonal else [t for t in nice_ticks(low, high, 5) if low <= t <= high] or [low]
    x_of = _scale(min(low, x_ticks[0]), max(high, x_ticks[-1]), _LEFT, _WIDTH - _RIGHT)
    y_of = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    body = [_grid(x_ticks, y_ticks, x_of, y_of, x_unit)]
    if diagonal:
        line = Markup('<line class="target" x1="{}" y1="{}" x2="{}" y2="{}"/>')
        ends = (y_ticks[0], y_ticks[-1])
        body.append(line.format(*(_px(f(end)) for end in ends for f in (x_of, y_of))))
    body += [_joined(s, x_of, y_of, unit, x_unit) for s in drawn]
    last = ", ".join(f"{s.name} ends at {number(s.points[-1][1])} {unit}".strip() for s in drawn)
    return _svg(f"{title}: {last}", _WIDTH, _HEIGHT, body)


def _joined(
    series: Series, x_of: Callable[[float], float], y_of: Callable[[float], float], unit: str, x_unit: str
) -> Markup:
    at = [(_px(x_of(x)), _px(y_of(y))) for x, y in series.points]
    marks = [
        Markup('<circle class="mark tone{}" cx="{}" cy="{}" r="4"><title>{}</title></circle>').format(
            series.tone, *place, f"{series.name}, {x_unit} {number(x)}: {number(y)} {unit}".rstrip()
        )
        for place, (x, y) in zip(at, series.points, strict=True)
    ]
    path = Markup('<path class="line tone{}" d="{}"/>').format(series.tone, "M" + "L".join(map(" ".join, at)))
    return path + Markup("").join(marks)


def smoothed_last(points: Sequence[Point]) -> float:
    """Where the smoothed line ends; what the page prints beside the chart."""
    return smooth_at([y for _, y in points], len(points) - 1)


def interval_chart(rows: Sequence[Row], *, title: str, unit: str = "", floor: float | None = 0.0) -> Markup:
    """One dot per row on a common axis, its interval as a bar; an empty markup without rows."""
    if not rows:
        return Markup("")
    bounds = [b for r in rows for b in (r.value, r.low, r.high) if b is not None]
    ticks = nice_ticks(min([*bounds, *([] if floor is None else [floor])]), max(bounds), 5)
    left, step = 64, 34
    height = _TOP + step * len(rows) + _BOTTOM
    x_of = _scale(ticks[0], ticks[-1], left, _WIDTH - 20)
    bottom = height - _BOTTOM
    body = []
    for tick in ticks:
        x = _px(x_of(tick))
        line = Markup('<line class="grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>')
        body.append(line.format(x, _TOP, bottom))
        body.append(_text(x, bottom + 14, number(tick), "middle"))
    body.append(_text(_WIDTH - 20, height - 4, unit, "end"))
    body += [_interval_row(row, _TOP + step * (i + 0.5), left, x_of, unit) for i, row in enumerate(rows)]
    said = ", ".join(f"{r.label} {number(r.value)}" for r in rows)
    return _svg(f"{title}: {said}", _WIDTH, height, body)


def _interval_row(row: Row, y: float, left: float, x_of: Callable[[float], float], unit: str) -> Markup:
    parts = [_text(left - 10, y + 4, row.label, "end", "label")]
    tip = f"{row.label}: {number(row.value)} {unit}".rstrip()
    if row.low is not None and row.high is not None:
        tip += f", 95% interval {number(row.low)} to {number(row.high)}"
        parts.append(
            Markup('<line class="bar tone{}" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(
                row.tone, _px(x_of(row.low)), _px(x_of(row.high)), y=_px(y)
            )
        )
    parts.append(
        Markup('<circle class="mark tone{}" cx="{}" cy="{}" r="5.5"><title>{}</title></circle>').format(
            row.tone, _px(x_of(row.value)), _px(y), tip
        )
    )
    parts.append(_text(x_of(row.value), y - 9, number(row.value), "middle", "value"))
    return Markup("").join(parts)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The linear map of [low, high] onto [start, end]; a single point lies in the middle."""
    if high == low:
        return lambda _: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _grid(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    x_unit: str,
) -> Markup:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for tick in y_ticks:
        kind = "axis" if tick == y_ticks[0] else "grid"
        y = _px(y_of(tick))
        line = Markup('<line class="{}" x1="{}" x2="{}" y1="{y}" y2="{y}"/>')
        parts.append(line.format(kind, _LEFT, right, y=y))
        parts.append(_text(_LEFT - 7, y_of(tick) + 3.5, number(tick), "end"))
    parts += [_text(x_of(tick), bottom + 14, number(tick), "middle") for tick in x_ticks]
    parts.append(_text((_LEFT + right) / 2, _HEIGHT - 4, x_unit, "middle"))
    return Markup("").join(parts)


def _reference(reference: Reference, y_of: Callable[[float], float]) -> Markup:
    y = y_of(reference.value)
    line = Markup('<line class="target" x1="{}" x2="{}" y1="{y}" y2="{y}"><title>{}</title></line>')
    drawn = line.format(_LEFT, _WIDTH - _RIGHT, f"{reference.label} {number(reference.value)}", y=_px(y))
    return drawn + _text(_WIDTH - _RIGHT, y - 4, reference.label, "end", "target-label")


def _line(
    series: Series, x_of: Callable[[float], float], y_of: Callable[[float], float], unit: str, x_unit: str
) -> Markup:
    points = series.points
    values = [y for _, y in points]
    # All points enter the smoothed line; only the drawing is thinned, evenly, with the last point kept.
    stride = math.ceil(len(points) / _MAX_DOTS)
    kept = [i for i in range(len(points)) if (len(points) - 1 - i) % stride == 0]
    dots = [
        Markup('<circle cx="{}" cy="{}" r="1.9"><title>{}</title></circle>').format(
            _px(x_of(points[i][0])),
            _px(y_of(points[i][1])),
            f"{series.name}, {x_unit} {number(points[i][0])}: {number(points[i][1])} {unit}".rstrip(),
        )
        for i in kept
    ]
    path = "M" + "L".join(f"{_px(x_of(points[i][0]))} {_px(y_of(smooth_at(values, i)))}" for i in kept)
    return Markup('<g class="dots tone{0}">{1}</g><path class="line tone{0}" d="{2}"/>').format(
        series.tone, Markup("").join(dots), path
    )


def _text(x: float | str, y: float, text: str, anchor: str, kind: str = "tick") -> Markup:
    where = x if isinstance(x, str) else _px(x)
    element = Markup('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>')
    return element.format(kind, where, _px(y), anchor, text)


def _svg(label: str, width: float, height: float, body: Sequence[Markup]) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        _px(width), _px(height), escape(label)
    )
    return head + Markup("").join(body) + Markup("</svg>")


def _px(value: float) -> str:
    """A coordinate with a tenth of a pixel, without trailing zeros: pages stay small."""
    return f"{value:.1f}".rstrip("0").rstrip(".")
