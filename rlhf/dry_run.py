"""`--dry-run`: read every input that is on this disk, print what would run, write nothing.

Not checked: what stands on the hub, weights, and whether the run fits into memory.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from rlhf.config import dump
from rlhf.config_schema import DatasetConfig, EvaluateStage, PipelineStage, SFTStage
from rlhf.errors import ConfigError, DataError, ModelError
from rlhf.models import bundled
from rlhf.runs import MODEL_KEYS


def describe(stage: str, cfg: Any, *, quiet: bool = False) -> None:
    """Print the resolved configuration and its inputs; check them only, if `quiet`.

    Raises:
        RlhfError: an input is missing or malformed, the run folder cannot be written, or the launcher is missing.
    """
    console = Console(highlight=False, markup=False, quiet=quiet)
    _run_dir(cfg.run_dir)
    if isinstance(cfg, PipelineStage):
        from rlhf.stages.pipeline import plan

        _launcher(cfg.launcher)
        for planned in plan(cfg):
            console.print(f"{planned.stage} -> {planned.cfg.run_dir}: {planned.state}", style="bold")
            _Inputs(planned.stage, planned.cfg, console, produced=cfg.run_dir, first_model=cfg.model).check()
        return
    console.print(f"{stage} would run with:\n{dump(cfg)}")
    _Inputs(stage, cfg, console).check()


def _run_dir(name: str) -> None:
    """Ask, without making it, whether the run folder can be made.

    Raises:
        ConfigError: it cannot.
    """
    folder = Path(name)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"run_dir {name}: {existing} is a file", fix="set run_dir to another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        fix = "check the permissions, or set run_dir to a folder of yours"
        raise ConfigError(f"run_dir {name}: {existing} cannot be written", fix=fix)


def _launcher(launcher: str) -> None:
    from rlhf.stages.pipeline import find_program

    words = shlex.split(launcher)
    if words and find_program(words[0]) is None:
        fix = "correct its first word, or install it in this environment"
        raise ConfigError(f"launcher: there is no program {words[0]!r}", fix=fix)


@dataclass
class _Inputs:
    """What one stage reads.

    `produced`: the folder that earlier stages fill; `first_model`: what their models are made from.
    """

    stage: str
    cfg: BaseModel
    console: Console
    produced: str | None = None
    first_model: str | None = None

    def check(self) -> None:
        """One line on each input.

        Raises:
            RlhfError: see `describe`.
        """
        if isinstance(self.cfg, SFTStage) and self.cfg.trainer:
            from rlhf.stages.sft import trainer_config

            trainer_config(self.cfg, has_eval=self.cfg.eval_dataset is not None)
        for key, value in self.cfg:
            if isinstance(value, DatasetConfig):
                self._dataset(key, value)
            elif key in MODEL_KEYS and isinstance(value, str):
                self._model(key, value)
            elif key in ("rollouts", "heldout_rollouts", "evaluate_dir") and isinstance(value, str):
                self._file(key, value)
            elif key == "policies":
                for name, model in value.items():
                    self._model(f"policies.{name}", model)
            elif key == "further_models":
                for model in value:
                    self._model(key, model)

    def _dataset(self, key: str, cfg: DatasetConfig) -> None:
        from rlhf.data import records
        from rlhf.data.rows import is_local

        if self._comes_later(cfg.path):
            self._say(key, f"{cfg.path} (an earlier stage writes it)")
            return
        if not is_local(cfg.path):
            self._say(key, f"hub data set {cfg.path}, split {cfg.split} (not read in a dry run)")
            return
        read = records.read_prompts
        if self.stage == "sft" or key in ("normalise_on", "ptx"):
            read = records.read_demonstrations
        elif self.stage == "reward":
            read = records.read_ratings if self.cfg.loss == "pointwise" else records.read_rankings
        found = read(cfg)
        lengths = self._prompt_lengths(cfg, found) if read is records.read_prompts else ""
        self._say(key, f"{cfg.path}, format {found.format}, {len(found)} rows{lengths}")

    def _prompt_lengths(self, data: DatasetConfig, found: Any) -> str:
        """Measure the prompts as the run does, when their tokenizer is on this disk; what to say of it."""
        cfg: Any = self.cfg
        name = cfg.policies[cfg.candidate] if isinstance(cfg, EvaluateStage) else cfg.model
        folder = _local_model(self.first_model if self.first_model and self._comes_later(name) else name)
        if folder is None:
            return f", their lengths not checked ({name} is not on this disk yet)"
        from rlhf.data.templates import check_prompt_lengths
        from rlhf.models.load import load_tokenizer

        tokenizer, most = load_tokenizer(folder), cfg.max_prompt_tokens
        check_prompt_lengths(found, tokenizer, chat=data.chat, max_tokens=most, overlong=cfg.overlong)
        return ""

    def _file(self, key: str, path: str) -> None:
        needed = Path(path) / "evaluation.json" if key == "evaluate_dir" else Path(path)
        if self._comes_later(str(needed)):
            self._say(key, f"{path} (an earlier stage writes it)")
        elif key == "evaluate_dir":
            if not needed.is_file():
                raise DataError(f"{key}: there is no {needed}", fix="run `rlhf evaluate` first, or correct the path")
            self._say(key, str(needed))
        else:
            from rlhf.rollout.buffer import RolloutBuffer

            self._say(key, f"{path}, {len(RolloutBuffer.from_parquet(path))} rollouts")

    def _model(self, key: str, name: str) -> None:
        if self._comes_later(name):
            self._say(key, f"{name} (an earlier stage writes it)")
            return
        from rlhf.models.adapters import adapter_folder, has_score_head
        from rlhf.models.load import load_config, resolve_model

        resolved, adapter = resolve_model(name, convert=False), adapter_folder(name)
        if key != "reward_model" and self.stage != "reward" and adapter and has_score_head(adapter):
            raise ModelError(f"{name} is the adapter of a reward model, not of a policy", fix="give a policy's")
        if key == "reward_model" and Path(resolved).is_dir():
            made_for = load_config(name).architectures or []
            has_head = any("SequenceClassification" in architecture for architecture in made_for)
            if not (has_head or (adapter and has_score_head(adapter))):
                raise ModelError(
                    f"{name} is no reward model: it has no trained `score` head",
                    fix="train one with `rlhf reward`, and give its folder `final` or `adapter`",
                )
        where = "found" if Path(resolved).exists() else "taken for a hub model, not fetched in a dry run"
        self._say(key, f"{name} ({where if name != bundled.NAME else resolved})")

    def _comes_later(self, path: str) -> bool:
        return self.produced is not None and Path(path).is_relative_to(self.produced) and not Path(path).exists()

    def _say(self, key: str, what: str) -> None:
        self.console.print(f"  {key}: {what}")


def _local_model(name: str) -> str | None:
    """A model whose tokenizer can be loaded without a network and without converting anything."""
    from rlhf.models.load import resolve_model

    folder = Path(resolve_model(name, convert=False))
    if name == bundled.NAME and not (folder / "tokenizer_config.json").is_file():
        return None
    return name if folder.is_dir() else None
