"""One PPO run around its loop: which step comes next, what is shown, logged and saved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.checkpoint import Checkpoints, flatten_optimizer, unflatten_optimizer
from rlhf.config import fingerprint
from rlhf.config_schema import PPOStage
from rlhf.errors import CheckpointError
from rlhf.functional.kl import k1, sequence_kl
from rlhf.models.roles import Roles
from rlhf.models.tuning import load_trainable, trainable_tensors
from rlhf.progress import Progress
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime
from rlhf.tracking import Tracker
from rlhf.types import KLController, Rollout, RolloutBatch, RunResult

_FREE_TO_CHANGE = {"run_dir", "tracking", "save_every", "keep_checkpoints", "samples_per_step", "archive_rollouts"}
"""Keys that may differ on resume: they change nothing that is learned."""


class PPORun:
    """Steps, progress, tracking and checkpoints of one run; made by `PPORun.open`."""

    def __init__(self, cfg: PPOStage, runtime: Runtime, progress: Progress, tracker: Tracker) -> None:
        self.cfg = cfg
        self.progress = progress
        self.first_step = 0
        self._runtime = runtime
        self._tracker = tracker
        self._seconds: dict[str, float] = {}
        self._last: dict[str, float] = {}

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        cfg: PPOStage,
        options: RunOptions,
        runtime: Runtime,
        *,
        module: Any,
        optimizer: Any,
        kl_control: KLController,
    ) -> Iterator[PPORun]:
        """Resume from the newest verified checkpoint when asked to, and open progress and tracking.

        Args:
            module: the unwrapped actor-critic whose trained parameters are saved.

        Raises:
            CheckpointError: the checkpoint belongs to another configuration.
        """
        with Progress(stage="ppo", enabled=runtime.is_main) as progress:
            checkpoints = Checkpoints(cfg.run_dir, cfg.keep_checkpoints, say=progress.say, writer=runtime.is_main)
            found = checkpoints.latest() if options.resume == "auto" else None
            meta = {"config": learned_fingerprint(cfg)}
            if found is not None:
                _refuse_other_config(found.meta, meta, cfg)
                load_trainable(module, found.tensors("trainable"))
                optimizer.load_state_dict(unflatten_optimizer(found.tensors("optimizer"), found.state["optimizer"]))
                kl_control.load_state_dict(found.state["kl_control"])
                progress.say(f"resumed after step {found.step} of {cfg.steps}")
            done = found.step if found is not None else 0
            with Tracker.open(
                cfg.run_dir,
                cfg.tracking,
                stage="ppo",
                config=cfg.model_dump(mode="json"),
                enabled=runtime.is_main,
                resume_step=done,
                say=progress.say,
            ) as tracker:
                run = cls(cfg, runtime, progress, tracker)
                run.first_step = done
                run._checkpoints, run._meta = checkpoints, meta
                run._module, run._optimizer, run._kl_control = module, optimizer, kl_control
                yield run

    def steps(self) -> Iterator[int]:
        """0-based steps that are still to be done."""
        outer = self.progress.phase("steps", total=self.cfg.steps, outer=True, done=self.first_step)
        for step in range(self.first_step, self.cfg.steps):
            self._seconds, self._began = {}, time.perf_counter()
            yield step
            outer.advance(1, reward=self._last["objective/scores"], kl=self._last["objective/kl"])

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time and show one part of a step."""
        began = time.perf_counter()
        total = self.cfg.batch_size * self.cfg.sampling.max_new_tokens if name == "generate" else None
        with self.progress.phase(name, total=total, unit="tokens"):
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def log(self, step: int, metrics: dict[str, float], batch: RolloutBatch, rollouts: Sequence[Rollout]) -> None:
        """Metrics with `time/*` (seconds) and sampled tokens of all ranks per second; a few samples; the archive."""
        total = time.perf_counter() - self._began
        tokens = float(self._runtime.sum(batch.action_mask_BT.sum().double()))
        timing = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        episode = (step + 1) * self.cfg.batch_size * self._runtime.world_size
        self._last = {
            **metrics,
            **timing,
            "time/step": total,
            "perf/tokens_per_s": tokens / total,
            "episode": float(episode),
        }
        self._tracker.log(step + 1, self._last)
        kl_B = sequence_kl(k1(batch.logprobs_BT, batch.ref_logprobs_BT), batch.action_mask_BT).tolist()
        self._tracker.samples(
            step + 1,
            [sample_row(r, kl) for r, kl in list(zip(rollouts, kl_B, strict=True))[: self.cfg.samples_per_step]],
        )
        if self.cfg.archive_rollouts:
            archived = self._runtime.gather_objects(list(rollouts))
            if self._runtime.is_main:
                path = Path(self.cfg.run_dir) / "rollouts" / f"step_{step + 1:06d}.parquet"
                RolloutBuffer(archived).to_parquet(path)

    def save_if_due(self, step: int) -> None:
        """A checkpoint every `save_every` steps; the last step needs none, `finish` writes the models."""
        due = self.cfg.save_every and (step + 1) % self.cfg.save_every == 0 and step + 1 < self.cfg.steps
        if not due or self._runtime.uses_deepspeed:
            return
        if self._runtime.is_main:
            tensors, plain = flatten_optimizer(self._optimizer.state_dict())
            self._checkpoints.save(
                step + 1,
                {"trainable": trainable_tensors(self._module), "optimizer": tensors},
                {"optimizer": plain, "kl_control": self._kl_control.state_dict()},
                self._meta,
            )
        self._runtime.barrier()

    def finish(self, roles: Roles) -> RunResult:
        """Write `final/` and `critic/`; the summary is the last step's metrics."""
        folder = Path(self.cfg.run_dir)
        self.progress.say(f"writing {folder / 'final'}")
        if self._runtime.is_main:
            roles.export(folder, self._runtime.dtype)
        self._tracker.summary(self._last)
        self._runtime.barrier()
        return RunResult(
            self.cfg.run_dir, self._last, {"model": str(folder / "final"), "critic": str(folder / "critic")}
        )


def sample_row(rollout: Rollout, kl: float) -> dict[str, Any]:
    """One line of samples.jsonl."""
    return {
        "prompt": rollout.prompt,
        "response": rollout.response,
        "score": rollout.score,
        "kl": kl,
        "tokens": len(rollout.response_tokens),
        "stop": rollout.stop.value,
    }


def learned_fingerprint(cfg: PPOStage) -> str:
    """Fingerprint of every key that changes what is learned."""
    return fingerprint({k: v for k, v in cfg.model_dump(mode="json").items() if k not in _FREE_TO_CHANGE})


def _refuse_other_config(found: dict[str, Any], now: dict[str, Any], cfg: PPOStage) -> None:
    if found.get("config") != now["config"]:
        raise CheckpointError(
            f"the checkpoints in {cfg.run_dir} were made with another configuration",
            fix="restore the configuration, use another run_dir, or start anew with --resume never",
        )
