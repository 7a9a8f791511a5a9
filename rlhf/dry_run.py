"""`--dry-run`: read every input that exists, print what would run, write nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from rlhf.config import dump
from rlhf.config_schema import DatasetConfig, PipelineStage
from rlhf.errors import DataError
from rlhf.models import bundled

MODEL_KEYS = {"model", "reference", "reward_model", "base"}


def describe(stage: str, cfg: Any) -> None:
    """Print the resolved configuration and its inputs.

    Raises:
        RlhfError: an input is missing or malformed.
    """
    console = Console(highlight=False, markup=False)
    if isinstance(cfg, PipelineStage):
        from rlhf.stages.pipeline import plan

        for planned in plan(cfg):
            console.print(f"{planned.stage} -> {planned.cfg.run_dir}: {planned.state}", style="bold")
            _inputs(planned.stage, planned.cfg, console, produced=cfg.run_dir)
        return
    console.print(f"{stage} would run with:\n{dump(cfg)}")
    _inputs(stage, cfg, console, produced=None)


def _inputs(stage: str, cfg: BaseModel, console: Console, *, produced: str | None) -> None:
    for key, value in cfg:
        if isinstance(value, DatasetConfig):
            _dataset(stage, key, value, console, produced)
        elif key in MODEL_KEYS and isinstance(value, str):
            _model(key, value, console, produced)
        elif key in ("rollouts", "evaluate_dir"):
            _file(key, value, console, produced)
        elif key == "policies":
            for name, model in value.items():
                _model(f"policies.{name}", model, console, produced)


def _dataset(stage: str, key: str, cfg: DatasetConfig, console: Console, produced: str | None) -> None:
    from rlhf.data import records
    from rlhf.data.rows import is_local

    if _comes_later(cfg.path, produced):
        console.print(f"  {key}: {cfg.path} (an earlier stage writes it)")
        return
    if not is_local(cfg.path):
        console.print(f"  {key}: hub data set {cfg.path}, split {cfg.split} (not read in a dry run)")
        return
    read = records.read_prompts
    if stage == "sft" or key in ("normalise_on", "ptx"):
        read = records.read_demonstrations
    elif stage == "reward":
        read = records.read_rankings
    found = read(cfg)
    console.print(f"  {key}: {cfg.path}, format {found.format}, {len(found)} rows")


def _file(key: str, path: str, console: Console, produced: str | None) -> None:
    if _comes_later(path, produced):
        console.print(f"  {key}: {path} (an earlier stage writes it)")
        return
    needed = Path(path) / "evaluation.json" if key == "evaluate_dir" else Path(path)
    if not needed.is_file():
        stage = "evaluate" if key == "evaluate_dir" else "sample"
        raise DataError(f"{key}: there is no {needed}", fix=f"run `rlhf {stage}` first, or correct the path")
    console.print(f"  {key}: {needed}")


def _model(key: str, name: str, console: Console, produced: str | None) -> None:
    if _comes_later(name, produced):
        console.print(f"  {key}: {name} (an earlier stage writes it)")
        return
    from rlhf.models.load import resolve_model

    resolved = resolve_model(name, convert=False)
    where = "found" if Path(resolved).exists() else "hub model, not fetched in a dry run"
    console.print(f"  {key}: {name} ({where if name != bundled.NAME else resolved})")


def _comes_later(path: str, produced: str | None) -> bool:
    return produced is not None and Path(path).is_relative_to(produced) and not Path(path).exists()
