"""One PPO run around its loop: which step comes next, what is shown, logged and saved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.config_schema import PPOStage
from rlhf.errors import InvariantError
from rlhf.functional.kl import k1, sequence_kl
from rlhf.models.roles import Roles
from rlhf.progress import Progress
from rlhf.resume import Resume
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.rollout.profile import StepProfile, StepRecord, table
from rlhf.rollout.watch import Watch
from rlhf.rollout.work import StepWork, row_lengths
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime, explaining_memory
from rlhf.tracking import Tracker
from rlhf.types import Rollout, RolloutBatch, RunResult


class SamplingEnded(Exception):
    """This rank was asked to end while it sampled."""


class PPORun:
    """Steps, progress, tracking and checkpoints of one run; made by `PPORun.open`."""

    def __init__(
        self,
        cfg: PPOStage,
        runtime: Runtime,
        progress: Progress,
        tracker: Tracker,
        resume: Resume,
        watch: Watch,
        work: StepWork | None,
        *,
        profiled: bool = False,
    ) -> None:
        self.cfg = cfg
        self.progress = progress
        self.first_step = resume.first_step
        self._runtime = runtime
        self._tracker = tracker
        self._resume = resume
        self._watch = watch
        self._seconds: dict[str, float] = {}
        self._last = watch.last
        self._work = work
        self._profile: StepProfile | None = None
        if profiled:
            traced = min(self.first_step + 1, cfg.steps - 1)  # the first one warms up
            shape = self._work.policy if self._work else None
            limits = min(cfg.micro_batch_size, cfg.batch_size // cfg.minibatches), cfg.micro_batch_tokens
            self._profile = StepProfile(Path(cfg.run_dir), runtime, traced, *limits, shape)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        cfg: PPOStage,
        options: RunOptions,
        runtime: Runtime,
        *,
        resume: Resume,
        work: StepWork | None,
    ) -> Iterator[PPORun]:
        """Open progress and tracking; from here on a SIGTERM ends the run with a checkpoint.

        Args:
            resume: with the trained module attached.
            work: what a step computes, where that can be counted.
        """
        with Progress(stage="ppo", enabled=runtime.is_main) as progress, runtime.minding_sigterm():
            resume.begin()
            with Tracker.open(
                cfg.run_dir,
                cfg.tracking,
                stage="ppo",
                config=cfg.model_dump(mode="json"),
                enabled=runtime.is_main,
                resume_step=resume.first_step or None,
                say=progress.say,
            ) as tracker:
                watch = Watch(cfg, runtime, progress, tracker.history())
                with watch.assertions():
                    yield cls(cfg, runtime, progress, tracker, resume, watch, work, profiled=options.profile)

    def steps(self) -> Iterator[int]:
        """0-based steps that are still to be done."""
        outer = self.progress.phase("steps", total=self.cfg.steps, outer=True, done=self.first_step)
        for step in range(self.first_step, self.cfg.steps):
            self._seconds, self._began = {}, time.perf_counter()
            with self._profile.step(step) if self._profile else contextlib.nullcontext():
                yield step
            outer.advance(1, reward=self._last["objective/scores"], kl=self._last["objective/kl"])

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time and show one part of a step."""
        began = time.perf_counter()
        total = self.cfg.batch_size * self.cfg.sampling.max_new_tokens if name == "generate" else None
        with self.progress.phase(name, total=total, unit="tokens"), torch.profiler.record_function(name):
            with contextlib.suppress(SamplingEnded), explaining_memory(name, self._smaller(name)):
                yield
            self._runtime.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def _smaller(self, phase: str) -> str:
        """How a phase takes less memory, in a run that then goes on from its checkpoint."""
        cfg = self.cfg
        if phase == "generate":
            return f"lower sampling.batch_size, which is {cfg.sampling.batch_size}"
        size = f"micro_batch_size, which is {cfg.micro_batch_size}"
        fix = f"lower {size}, or micro_batch_tokens, which is {cfg.micro_batch_tokens}"
        if phase == "update" and not cfg.gradient_checkpointing:
            fix += "; or set gradient_checkpointing: true"
        return fix

    def log(self, step: int, metrics: dict[str, float], batch: RolloutBatch, rollouts: Sequence[Rollout]) -> None:
        """Metrics with `time/*` (seconds) and, of all ranks per second, sampled tokens and model FLOPs; a few
        samples; the archive."""
        total = time.perf_counter() - self._began
        epochs, reused = (metrics[f"train/{name}"] / self.cfg.minibatches for name in ("updates", "reused_forwards"))
        record = self._record(step, total, rollouts, epochs=epochs, reused=reused)
        timing = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        episode = (step + 1) * self.cfg.batch_size * self._runtime.world_size
        self._last = {
            **metrics,
            **timing,
            "time/step": total,
            "perf/tokens_per_s": record.action_tokens / total,
            **({"perf/flops": sum(record.flops.values()) / total} if record.flops else {}),
            "episode": float(episode),
        }
        self._tracker.log(step + 1, self._last)
        self._watch.step(step + 1, self._last)
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

    def _record(
        self, step: int, total: float, rollouts: Sequence[Rollout], *, epochs: float, reused: float
    ) -> StepRecord:
        """Times of this rank, counts of all."""
        rows = row_lengths(rollouts)
        flops = self._work.flops(rows, epochs=epochs, reused=reused) if self._work else {}
        tokens = [sum(p + s for p, s in rows), sum(s for _, s in rows)]
        counts = torch.tensor([len(rows), *tokens, *flops.values()], dtype=torch.float64)
        summed = self._runtime.sum(counts).tolist()
        record = StepRecord(
            step,
            dict(self._seconds),
            total,
            rows=int(summed[0]),
            read_tokens=summed[1],
            action_tokens=summed[2],
            flops=dict(zip(flops, summed[3:], strict=True)),
        )
        if self._profile:
            self._profile.records.append(record)
        return record

    def on_tokens(self, count: int) -> None:
        """Progress while sampling; a SIGTERM ends this rank's sampling, for its answers will be sampled again."""
        self.progress.advance(count)
        if self._runtime.has_sigterm:
            raise SamplingEnded

    def end_if_asked(self, step: int) -> None:
        """Before the update of `step` nothing of the step is worth saving: a SIGTERM ends the run here and now."""
        if self._runtime.is_asked_to_end():
            self._resume.save_and_end(step)

    def save_if_due(self, step: int) -> None:
        """See `Resume.save_if_due`.

        Raises:
            GuardError: an alarm began and is to stop the run; that has left a checkpoint, whatever step it is.
        """
        alarm = self._watch.stopping()
        if alarm and self.cfg.save_every:
            self._resume.save(step + 1)
        if alarm:
            raise alarm
        self._resume.save_if_due(step, self.cfg.steps)

    @contextlib.contextmanager
    def keeping_on_failure(self, step: int, rollouts: Sequence[Rollout]) -> Iterator[None]:
        """When an assertion stops the update, the rollouts that did it stay in `failed/`, one file per rank."""
        try:
            yield
        except InvariantError as error:
            path = Path(self.cfg.run_dir) / "failed" / f"step_{step + 1:06d}_rank_{self._runtime.rank}.parquet"
            RolloutBuffer(rollouts).to_parquet(path)
            raise type(error)(f"{error.message} (the rollouts are in {path})", fix=error.fix) from error

    def finish(self, roles: Roles) -> RunResult:
        """Write `final/` and `critic/`, and the profile if there is one; the summary is the last step's metrics."""
        folder = Path(self.cfg.run_dir)
        self._resume.finish()
        if self._profile and self._profile.records and self._runtime.is_main:
            self.progress.console.print(table(self._profile.report()))
        self.progress.say(f"writing {folder / 'final'}")
        self._runtime.make_whole(roles.actor_critic)
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
        "kl": None if rollout.score is None else kl,  # masked out, it has none
        "tokens": len(rollout.response_tokens),
        "stop": rollout.stop.value,
    }
