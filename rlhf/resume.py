"""The checkpoints of a stage that trains: what they hold, from which one a run goes on, and when that is refused.

Prompts, rows, draws and learning rates are functions of (seed, step), so trained weights, the optimizer's moments and
a few numbers of the stage are the whole state, and the step is the data cursor. Nothing in it depends on the number of
processes or on ZeRO: a run may go on with other ones, as long as a step takes as many rows in all.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoint import Checkpoint, Checkpoints, open_checkpoint
from rlhf.errors import CheckpointError
from rlhf.files import atomic_write
from rlhf.runs import RunOptions, digests, environment, learned_fingerprint, named_data, named_models
from rlhf.runtime import Runtime
from rlhf.sharding import TrainState
from rlhf.tensor_files import TensorFiles

TERMINATED = 128 + 15
"""Exit code of a run that was asked to end (SIGTERM) and saved what it had."""


_BEGUN = ".begun"
"""Says in a run folder that what stands there since belongs to the job that was started with `never` or a path."""


def is_restarted() -> bool:
    """Whether torchrun, or the script of `launch/slurm/`, started these processes again."""
    counts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "RLHF_TRY"))
    return any(count.isdigit() and int(count) > 0 for count in counts)


class Resume:
    """Where a run goes on, and how it will be possible to go on from it.

    Use: `resume = Resume.open(...)`, `load_weights` before the runtime wraps the module, `attach` after it.
    """

    def __init__(self, cfg: Any, runtime: Runtime, store: Checkpoints, found: Checkpoint | None) -> None:
        self._cfg, self._runtime, self._store, self._found = cfg, runtime, store, found
        self._train_state: TrainState | None = None
        self._state_now: Callable[[], dict[str, Any]] = dict
        self._tensors_now: Callable[[], dict[str, dict[str, Tensor]]] = dict
        self._meta = self._describe()
        self._marks = False
        self.first_step = found.step if found else 0
        self.state: dict[str, Any] = found.state if found else {}

    @classmethod
    def open(cls, cfg: Any, options: RunOptions, runtime: Runtime, *, say: Callable[[str], None]) -> Resume:
        """Find the checkpoint that `--resume` asks for; nothing is changed on the disk yet, but remains of a kill.

        A launcher that starts its processes again gives them the same options: what `never` or a path asked for has
        been done then, and they go on from what they have written since.

        Args:
            cfg: a stage with `save_every` and `keep_checkpoints`.

        Raises:
            CheckpointError: on all ranks; it belongs to another configuration, to changed inputs, or all are damaged.
        """
        speak = say if runtime.is_main else _silent
        store = Checkpoints(cfg.run_dir, cfg.keep_checkpoints, say=speak, ranks=runtime)
        begun = store.folder.with_name(_BEGUN)
        goes_on = runtime.gather_objects([is_restarted() and begun.exists()])[0]
        if runtime.is_main and not goes_on:
            begun.unlink(missing_ok=True)
        runtime.barrier()  # rank 0 has put a replacement that was cut short back
        found = store.latest() if goes_on or options.resume == "auto" else None
        if found is None and options.resume not in ("auto", "never"):
            found = open_checkpoint(Path(options.resume).expanduser(), ranks=runtime)
        resume = cls(cfg, runtime, store, found)
        resume._marks = options.resume != "auto"
        if found:
            resume._refuse_others(found)
            speak(f"going on after step {found.step}{resume._moved_from(found)}")
        return resume

    def begin(self) -> None:
        """Set aside what does not belong to this run's time line: later checkpoints; all, if it goes on from none of
        them."""
        if self._runtime.is_main:
            ours = self._found is not None and self._found.path.resolve().parent == self._store.folder.resolve()
            self._store.set_aside_after(self.first_step if ours else -1)
            if self._marks:
                self._store.folder.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(self._store.folder.with_name(_BEGUN), "")
        self._runtime.barrier()

    def load_weights(self, module: Any) -> None:
        """Trained weights of the checkpoint, if there is one, into the module; before `Runtime.prepare`.

        Raises:
            CheckpointError: one of them is not in the checkpoint.
        """
        if self._found is None:
            return
        files = self._found.tensors("trainable")
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(files.part(name, 0, parameter.numel()).view_as(parameter))

    def attach(
        self,
        module: Any,
        optimizer: Any,
        *,
        state: Callable[[], dict[str, Any]] = dict,
        tensors: Callable[[], dict[str, dict[str, Tensor]]] = dict,
    ) -> None:
        """Moments of the checkpoint, if there is one, into the optimizer; both are saved from now on.

        Args:
            module: unwrapped.
            optimizer: as `Runtime.prepare` gave it.
            state: gives what the stage needs besides; JSON types with text keys. It is found in `Resume.state` again.
            tensors: likewise, of this rank: file name -> name -> tensor; found again by `Resume.tensors`.
        """
        self._state_now, self._tensors_now = state, tensors
        self._train_state = self._runtime.train_state(module, optimizer)
        if self._found is not None:
            self._train_state.load_moments(self._found.tensors("optimizer"))

    def tensors(self, name: str) -> TensorFiles:
        """What `attach` was told to save under this file name, of all ranks; there must be a checkpoint."""
        assert self._found is not None, "nothing to go on from"
        return self._found.tensors(name)

    def is_due(self, step: int, total: int) -> bool:
        """After the last of `total` steps there is no checkpoint: the finished model is written anyway."""
        every = self._cfg.save_every
        return bool(every) and step % every == 0 and step < total

    def save(self, step: int, *, in_background: bool = False) -> None:
        """The checkpoint after `step` steps; all ranks call it.

        Args:
            in_background: it is there after a later `save_if_due`, or `finish`.

        Raises:
            CheckpointError: on all ranks, when one of them cannot write.
        """
        assert self._train_state is not None, "attach comes first"
        own = {"trainable": self._train_state.weights(), "optimizer": self._train_state.moments()}
        tensors = {**self._tensors_now(), **own}
        self._store.save(step, tensors, self._state_now(), self._meta, in_background=in_background)

    def save_if_due(self, step: int, total: int) -> None:
        """After 0-based `step`: a checkpoint every `save_every` steps, and when the run is asked to end, which it does.

        Raises:
            SystemExit: with code `TERMINATED`, on all ranks, once the checkpoint is written.
        """
        if self._runtime.is_asked_to_end():
            self.save_and_end(step + 1)
        self._store.commit_if_written()
        if self.is_due(step + 1, total):
            self.save(step + 1, in_background=self._cfg.save_in_background)

    def commit_if_written(self) -> None:
        """Make a checkpoint that was written in the background valid, if it is complete; all ranks call it."""
        self._store.commit_if_written()

    def finish(self) -> None:
        """Wait for a checkpoint that is still being written."""
        self._store.commit_if_written(wait=True)

    def save_and_end(self, step: int) -> None:
        """The checkpoint after `step` steps, unless it is there, and the end of the process."""
        if step > self.first_step:
            self.save(step)
        if self._runtime.is_main:
            print(f"ended by SIGTERM after step {step}; run the same command again to go on", flush=True)
        raise SystemExit(TERMINATED)

    def _describe(self) -> dict[str, Any]:
        """What this run is made of, as rank 0 sees it now: inputs that change later are not those that it read."""
        described = {}
        if self._runtime.is_main:
            described = {
                "config": learned_fingerprint(self._cfg, processes=self._runtime.world_size),
                "inputs": digests(named_data(self._cfg) | named_models(self._cfg), exact=True),
                "processes": self._runtime.world_size,
                "zero_stage": self._runtime.zero_stage,
                "environment": environment(),
            }
        return self._runtime.gather_objects([described])[0]

    def _refuse_others(self, found: Checkpoint) -> None:
        """Steps on other prompts, or LoRA weights over another base, would be one run in name only."""
        processes, now = self._runtime.world_size, self._meta
        anew = f"use another run_dir, or start anew with --resume never (which keeps {self._store.folder} aside)"
        if found.meta.get("config") != now["config"]:
            there = found.meta.get("processes", processes)
            hint = (
                f" (or for another number of rows per step: it was made by {there} processes, now there are "
                f"{processes}, and batch_size counts per process)"
                if there != processes
                else ""
            )
            raise CheckpointError(
                f"{found.path} was made with another configuration{hint}", fix=f"restore the configuration, {anew}"
            )
        inputs = found.meta.get("inputs", {})
        changed = sorted(name for name, digest in inputs.items() if now["inputs"].get(name) != digest)
        if changed:
            raise CheckpointError(
                f"changed since {found.path} was made: {', '.join(changed)}", fix=f"restore what changed, {anew}"
            )

    def _moved_from(self, found: Checkpoint) -> str:
        """What else is new: no reason to refuse, but good to know."""
        meta, now = found.meta, self._meta
        text = ""
        if any(meta.get(key) != now[key] for key in ("processes", "zero_stage")):
            text += f", which {_kind(meta)} wrote"
        before = meta.get("environment") or {}
        new = [what for what in ("packages", "git") if before.get(what) != now["environment"][what]]
        if new:
            named = " and ".join({"packages": "packages", "git": "our own code"}[what] for what in new)
            text += f"; {named} changed since, so bits may differ"
        return text


def _kind(meta: dict[str, Any]) -> str:
    count, stage = meta.get("processes"), meta.get("zero_stage")
    return ("one process" if count == 1 else f"{count} processes") + (f" under ZeRO-{stage}" if stage else "")


def _silent(text: str) -> None:
    return None
