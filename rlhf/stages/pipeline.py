"""All stages in order, each in its own process through the same entry; what is done is skipped.

A stage is done when its folder holds a result.json that was made by the same configuration from the same inputs;
keys that change nothing that is learned (`runs.FREE_TO_CHANGE`) do not count.
Its memory goes back to the machine when its process ends, and an interruption costs at most one stage (PPO: the
steps since its last checkpoint).
"""

from __future__ import annotations

import copy
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from rlhf.config import fingerprint, validate
from rlhf.config_schema import PipelineStage
from rlhf.errors import ConfigError, StageError
from rlhf.files import atomic_write
from rlhf.runs import RESULT, RunOptions, digests, learned_fingerprint, named_data, named_models

if TYPE_CHECKING:
    from rlhf.types import RunResult

ORDER = ("sft", "sample", "label", "reward", "ppo", "evaluate", "report")


@dataclass
class Planned:
    """A stage of this pipeline: its validated configuration, what identifies it, and whether it is done."""

    stage: str
    cfg: Any
    key: str
    done: bool

    @property
    def state(self) -> str:
        return "done, skipped" if self.done else "to run"


def main(cfg: PipelineStage, options: RunOptions) -> RunResult:
    """Run what is not done yet.

    Raises:
        ConfigError: a stage's block is not valid (all blocks are checked before the first stage runs).
        StageError: a stage failed.
    """
    console = Console(highlight=False)
    began = time.perf_counter()
    checked = check(cfg)
    key, all_done = "", options.resume == "auto"
    for number, (stage, stage_cfg) in enumerate(checked.items(), 1):
        planned = identify(stage, stage_cfg, cfg, upstream=key, upstream_done=all_done)
        key, all_done = planned.key, planned.done
        head = f"[{number}/{len(ORDER)}] {stage}"
        if planned.done:
            console.print(f"{head}: done before, skipped", style="dim", markup=False)
            continue
        console.print(f"\n{head}", style="bold", markup=False)
        run_stage(planned, cfg, options)
    console.print(
        f"\npipeline finished in {time.perf_counter() - began:.0f} s: {cfg.run_dir}/report.html", markup=False
    )
    from rlhf.types import RunResult  # imports torch: not before it is needed

    return RunResult(cfg.run_dir, {})


def plan(cfg: PipelineStage) -> list[Planned]:
    """What `main` would do now."""
    planned: list[Planned] = []
    for stage, stage_cfg in check(cfg).items():
        before = planned[-1] if planned else Planned("", None, "", True)
        planned.append(identify(stage, stage_cfg, cfg, upstream=before.key, upstream_done=before.done))
    return planned


def check(cfg: PipelineStage) -> dict[str, Any]:
    """Every stage's validated configuration, inputs filled in, before anything runs.

    Raises:
        ConfigError: naming every block and its keys at fault.
    """
    checked, wrong = {}, []
    for stage, block in wire(cfg).items():
        if "run_dir" in getattr(cfg, stage):
            wrong.append(f"block {stage!r} of the pipeline: run_dir belongs to the pipeline, which names its stages'")
        try:
            checked[stage] = validate(block, stage, source=f"block {stage!r} of the pipeline")
        except ConfigError as error:
            wrong.append(error.message)
    if wrong:
        raise ConfigError("\n".join(wrong), fix="correct the blocks' keys, in the file or with stage.key=value")
    label = checked["label"]
    if label.heldout_fraction == 0 and label.heldout_rollouts is None and "eval_dataset" not in cfg.reward:
        raise ConfigError(
            "label.heldout_fraction is 0: label writes no held-out rankings, and reward would test on them",
            fix="set label.heldout_fraction > 0, or reward.eval_dataset to a file, or to null for a share of the "
            "training rankings (reward.heldout_fraction)",
        )
    return checked


def identify(stage: str, stage_cfg: Any, cfg: PipelineStage, *, upstream: str, upstream_done: bool) -> Planned:
    """A stage with the key of what it learns and of its inputs; the inputs' files are read now.

    The chain of keys carries a change of any earlier stage to all later ones, and a data file edited by hand
    (labels, for one), or new weights in a model's folder, to the stages that read it. Models of this pipeline are
    left to the chain: they must give the same key before they are made and after.
    """
    ours = Path(cfg.run_dir).resolve()
    models = {name for name in named_models(stage_cfg) if not Path(name).resolve().is_relative_to(ours)}
    inputs = digests(named_data(stage_cfg) | models, exact=False)
    key = fingerprint([upstream, stage, learned_fingerprint(stage_cfg), inputs])
    return Planned(stage, stage_cfg, key, upstream_done and _is_done(stage_dir(cfg, stage), stage, key))


def stage_dir(cfg: PipelineStage, stage: str) -> Path:
    """Where a stage writes; the report stands on top."""
    return Path(cfg.run_dir) if stage == "report" else Path(cfg.run_dir) / stage


def wire(cfg: PipelineStage) -> dict[str, dict[str, Any]]:
    """The stages' blocks, each with the outputs of earlier stages as its inputs unless it names its own."""
    folder = {stage: stage_dir(cfg, stage) for stage in ORDER}
    sft, reward, ppo = (str(folder[s] / "final") for s in ("sft", "reward", "ppo"))
    inputs: dict[str, dict[str, Any]] = {
        "sft": {"model": cfg.model},
        "sample": {"model": sft},
        "label": {"rollouts": str(folder["sample"] / "rollouts" / "samples.parquet")},
        "reward": {
            "model": sft,
            "dataset": {"path": str(folder["label"] / "rankings.train.jsonl")},
            "eval_dataset": {"path": str(folder["label"] / "rankings.heldout.jsonl")},
        },
        "ppo": {"model": sft, "reward_model": reward},
        "evaluate": {
            "policies": {"base": cfg.model, "sft": sft, "ppo": ppo},
            "reference": sft,
            "base": cfg.model,
            "reward_model": reward,
        },
        "report": {"title": cfg.title, **{f"{s}_dir": str(folder[s]) for s in ORDER if s != "report"}},
    }
    if cfg.sample.get("heldout_prompts"):
        inputs["label"]["heldout_rollouts"] = str(folder["sample"] / "rollouts" / "heldout.parquet")
    tracking = {"group": Path(cfg.run_dir).name, **cfg.tracking.model_dump(exclude_defaults=True)}
    shared = {"seed": cfg.seed, "precision": cfg.precision, "tracking": tracking}
    return {
        stage: {**shared, "run_dir": str(folder[stage]), **inputs[stage], **copy.deepcopy(getattr(cfg, stage))}
        for stage in ORDER
    }


def run_stage(planned: Planned, cfg: PipelineStage, options: RunOptions) -> None:
    """One stage in a process of its own; marks it done afterwards.

    Raises:
        StageError: it exited with another code than 0.
    """
    folder = stage_dir(cfg, planned.stage)
    _clear_if_changed(folder, planned)
    file = folder / f"{planned.stage}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(file, yaml.safe_dump(planned.cfg.model_dump(mode="json"), sort_keys=False))
    atomic_write(folder / _started(planned.stage), planned.key)
    launcher = "" if planned.stage in ("label", "report") else cfg.launcher
    program, *words = shlex.split(launcher) or [sys.executable]
    command = [
        find_program(program) or program,
        *words,
        "-m",
        "rlhf",
        planned.stage,
        str(file),
        "--resume",
        options.resume,
    ]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise StageError(
            f"stage {planned.stage} ended with exit code {code}; what was finished is kept in {cfg.run_dir}",
            fix="correct the error above and run the same command again: it goes on from here",
        )
    atomic_write(folder / _finished(planned.stage), planned.key)


def find_program(name: str) -> str | None:
    """A program on the path, or of the environment that this runs in, activated or not."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _started(stage: str) -> str:
    return f".{stage}.started"


def _finished(stage: str) -> str:
    return f".{stage}.done"


def _is_done(folder: Path, stage: str, key: str) -> bool:
    file = folder / _finished(stage)
    if not (file.is_file() and file.read_text() == key and (folder / RESULT).is_file()):
        return False
    outputs = json.loads((folder / RESULT).read_text())["outputs"]
    return all(Path(path).exists() for path in outputs.values() if Path(path).is_relative_to(folder))


def _clear_if_changed(folder: Path, planned: Planned) -> None:
    """Move a folder made with another configuration aside: its checkpoints must not be resumed, nor be lost."""
    marker = folder / _started(planned.stage)
    (folder / _finished(planned.stage)).unlink(missing_ok=True)
    if planned.stage == "report" or not marker.is_file() or marker.read_text() == planned.key:
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)
