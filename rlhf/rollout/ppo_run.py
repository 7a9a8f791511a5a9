"""One PPO run around its loop: which step comes next, what is shown, logged and saved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.checkpoint import Checkpoints, flatten_optimizer, unflatten_optimizer
from rlhf.config_schema import PPOStage
from rlhf.errors import CheckpointError
from rlhf.files import set_aside
from rlhf.functional.kl import k1, sequence_kl
from rlhf.models.roles import Roles
from rlhf.models.tuning import load_trainable, trainable_tensors
from rlhf.progress import Progress
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.rollout.profile import StepProfile, StepRecord, table
from rlhf.rollout.work import StepWork, row_lengths
from rlhf.runs import RunOptions, digests, learned_fingerprint, named_data, named_models
from rlhf.runtime import Runtime
from rlhf.tracking import Tracker
from rlhf.types import KLController, Rollout, RolloutBatch, RunResult


class PPORun:
    """Steps, progress, tracking and checkpoints of one run; made by `PPORun.open`."""

    def __init__(
        self,
        cfg: PPOStage,
        runtime: Runtime,
        progress: Progress,
        tracker: Tracker,
        saver: Saver,
        work: StepWork | None,
        *,
        profiled: bool = False,
    ) -> None:
        self.cfg = cfg
        self.progress = progress
        self.first_step = saver.first_step
        self._runtime = runtime
        self._tracker = tracker
        self._saver = saver
        self._seconds: dict[str, float] = {}
        self._last: dict[str, float] = {}
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
        module: Any,
        optimizer: Any,
        kl_control: KLController,
        work: StepWork | None,
    ) -> Iterator[PPORun]:
        """Resume from the newest verified checkpoint when asked to, and open progress and tracking.

        Args:
            module: the unwrapped actor-critic whose trained parameters are saved.
            work: what a step computes, where that can be counted.

        Raises:
            CheckpointError: the checkpoint belongs to another configuration or to other inputs.
        """
        with Progress(stage="ppo", enabled=runtime.is_main) as progress:
            if options.resume == "never" and runtime.is_main:
                set_aside(Path(cfg.run_dir) / "checkpoints")
            runtime.barrier()
            saver = Saver(cfg, runtime, module, optimizer, kl_control, say=progress.say)
            if options.resume == "auto":
                saver.restore()
            with Tracker.open(
                cfg.run_dir,
                cfg.tracking,
                stage="ppo",
                config=cfg.model_dump(mode="json"),
                enabled=runtime.is_main,
                resume_step=saver.first_step or None,
                say=progress.say,
            ) as tracker:
                yield cls(cfg, runtime, progress, tracker, saver, work, profiled=options.profile)

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
            yield
            self._runtime.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def log(self, step: int, metrics: dict[str, float], batch: RolloutBatch, rollouts: Sequence[Rollout]) -> None:
        """Metrics with `time/*` (seconds) and, of all ranks per second, sampled tokens and model FLOPs; a few
        samples; the archive."""
        total = time.perf_counter() - self._began
        epochs, reused = (metrics[f"train/{name}"] / self.cfg.minibatches for name in ("updates", "reused_forwards"))
        record = self._record(step, total, batch, epochs=epochs, reused=reused)
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

    def _record(self, step: int, total: float, batch: RolloutBatch, *, epochs: float, reused: float) -> StepRecord:
        """Times of this rank, counts of all."""
        rows = row_lengths(batch)
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

    def save_if_due(self, step: int) -> None:
        """A checkpoint every `save_every` steps; the last step needs none, `finish` writes the models."""
        if self.cfg.save_every and (step + 1) % self.cfg.save_every == 0 and step + 1 < self.cfg.steps:
            self._saver.save(step + 1)

    def finish(self, roles: Roles) -> RunResult:
        """Write `final/` and `critic/`, and the profile if there is one; the summary is the last step's metrics."""
        folder = Path(self.cfg.run_dir)
        if self._profile and self._profile.records and self._runtime.is_main:
            self.progress.console.print(table(self._profile.report()))
        self.progress.say(f"writing {folder / 'final'}")
        if self._runtime.is_main:
            roles.export(folder, self._runtime.dtype)
        self._tracker.summary(self._last)
        self._runtime.barrier()
        return RunResult(
            self.cfg.run_dir, self._last, {"model": str(folder / "final"), "critic": str(folder / "critic")}
        )


class Saver:
    """Checkpoints of everything that changes during a run.

    Prompts and draws are functions of (seed, step, rank), so trained parameters, optimizer and KL controller are
    the whole state.
    """

    def __init__(
        self,
        cfg: PPOStage,
        runtime: Runtime,
        module: Any,
        optimizer: Any,
        kl_control: KLController,
        *,
        say: Callable[[str], None],
    ) -> None:
        self.first_step = 0
        self._cfg, self._runtime, self._say = cfg, runtime, say
        self._inputs = digests(named_data(cfg) | named_models(cfg), exact=True)
        self._module, self._optimizer, self._kl_control = module, optimizer, kl_control
        self._checkpoints = Checkpoints(cfg.run_dir, cfg.keep_checkpoints, say=say, writer=runtime.is_main)

    def restore(self) -> None:
        """Go on from the newest verified checkpoint, if there is one.

        Raises:
            CheckpointError: it belongs to another configuration, data file or model, or all are damaged.
        """
        found = self._checkpoints.latest()
        if found is None:
            return
        if found.meta.get("config") != learned_fingerprint(self._cfg):
            raise CheckpointError(
                f"the checkpoints in {self._cfg.run_dir} were made with another configuration",
                fix="restore the configuration, use another run_dir, or start anew with --resume never",
            )
        self._refuse_changed_inputs(found.meta.get("inputs", {}))
        load_trainable(self._module, found.tensors("trainable"))
        self._optimizer.load_state_dict(unflatten_optimizer(found.tensors("optimizer"), found.state["optimizer"]))
        self._kl_control.load_state_dict(found.state["kl_control"])
        self.first_step = found.step
        self._say(f"resumed after step {found.step} of {self._cfg.steps}")

    def save(self, step: int) -> None:
        """Write the state after `step` steps; DeepSpeed's sharded optimizer is not saved yet, and that is said."""
        if self._runtime.uses_deepspeed:
            self._say("no checkpoint: saving a sharded optimizer is not supported yet (the final models are written)")
            return
        if self._runtime.is_main:
            tensors, plain = flatten_optimizer(self._optimizer.state_dict())
            self._checkpoints.save(
                step,
                {"trainable": trainable_tensors(self._module), "optimizer": tensors},
                {"optimizer": plain, "kl_control": self._kl_control.state_dict()},
                {"config": learned_fingerprint(self._cfg), "inputs": self._inputs},
            )
        self._runtime.barrier()

    def _refuse_changed_inputs(self, recorded: dict[str, str]) -> None:
        """Steps on other prompts, or LoRA weights over another base, would be one run in name only."""
        changed = sorted(name for name, digest in recorded.items() if self._inputs.get(name) != digest)
        if changed:
            raise CheckpointError(
                f"changed since the checkpoints in {self._cfg.run_dir} were made: {', '.join(changed)}",
                fix="restore what changed, use another run_dir, or start anew: with --resume never, or without "
                f"{self._cfg.run_dir}/checkpoints",
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
