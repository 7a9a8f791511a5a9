"""Checkpoints of supervised fine-tuning, by the contract of `rlhf.checkpoint`.

    step_N/{trainable, optimizer, rng_<rank>}.safetensors, state.json, trainer_state.json, MANIFEST.json

Under DeepSpeed its own shards take the place of the first two; they are opened behind a verified manifest only.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf.checkpoint import (
    STATE,
    Checkpoint,
    Checkpoints,
    Json,
    flatten_optimizer,
    read_checkpoint,
    restore_rng,
    rng_state,
    unflatten_optimizer,
    write_tensors,
)
from rlhf.config import fingerprint
from rlhf.config_schema import SFTStage
from rlhf.errors import CheckpointError
from rlhf.files import atomic_write, set_aside
from rlhf.models.tuning import load_trainable, trainable_tensors
from rlhf.runs import FREE_TO_CHANGE, digests, named_data, named_models
from rlhf.runtime import Runtime

TRAINER_STATE = "trainer_state.json"
"""The name that `transformers.Trainer` reads."""
BYTES_PER_PARAMETER = 16
"""Weight, two moments and, under DeepSpeed, a second copy of the weight."""


class SFTSaver:
    """What `SplitFreeTrainer` writes on the way and goes on from; made by `SFTSaver.open`.

    Attributes:
        found: the checkpoint to go on from; None at a fresh start.
    """

    def __init__(self, cfg: SFTStage, runtime: Runtime, *, say: Callable[[str], None]) -> None:
        self.found: Checkpoint | None = None
        self._cfg, self._runtime, self._say = cfg, runtime, say
        self._checkpoints = Checkpoints(cfg.run_dir, cfg.keep_checkpoints, say=say, writer=runtime.is_main)
        self._meta: Json = {
            "config": split_free_fingerprint(cfg),
            "rows_per_step": cfg.batch_size * runtime.world_size,
            "inputs": digests(named_data(cfg) | named_models(cfg), exact=True) if runtime.is_main else {},
            "world_size": runtime.world_size,
            "zero_stage": runtime.zero_stage if runtime.uses_deepspeed else None,
        }

    @classmethod
    def open(cls, cfg: SFTStage, runtime: Runtime, *, resume: str, say: Callable[[str], None]) -> SFTSaver:
        """Find the checkpoint to go on from.

        Args:
            resume: "auto" takes the newest that verifies, "never" sets all aside, else it is a checkpoint's folder.

        Raises:
            CheckpointError: it is damaged, or of another run: another configuration, input or kind of sharding.
        """
        if resume == "never" and runtime.is_main:
            set_aside(Path(cfg.run_dir) / "checkpoints")
        runtime.barrier()
        saver = cls(cfg, runtime, say=say)
        # One rank reads and verifies it, for all.
        found = [saver._find(resume)] if runtime.is_main and resume != "never" else [None]
        saver.found = runtime.gather_objects(found if runtime.is_main else [])[0]
        return saver

    def _find(self, resume: str) -> Checkpoint | None:
        found = self._checkpoints.latest() if resume == "auto" else read_checkpoint(Path(resume).expanduser())
        if found is None:
            return None
        require_same_run(found, self._meta)
        if resume != "auto":
            self._start_from(found)
        self._say(f"resumed after step {found.step}")
        return found

    def _start_from(self, found: Checkpoint) -> None:
        """Set aside what was written after `found`: it would be resumed in place of what comes now."""
        ours = found.path.resolve().parent == self._checkpoints.folder.resolve()
        for step in self._checkpoints.steps():
            if not ours or step > found.step:
                set_aside(self._checkpoints.folder / f"step_{step}")

    # --- writing --------------------------------------------------------------------------------------

    def is_due(self, step: int, last: int) -> bool:
        """A checkpoint every `save_every` steps; the last step needs none, the model is written then."""
        return bool(self._cfg.save_every) and step % self._cfg.save_every == 0 and step < last

    def save(self, trainer: Any) -> None:
        """Write the state after `trainer.state.global_step` steps; every rank takes part."""
        rng = self._runtime.gather_objects([rng_state()])
        parameters = (p for p in trainer.model.parameters() if p.requires_grad)
        size = BYTES_PER_PARAMETER * sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        step = trainer.state.global_step
        with self._checkpoints.staged(step, self._meta, needed=size, barrier=self._runtime.barrier) as folder:
            if trainer.is_deepspeed_enabled:
                frozen_left_out = hasattr(trainer.model, "unload")  # as transformers reads them: LoRA alone
                trainer.model_wrapped.save_checkpoint(str(folder), exclude_frozen_parameters=frozen_left_out)
            if self._runtime.is_main:
                self._write(folder, trainer, rng)

    def _write(self, folder: Path, trainer: Any, rng: list[tuple[dict[str, Tensor], Json]]) -> None:
        """What is the same on every rank, and the random states of each."""
        state: Json = {
            "scheduler": trainer.lr_scheduler.state_dict(),
            "counts": trainer.counts(),
            "rng": [plain for _, plain in rng],
        }
        if not trainer.is_deepspeed_enabled:
            moments, state["optimizer"] = flatten_optimizer(trainer.optimizer.state_dict())
            write_tensors(folder / "optimizer.safetensors", moments)
            write_tensors(folder / "trainable.safetensors", trainable_tensors(trainer.model))
        for rank, (tensors, _) in enumerate(rng):
            write_tensors(folder / f"rng_{rank}.safetensors", tensors)
        trainer.state.save_to_json(str(folder / TRAINER_STATE))
        atomic_write(folder / STATE, json.dumps(state))

    # --- reading --------------------------------------------------------------------------------------

    def load_weights(self, model: Any) -> None:
        """The trained parameters, into `model`."""
        load_trainable(model, self._checkpoint.tensors("trainable"))

    def load_optimizer(self, trainer: Any) -> None:
        """Optimizer, where it is not DeepSpeed's, and schedule."""
        found = self._checkpoint
        if not trainer.is_deepspeed_enabled:
            state = unflatten_optimizer(found.tensors("optimizer"), found.state["optimizer"])
            trainer.optimizer.load_state_dict(state)
        trainer.lr_scheduler.load_state_dict(found.state["scheduler"])

    def load_counts(self, trainer: Any) -> None:
        """What was counted until then."""
        trainer.restore_counts(self._checkpoint.state["counts"])

    def load_rng(self) -> None:
        """This rank's random states. Another number of ranks has none to go on with: only dropout draws from them."""
        plain, rank = self._checkpoint.state["rng"], self._runtime.rank
        if len(plain) == self._runtime.world_size:
            restore_rng(self._checkpoint.tensors(f"rng_{rank}"), plain[rank])

    @property
    def _checkpoint(self) -> Checkpoint:
        if self.found is None:
            raise RuntimeError("nothing was resumed")
        return self.found


def split_free_fingerprint(cfg: SFTStage) -> str:
    """Fingerprint of every key that changes what is learned; how a step's rows are split changes rounding alone."""
    free = FREE_TO_CHANGE | {"batch_size", "micro_batch_size"}
    return fingerprint({key: value for key, value in cfg.model_dump(mode="json").items() if key not in free})


def require_same_run(found: Checkpoint, meta: Json) -> None:
    """A run that is described by `meta` may go on from the checkpoint.

    Raises:
        CheckpointError: it may not, and what to do.
    """
    was, where = found.meta, found.path
    anew = "use another run_dir, or start anew with --resume never"
    if was.get("config") != meta["config"]:
        raise CheckpointError(f"{where} was made with another configuration", fix=f"restore it, {anew}")
    sharding = ("zero_stage", "world_size") if None not in (was["zero_stage"], meta["zero_stage"]) else ("zero_stage",)
    if any(was[key] != meta[key] for key in sharding):
        raise CheckpointError(
            f"{where} was made by {_kind(was)}, and this is {_kind(meta)}: DeepSpeed's shards fit no other",
            fix=f"start it as it was, by its launch file and --num_processes {was['world_size']}; or {anew}",
        )
    if was["rows_per_step"] != meta["rows_per_step"]:
        raise CheckpointError(
            f"{where} was made with {was['rows_per_step']} rows per step over all processes, "
            f"this run has {meta['rows_per_step']}",
            fix=f"set batch_size so that batch_size x processes is {was['rows_per_step']}; or {anew}",
        )
    changed = sorted(name for name, digest in was["inputs"].items() if meta["inputs"].get(name) != digest)
    if changed:
        raise CheckpointError(f"changed since {where} was made: {', '.join(changed)}", fix=f"restore it, {anew}")


def _kind(meta: Json) -> str:
    sharded = "no DeepSpeed" if meta["zero_stage"] is None else f"ZeRO-{meta['zero_stage']}"
    return f"{meta['world_size']} process{'es' if meta['world_size'] > 1 else ''} with {sharded}"
