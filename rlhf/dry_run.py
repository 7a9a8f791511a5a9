"""`--dry-run`: read every input that exists, print what would run, write nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from rlhf.config import dump, resolve_path
from rlhf.config_schema import DatasetConfig, PipelineStage
from rlhf.models import bundled

MODEL_KEYS = {"model", "reference", "reward_model", "base"}


def describe(stage: str, cfg: Any) -> None:
    """Print the resolved configuration and its inputs.

    Raises:
        RlhfError: an input is missing or malformed.
    """
    console = Console(highlight=False)
    if isinstance(cfg, PipelineStage):
        from rlhf.stages.pipeline import plan

        for planned in plan(cfg):
            console.print(f"[bold]{planned.stage}[/bold] -> {planned.cfg.run_dir}: {planned.state}")
            _inputs(planned.stage, planned.cfg, console, produced=cfg.run_dir)
        return
    console.print(f"[bold]{stage}[/bold] would run with:\n{dump(cfg)}", markup=True)
    _inputs(stage, cfg, console, produced=None)


def _inputs(stage: str, cfg: BaseModel, console: Console, *, produced: str | None) -> None:
    for key, value in cfg:
        if isinstance(value, DatasetConfig):
            _dataset(stage, key, value, console, produced)
        elif key in MODEL_KEYS and isinstance(value, str):
            _model(key, value, console, produced)
        elif key == "policies":
            for name, model in value.items():
                _model(f"policies.{name}", model, console, produced)


def _dataset(stage: str, key: str, cfg: DatasetConfig, console: Console, produced: str | None) -> None:
    from rlhf.data import records

    if _comes_later(cfg.path, produced):
        console.print(f"  {key}: {cfg.path} (an earlier stage writes it)")
        return
    if not Path(resolve_path(cfg.path)).exists() and cfg.path.count("/") == 1 and not cfg.path.startswith("."):
        console.print(f"  {key}: hub data set {cfg.path}, split {cfg.split} (not read in a dry run)")
        return
    read = records.read_prompts
    if stage == "sft" or key in ("normalise_on", "ptx"):
        read = records.read_demonstrations
    elif stage == "reward":
        read = records.read_rankings
    console.print(f"  {key}: {cfg.path}, {len(read(cfg))} rows")


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
