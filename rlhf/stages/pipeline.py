"""All stages in order, each in its own process through the same entry; what is done is skipped.

A stage is done when its folder holds a result.json that was made by the same configuration from the same inputs;
keys that change nothing that is learned (`runs.FREE_TO_CHANGE`) do not count.
Its memory goes back to the machine when its process ends, and an interruption costs at most one stage (PPO: the
steps since its last checkpoint).

With `rounds: N` the policy that PPO has reached is sampled and labeled again, N - 1 times. Decided, and why:
    - Its answers are sampled anew, not taken from PPO's archive: that holds one answer per prompt and pass, so that
      often there is nothing to compare, and none of the held-out prompts. Half of them (none, of an odd number) come
      from the policy of the round before: answers of one policy differ little, and the direction of PPO is what is to
      be judged.
    - The reward model is trained anew from the SFT policy on the labels of all rounds: one that went on would have
      seen the old labels more often than the new ones, and hydra could not share its trunk.
    - PPO goes on with its policy and its critic, which knows the values along the way; the optimizer's moments and
      the KL coefficient begin anew. The reference is the SFT policy in all rounds.
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
from rlhf.config_schema import PipelineStage, SampleStage
from rlhf.errors import ConfigError, LabelsPending, StageError
from rlhf.files import atomic_write
from rlhf.runs import (
    HELDOUT_RANKINGS,
    RANKINGS,
    RESULT,
    RunOptions,
    digests,
    learned_fingerprint,
    named_data,
    named_models,
)

if TYPE_CHECKING:
    from rlhf.types import RunResult

ORDER = ("sft", "sample", "label", "reward", "ppo", "evaluate", "report")
ROUND = ORDER[1:5]
"""The stages of a further round."""

K = "completions_per_prompt"

WIRED = {"sample": ("model",), "label": ("rollouts", "heldout_rollouts"), "reward": ("dataset",)}
WIRED |= {"ppo": ("model", "reward_model", "critic")}
"""Keys that lead from one round to the next, and so must be left to the pipeline."""


@dataclass
class Planned:
    """A stage of this pipeline: its validated configuration, what identifies it, and whether it is done.

    `name` is the stage, with a further round's folder before it: round_2/ppo.
    """

    name: str
    cfg: Any
    key: str
    done: bool

    @property
    def stage(self) -> str:
        return stage_of(self.name)

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
    for number, (name, stage_cfg) in enumerate(checked.items(), 1):
        planned = identify(name, stage_cfg, cfg, upstream=key, upstream_done=all_done)
        key, all_done = planned.key, planned.done
        head = f"[{number}/{len(checked)}] {name}"
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
    for name, stage_cfg in check(cfg).items():
        before = planned[-1] if planned else Planned("", None, "", True)
        planned.append(identify(name, stage_cfg, cfg, upstream=before.key, upstream_done=before.done))
    return planned


def stage_of(name: str) -> str:
    """round_2/ppo -> ppo."""
    return name.rpartition("/")[2]


def in_round(stage: str, number: int) -> str:
    """A stage's name; the first round's have none of their own."""
    return stage if number == 1 else f"round_{number}/{stage}"


def check(cfg: PipelineStage) -> dict[str, Any]:
    """Every stage's validated configuration by its name, inputs filled in, before anything runs.

    Raises:
        ConfigError: naming every block and its keys at fault.
    """
    checked: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for name, block in wire(cfg).items():
        stage = stage_of(name)
        if stage in wrong:  # of a block that is wrong in all rounds, the first one says it
            continue
        place, _, _ = name.rpartition("/")
        source = f"block {stage!r} of the pipeline{place and ', ' + place}"
        try:
            _refuse_taken(cfg, name, source)
            checked[name] = validate(block, stage, source=source)
            if stage == "ppo":
                _refuse_aggregate(checked[name], checked.get(name.removesuffix("ppo") + "reward"), source)
        except ConfigError as error:
            wrong[stage] = error.message
    if wrong:
        fix = "correct the blocks' keys, in the file or with stage.key=value"
        raise ConfigError("\n".join(wrong.values()), fix=fix)
    labels = [found for name, found in checked.items() if stage_of(name) == "label"]
    if not all(label.heldout_fraction or label.heldout_rollouts for label in labels) and (
        "eval_dataset" not in cfg.reward
    ):
        raise ConfigError(
            "label.heldout_fraction is 0: label writes no held-out rankings, and reward would test on them",
            fix="set label.heldout_fraction > 0, or reward.eval_dataset to a file, or to null for a share of the "
            "training rankings (reward.heldout_fraction)",
        )
    return checked


def _refuse_taken(cfg: PipelineStage, name: str, source: str) -> None:
    """Keys that belong to the pipeline.

    Raises:
        ConfigError: the block has one.
    """
    stage = stage_of(name)
    given = getattr(cfg, stage).keys() | _later(cfg, stage).keys()
    if "run_dir" in given:
        raise ConfigError(f"{source}: run_dir belongs to the pipeline, which names its stages'")
    taken = [key for key in WIRED.get(stage, ()) if key in given]
    if taken and cfg.rounds > 1:
        raise ConfigError(f"{source}: {taken[0]} leads from round to round, so with rounds > 1 it must not be set")


def _refuse_aggregate(ppo: Any, reward: Any, source: str) -> None:
    """Now, and not when all before PPO has run.

    Raises:
        ConfigError: an aggregate of several models for the single one that the pipeline trains.
    """
    given = [key for key in ("reward_aggregate", "reward_std_coef") if getattr(ppo, key) is not None]
    if reward is None or ppo.reward_model != str(Path(reward.run_dir) / "final"):
        return
    if given and reward.ensemble is None:
        raise ConfigError(f"{source}: {given[0]} is for an ensemble; set reward.ensemble, or remove it")


def identify(name: str, stage_cfg: Any, cfg: PipelineStage, *, upstream: str, upstream_done: bool) -> Planned:
    """A stage with the key of what it learns and of its inputs; the inputs' files are read now.

    The chain of keys carries a change of any earlier stage to all later ones, and a data file edited by hand
    (labels, for one), or new weights in a model's folder, to the stages that read it. Models of this pipeline are
    left to the chain: they must give the same key before they are made and after.
    """
    ours, stage = Path(cfg.run_dir).resolve(), stage_of(name)
    models = {model for model in named_models(stage_cfg) if not Path(model).resolve().is_relative_to(ours)}
    inputs = digests(named_data(stage_cfg) | models, exact=False)
    key = fingerprint([upstream, stage, learned_fingerprint(stage_cfg), inputs])
    return Planned(name, stage_cfg, key, upstream_done and _is_done(stage_dir(cfg, name), stage, key))


def stage_dir(cfg: PipelineStage, name: str) -> Path:
    """Where a stage writes; the report stands on top."""
    return Path(cfg.run_dir) if name == "report" else Path(cfg.run_dir) / name


def wire(cfg: PipelineStage) -> dict[str, dict[str, Any]]:
    """The stages' blocks in their order, each with the outputs of earlier stages as its inputs unless it names its
    own."""
    tracking = {"group": Path(cfg.run_dir).name, **cfg.tracking.model_dump(exclude_defaults=True)}
    shared = {"precision": cfg.precision, "tracking": tracking}
    rounds = range(1, cfg.rounds + 1)
    stages = [("sft", 1), *((stage, number) for number in rounds for stage in ROUND), ("evaluate", 1), ("report", 1)]
    blocks = {}
    for stage, number in stages:
        name = in_round(stage, number)
        inputs = _round_inputs(cfg, number) if stage in ROUND else _outer_inputs(cfg)
        own = {"seed": (cfg.seed + 1_000_003 * (number - 1)) % 2**32, "run_dir": str(stage_dir(cfg, name))}
        blocks[name] = {**shared, **own, **inputs[stage], **_given(cfg, stage, number)}
    return blocks


def _given(cfg: PipelineStage, stage: str, number: int) -> dict[str, Any]:
    """What the file says of a stage in a round."""
    given = copy.deepcopy(getattr(cfg, stage))
    if number == 1:
        return given
    given.pop("further_models", None)  # those of the first round; a later one has the policy before
    return _merged(given, copy.deepcopy(_later(cfg, stage)))


def _later(cfg: PipelineStage, stage: str) -> dict[str, Any]:
    return next((block for name, block in cfg.later_rounds.items() if name == stage), {})


def _merged(given: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """`others` over `given`, block by block."""
    both = {
        key: _merged(given[key], value)
        for key, value in others.items()
        if isinstance(value, dict) and isinstance(given.get(key), dict)
    }
    return {**given, **others, **both}


def _round_inputs(cfg: PipelineStage, number: int) -> dict[str, dict[str, Any]]:
    """What the stages of a round read."""
    here = {stage: stage_dir(cfg, in_round(stage, number)) for stage in ROUND}
    sft = str(stage_dir(cfg, "sft") / "final")
    inputs: dict[str, dict[str, Any]] = {
        "sample": {"model": sft},
        "label": {"rollouts": str(here["sample"] / "rollouts" / "samples.parquet")},
        "reward": {
            "model": sft,
            "dataset": {"path": str(here["label"] / RANKINGS)},
            "eval_dataset": {"path": str(here["label"] / HELDOUT_RANKINGS)},
        },
        "ppo": {"model": sft, "reward_model": str(here["reward"] / "final")},
    }
    if cfg.sample.get("heldout_prompts"):
        inputs["label"]["heldout_rollouts"] = str(here["sample"] / "rollouts" / "heldout.parquet")
    if number > 1:
        before = {stage: stage_dir(cfg, in_round(stage, number - 1)) for stage in ROUND}
        policy = str(before["ppo"] / "final")
        one_before = sft if number == 2 else str(stage_dir(cfg, in_round("ppo", number - 2)) / "final")
        count = _given(cfg, "sample", number).get(K, SampleStage.model_fields[K].default)
        halves = isinstance(count, int) and count % 2 == 0
        inputs["sample"] = {"model": policy, "further_models": [one_before] if halves else []}
        inputs["label"]["earlier"] = str(before["label"])
        inputs["ppo"] |= {"model": policy, "reference": sft, "critic": str(before["ppo"] / "critic")}
    return inputs


def _outer_inputs(cfg: PipelineStage) -> dict[str, dict[str, Any]]:
    """What the stages before and after the rounds read."""
    sft = str(stage_dir(cfg, "sft") / "final")
    last = {stage: stage_dir(cfg, in_round(stage, cfg.rounds)) for stage in ROUND}
    reached = {
        f"round {number}": str(stage_dir(cfg, in_round("ppo", number)) / "final") for number in range(1, cfg.rounds)
    }
    folders: dict[str, Any] = {f"{s}_dir": str(last.get(s) or stage_dir(cfg, s)) for s in ORDER if s != "report"}
    if cfg.rounds > 1:
        numbers = range(1, cfg.rounds + 1)
        folders["round_dirs"] = [str(stage_dir(cfg, in_round("ppo", number)).parent) for number in numbers]
    return {
        "sft": {"model": cfg.model},
        "evaluate": {
            "policies": {"base": cfg.model, "sft": sft, **reached, "ppo": str(last["ppo"] / "final")},
            "reference": sft,
            "base": cfg.model,
            "reward_model": str(last["reward"] / "final"),
        },
        "report": {"title": cfg.title, **folders},
    }


def run_stage(planned: Planned, cfg: PipelineStage, options: RunOptions) -> None:
    """One stage in a process of its own; marks it done afterwards.

    Raises:
        StageError: it exited with another code than 0.
        SystemExit: it waits for people's labels, and has said so.
    """
    folder = stage_dir(cfg, planned.name)
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
    if code == LabelsPending.exit_code:
        raise SystemExit(code)
    if code != 0:
        raise StageError(
            f"stage {planned.name} ended with exit code {code}; what was finished is kept in {cfg.run_dir}",
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
