"""`summary.json` and the one-page `report.html`: numbers for programs, and the same numbers for people.

`build_summary` and `render_report` are functions of the files on disk alone: no clock, no network, so the
same run gives the same page. The page needs no script and loads nothing; its content security policy forbids
both, because the texts in it come from a model. Everything is escaped by jinja2 or markupsafe, and control
characters are shown as U+FFFD.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from rlhf.config_schema import ReportStage
from rlhf.errors import DataError
from rlhf.eval import charts
from rlhf.eval.health import health_notes
from rlhf.eval.pages import clean, inline_code, page_environment
from rlhf.eval.panels import CHARTS, DASH, METRICS, Metric, duration, show_fixed, show_number, show_percent
from rlhf.eval.rounds import gold_chart, round_rows
from rlhf.eval.run_files import RunFiles, display_name, finite, read_run

MAX_PROMPTS = 10
_TEMPLATES = Path(__file__).resolve().parent / "templates"
_HEADLINE_KEYS = (
    "candidate",
    "baseline",
    "kl",
    "kl_interval",
    "kl_target",
    "win_rate",
    "win_rate_interval",
    "comparisons",
)
_GRADE_BANDS = ((6.5, "easy"), (9.5, "fair"), (12.5, "hard"))  # upper bounds in US school years


def build_summary(cfg: ReportStage) -> dict[str, Any]:
    """The content of summary.json; see `summarise`.

    Raises:
        DataError: evaluation.json is missing, or an input is malformed.
    """
    return summarise(read_run(cfg), seed=cfg.seed)


def summarise(run: RunFiles, *, seed: int) -> dict[str, Any]:
    """Headline numbers of a run; missing ones are None, none is NaN.

    Times are in seconds, memory in 1e9 bytes, KL in nats per answer, shares in [0, 1]. `wall_s` is the sum
    over stages, `peak_rss_gb` the largest of them. `labels` is "simulated", "judge" or "people"; None without labels.

    Raises:
        DataError: a policy has the name of a headline key, or its metrics are no object.
    """
    results = [run.results[stage] for stage in run.dirs]
    walls = [wall for result in results if (wall := finite(result.get("wall_s"))) is not None]
    peaks = [peak for result in results if (peak := finite(result.get("peak_rss_gb"))) is not None]
    reward = run.results.get("reward", {}).get("summary") or {}
    keys = ("accuracy", "accuracy_low", "accuracy_high", "pairs", "length_correlation", "mean", "std")
    return {
        "seed": (run.results.get("ppo") or {}).get("seed", seed),
        "labels": None if run.labels is None else run.labels.get("labels", "people"),
        "wall_s": round(sum(walls), 2) if walls else None,
        "peak_rss_gb": max(peaks, default=None),
        "stages": {stage: _costs(run.results[stage]) for stage in run.dirs},
        "reward_model": {key: _plain(reward.get(key)) for key in keys},
        "policy": _policy_summary(run),
        **({"rounds": round_rows(run)} if run.rounds > 1 else {}),
        "warnings": [note.alarm for note in health_notes(run) if not note.ok],
    }


def _costs(result: dict[str, Any]) -> dict[str, float | None]:
    return {key: finite(result.get(key)) for key in ("wall_s", "peak_rss_gb")}


def _policy_summary(run: RunFiles) -> dict[str, Any]:
    taken = sorted(set(_HEADLINE_KEYS) & set(run.policies))
    if taken:
        raise DataError(
            f"a policy is named {taken[0]!r}, which is a key of summary.json",
            fix="rename it under `policies` of the evaluate stage",
        )
    for name, metrics in run.policies.items():
        if not isinstance(metrics, dict):
            raise DataError(f"evaluation.json: policy {name!r} is no object", fix="run evaluate again")
    candidate, win = run.policies[run.candidate], run.evaluation.get("win_rate") or {}
    return {
        "candidate": run.candidate,
        "baseline": run.baseline,
        "kl": finite(candidate.get("kl")),
        "kl_interval": _plain(candidate.get("kl_interval")),
        "kl_target": run.kl_target,
        "win_rate": finite(win.get("value")),
        "win_rate_interval": [finite(win.get("low")), finite(win.get("high"))] if win else None,
        "comparisons": {key: win.get(key) for key in ("wins", "ties", "losses", "n")} if win else None,
        **{name: _plain(metrics) for name, metrics in run.policies.items()},
    }


def _plain(value: Any) -> Any:
    """The same JSON without NaN and infinities, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and finite(value) is None else value


def render_report(cfg: ReportStage) -> str:
    """The whole page as HTML.

    Raises:
        DataError: evaluation.json is missing, or an input is malformed.
    """
    run = read_run(cfg)
    summary = summarise(run, seed=cfg.seed)
    rounds = round_rows(run)
    page = (
        template_environment()
        .get_template("report.html.j2")
        .render(
            title=cfg.title,
            summary=summary,
            summary_json=json.dumps(summary, indent=2, ensure_ascii=False),
            verdict=verdict(run, summary),
            labels=run.labels,
            label_dir=str(run.dirs.get("label", "")),
            rows=_metric_rows(run),
            policies=list(run.policies),
            tones=_tones(run),
            grades=_grade_chart(run),
            rounds=rounds,
            gold_by_kl=gold_chart(rounds),
            notes=health_notes(run),
            remarks=run.evaluation.get("notes") or [],
            samples=(run.evaluation.get("samples") or [])[:MAX_PROMPTS],
            panels={stage: _panels(run, stage) for stage in ("ppo", "sft", "reward")},
            stages=_stage_rows(run, summary),
            environment=run.environment,
            commands=_commands(run),
        )
    )
    # Names and messages from files go through autoescape but not through `clean`; one pass covers them too.
    return clean(page)


def template_environment() -> Environment:
    """For pages whose numbers are shown as the report shows them."""
    env = page_environment(_TEMPLATES)
    env.filters.update(number=show_number, fixed=show_fixed, percent=show_percent, duration=duration)
    env.filters.update(name=display_name, band=_band, code=inline_code)
    return env


def verdict(run: RunFiles, summary: dict[str, Any]) -> dict[str, str]:
    """What came out, as a judgement (`tone`: good, even, bad or none) and one sentence with the numbers."""
    policy, after, before = summary["policy"], run.candidate, run.baseline
    a, b = display_name(after), display_name(before)
    first = next(iter(run.policies))
    grade, start = finite(policy[after].get("grade")), finite(policy[first].get("grade"))
    parts = []
    if grade is not None:
        was = "" if start is None or first == after else f" ({display_name(first)}: {show_fixed(start, 1)})"
        parts.append(f"{a} answers read at grade {show_fixed(grade, 1)}{was}")
    win, (low, high) = policy["win_rate"], policy["win_rate_interval"] or (None, None)
    if win is not None:
        span = "" if low is None or high is None else f" [{100 * low:.0f}{DASH}{show_percent(high)}]"
        parts.append(f"{'and' if parts else a} won {show_percent(win)}{span} of comparisons with {b}")
    sentence = " ".join(parts) or f"{a} was evaluated"
    if policy["kl"] is not None:
        sentence += f", at {show_fixed(policy['kl'], 1)} nats of KL from the reference"
    if low is None or high is None:
        return {"tone": "none", "headline": f"{a} beside {b}", "sentence": f"{sentence}."}
    if low > 0.5:
        return {"tone": "good", "headline": f"{a} beats {b}.", "sentence": f"{sentence}."}
    if high < 0.5:
        return {"tone": "bad", "headline": f"{a} loses to {b}.", "sentence": f"{sentence}."}
    return {"tone": "even", "headline": f"{a} and {b} cannot be told apart.", "sentence": f"{sentence}."}


def _metric_rows(run: RunFiles) -> list[dict[str, Any]]:
    """The table: one row per metric that any policy has, the best value marked where a direction is good."""
    rows = []
    for metric in METRICS:
        known = [v for m in run.policies.values() if (v := finite(m.get(metric.key))) is not None]
        if not known:
            continue
        best = None
        if metric.better and len(set(known)) > 1:
            best = max(known) if metric.better == "up" else min(known)
        cells = [_cell(metric, run.policies[name], best) for name in run.policies]
        rows.append({"metric": metric, "cells": cells})
    return rows


def _cell(metric: Metric, measured: dict[str, Any], best: float | None) -> dict[str, Any]:
    value, (low, high) = finite(measured.get(metric.key)), _interval(measured, metric.key)
    known = low is not None and high is not None and low < high
    span = f"{metric.show(low)} {DASH} {metric.show(high)}" if known else ""
    return {"text": metric.show(value), "span": span, "best": value is not None and value == best}


def _interval(metrics: dict[str, Any], key: str) -> tuple[float | None, float | None]:
    pair = metrics.get(f"{key}_interval")
    return (finite(pair[0]), finite(pair[1])) if isinstance(pair, list) and len(pair) == 2 else (None, None)


def _tones(run: RunFiles) -> dict[str, int]:
    """Colours: the candidate 1, the baseline 2, every other policy 3."""
    return {name: 1 if name == run.candidate else 2 if name == run.baseline else 3 for name in run.policies}


def _grade_chart(run: RunFiles) -> Markup:
    tones, rows = _tones(run), []
    for name, metrics in run.policies.items():
        value = finite(metrics.get("grade"))
        if value is not None:
            rows.append(charts.Row(display_name(name), value, *_interval(metrics, "grade"), tone=tones[name]))
    return charts.interval_chart(rows, title="Reading grade", unit="US school years, lower is plainer")


def _panels(run: RunFiles, stage: str) -> list[dict[str, Any]]:
    """The stage's charts; a chart none of whose series was recorded is left out."""
    panels = []
    for chart in (c for c in CHARTS if c.stage == stage):
        series = [
            charts.Series(name, points, tone)
            for tone, (key, name) in enumerate(chart.series, start=1)
            if (points := run.series(stage, key))
        ]
        reference = chart.reference
        if chart.series[0][0] == "objective/kl" and run.kl_target is not None:
            reference = charts.Reference(run.kl_target, "target")
        if series:
            look = {"title": chart.title, "unit": chart.unit, "floor": chart.floor}
            svg = charts.line_chart(series, reference=reference, **look)
            ends = [{"series": s, "end": charts.smoothed_last(s.points)} for s in series]
            panels.append({"chart": chart, "svg": svg, "ends": ends})
    return panels


def _stage_rows(run: RunFiles, summary: dict[str, Any]) -> list[dict[str, Any]]:
    total = summary["wall_s"] or 0.0
    rows = []
    for stage in run.dirs:
        numbers = summary["stages"][stage]
        share = numbers["wall_s"] / total if numbers["wall_s"] and total else 0.0
        fingerprint = str(run.results[stage].get("config_sha256") or "")[:12]
        rows.append({"stage": stage, "share": share, "config": fingerprint, **numbers})
    return rows


def _commands(run: RunFiles) -> list[str]:
    """One shell line per stage whose configuration was kept."""
    configs = [(stage.split()[0], path / "config.yaml") for stage, path in run.dirs.items()]
    return [f"python -m rlhf {stage} {shlex.quote(str(path))}" for stage, path in configs if path.is_file()]


def _band(grade: Any) -> str:
    known = finite(grade)
    if known is None:
        return "none"
    return next((band for top, band in _GRADE_BANDS if known <= top), "very-hard")
