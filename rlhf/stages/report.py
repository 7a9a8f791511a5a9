"""The last stage: one page for people and one JSON file for programs, from what the other stages left.

Reads `evaluation.json`, and `metrics.jsonl`, `result.json`, `labels_report.json`, `config.yaml` where they
exist. Needs no model and no accelerator; rendering again after a change of words costs a second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.config_schema import ReportStage
from rlhf.types import RunResult


def main(cfg: ReportStage, ctx: Any = None) -> RunResult:
    """Write `report.html` and `summary.json` into `cfg.run_dir`, each whole or not at all.

    Args:
        cfg: the stage's configuration.
        ctx: unused; there is no device and nothing to resume.

    Raises:
        DataError: evaluation.json is missing, or an input is malformed; nothing is written then.
    """
    from rlhf.eval.report import build_summary, render_report
    from rlhf.files import atomic_write

    summary, page = build_summary(cfg), render_report(cfg)
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    outputs = {"summary": str(folder / "summary.json"), "report": str(folder / "report.html")}
    atomic_write(outputs["summary"], json.dumps(summary, indent=2, allow_nan=False) + "\n")
    atomic_write(outputs["report"], page)
    _print(cfg.title, summary, outputs["report"])
    return RunResult(cfg.run_dir, summary, outputs)


def _print(title: str, summary: dict[str, Any], path: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rlhf.eval.pages import clean
    from rlhf.eval.panels import METRICS, duration
    from rlhf.eval.run_files import display_name

    policy = summary["policy"]
    names = [name for name, value in policy.items() if isinstance(value, dict) and name != "comparisons"]
    table = Table(title=escape(clean(title)))
    table.add_column("metric")
    for name in names:
        table.add_column(escape(clean(display_name(name))), justify="right")
    for metric in METRICS:
        values = [policy[name].get(metric.key) for name in names]
        if any(value is not None for value in values):
            table.add_row(metric.label, *map(metric.show, values))
    console = Console()
    console.print(table)
    if policy["win_rate"] is not None:
        low, high = policy["win_rate_interval"]
        span = "" if low is None or high is None else f", 95% interval {low:.0%} to {high:.0%}"
        pair = clean(f"{policy['candidate']} against {policy['baseline']}")
        console.print(f"win rate of {pair}: {policy['win_rate']:.0%}{span}", markup=False)
    for warning in summary["warnings"]:
        console.print(f"look at: {warning}", markup=False)
    took = duration(summary["wall_s"])
    console.print(f"report after {took} of stages: {path}", markup=False, soft_wrap=True)
