"""Reads what the other stages left in their run directories; everything but the evaluation may be missing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import read_yaml
from rlhf.config_schema import ReportStage
from rlhf.errors import DataError
from rlhf.eval.charts import Point

STAGE_ORDER = ("sft", "sample", "label", "reward", "ppo", "evaluate")
ROUND_STAGES = STAGE_ORDER[1:5]


@dataclass
class Metrics:
    """The series of one metrics.jsonl: finite points by step, and how many values were not finite."""

    series: dict[str, list[Point]] = field(default_factory=dict)
    not_finite: dict[str, int] = field(default_factory=dict)


@dataclass
class RunFiles:
    """All inputs of the report. Dictionaries by stage are empty where a file is missing.

    Of a run in rounds the stages' own names are the last round's; before them stand those of the others: `ppo 1`.
    """

    evaluation: dict[str, Any]
    dirs: dict[str, Path]
    results: dict[str, dict[str, Any]]
    metrics: dict[str, Metrics]
    environment: dict[str, Any]
    labels: dict[str, Any] | None
    ppo_config: dict[str, Any]
    ppo_health: dict[str, Any] | None
    candidate: str
    baseline: str
    rounds: int = 1

    @property
    def policies(self) -> dict[str, dict[str, Any]]:
        return self.evaluation["policies"]

    @property
    def kl_target(self) -> float | None:
        return kl_target_of(self.ppo_config)

    def series(self, stage: str, name: str) -> list[Point]:
        return self.metrics.get(stage, Metrics()).series.get(name, [])

    def rows(self, stage: str) -> list[dict[str, float]]:
        """The finite metrics of each step, with `step`, in order."""
        by_step: dict[float, dict[str, float]] = {}
        for name, points in self.metrics.get(stage, Metrics()).series.items():
            for step, value in points:
                by_step.setdefault(step, {"step": int(step)})[name] = value
        return [by_step[step] for step in sorted(by_step)]


def finite(value: Any) -> float | None:
    """The value as a float when it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def kl_target_of(config: Mapping[str, Any]) -> float | None:
    """Of a PPO configuration, in nats per answer; None with a fixed coefficient, which aims at no KL."""
    kl = config.get("kl") or {}
    return finite(kl.get("target")) if kl.get("kind", "adaptive") == "adaptive" else None


def display_name(policy: str) -> str:
    """`sft` and `ppo` are abbreviations, other names are words."""
    abbreviation = policy.lower() in {"sft", "ppo", "dpo", "rlhf"}
    return policy.upper() if abbreviation else policy[:1].upper() + policy[1:]


def read_run(cfg: ReportStage) -> RunFiles:
    """Everything the report needs.

    Raises:
        DataError: evaluation.json is missing or malformed, or another file is malformed.
    """
    dirs = _dirs(cfg)
    evaluation = _read_evaluation(dirs["evaluate"])
    labels = _read_json(dirs["label"] / "labels_report.json") if "label" in dirs else None
    config = dirs["ppo"] / "config.yaml" if "ppo" in dirs else None
    candidate, baseline = _roles(evaluation)
    return RunFiles(
        evaluation=evaluation,
        dirs=dirs,
        results={stage: _read_json(path / "result.json") or {} for stage, path in dirs.items()},
        metrics={stage: read_metrics(path / "metrics.jsonl") for stage, path in dirs.items()},
        environment=_environment(dirs),
        labels=labels,
        ppo_config=read_yaml(config) if config and config.is_file() else {},
        ppo_health=_read_json(dirs["ppo"] / "health.json") if "ppo" in dirs else None,
        candidate=candidate,
        baseline=baseline,
        rounds=max(1, len(cfg.round_dirs)),
    )


def _dirs(cfg: ReportStage) -> dict[str, Path]:
    """Stage -> folder, in the order in which they ran."""
    found = {stage: Path(path) for stage in STAGE_ORDER if (path := getattr(cfg, f"{stage}_dir", None))}
    earlier = {
        f"{stage} {number}": Path(folder) / stage
        for number, folder in enumerate(cfg.round_dirs[:-1], 1)
        for stage in ROUND_STAGES
    }
    first = {stage: found.pop(stage) for stage in ("sft",) if stage in found}
    return {**first, **earlier, **found}


def read_metrics(path: Path) -> Metrics:
    """The series of a metrics.jsonl; a missing file is an empty one.

    A step that was logged twice (a resumed run) counts once, with its last values. A torn last line, which a
    killed run leaves, is skipped.

    Raises:
        DataError: a line before the last is not a JSON object.
    """
    metrics = Metrics()
    if not path.is_file():
        return metrics
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    table: dict[str, dict[float, float | None]] = {}
    for i, line in enumerate(lines):
        row = _metrics_row(line, path, i, is_last=i == len(lines) - 1)
        step = finite(row.pop("step", i))
        for name, value in row.items():
            if step is not None and (value is None or isinstance(value, int | float)):
                table.setdefault(name, {})[step] = finite(value)
    for name, by_step in table.items():
        metrics.series[name] = sorted((s, v) for s, v in by_step.items() if v is not None)
        metrics.not_finite[name] = sum(v is None for v in by_step.values())
    return metrics


def _metrics_row(line: str, path: Path, index: int, *, is_last: bool) -> dict[str, Any]:
    if not line.strip():
        return {}
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        if is_last:
            return {}
        raise DataError(f"{path}:{index + 1}: not JSON ({error.msg})", fix="remove this line") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}:{index + 1}: {type(row).__name__}, not an object", fix="remove this line")
    return row


def _read_evaluation(folder: Path) -> dict[str, Any]:
    path = folder / "evaluation.json"
    evaluation = _read_json(path)
    if evaluation is None:
        raise DataError(
            f"{path} does not exist: the report has no policies to show",
            fix=f"make it with `python -m rlhf evaluate CONFIG run_dir={folder}`, or correct evaluate_dir",
        )
    policies = evaluation.get("policies")
    if not isinstance(policies, dict) or not policies:
        raise DataError(f"{path} has no policies", fix="run `python -m rlhf evaluate CONFIG` again")
    return evaluation


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}", fix="run the stage that wrote it again") from None
    if not isinstance(data, dict):
        raise DataError(f"{path} holds {type(data).__name__}, not an object", fix="run its stage again")
    return data


def _environment(dirs: dict[str, Path]) -> dict[str, Any]:
    """Versions and machine of the run: those that PPO recorded, else those of the latest stage."""
    for stage in ("ppo", *reversed(STAGE_ORDER)):
        if stage in dirs and (found := _read_json(dirs[stage] / "environment.json")):
            return found
    return {}


def _roles(evaluation: dict[str, Any]) -> tuple[str, str]:
    """Candidate and baseline: those of the win rate, else ppo and sft, else the last and the first policy."""
    names, win = list(evaluation["policies"]), evaluation.get("win_rate") or {}
    candidate = win.get("candidate", "ppo")
    baseline = win.get("baseline", "sft")
    return (candidate if candidate in names else names[-1], baseline if baseline in names else names[0])
