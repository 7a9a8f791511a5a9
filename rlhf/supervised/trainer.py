"""`trl.SFTTrainer` whose batches, loss and metrics do not depend on how a batch is split over ranks and micro-batches.

The loss itself is TRL's: a sum over the trained tokens, divided by those of the whole batch over all ranks. What is
ours: which rows a step reads, how metrics are averaged, and what a checkpoint is (`rlhf.resume`).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback
from trl.trainer.sft_trainer import SFTTrainer

from rlhf.random_state import restore_rng, rng_state
from rlhf.resume import Resume
from rlhf.runtime import Runtime
from rlhf.supervised.batches import EpochLoader, GlobalBatches, Split, loader


class SplitFreeTrainer(SFTTrainer):
    """Same rows, loss and metrics for any number of ranks and any micro-batch size."""

    model: Any

    def __init__(self, resume: Resume, runtime: Runtime, *, in_background: bool, **kwargs: Any) -> None:
        """`in_background`: checkpoints are written while training goes on."""
        super().__init__(**kwargs)
        self._resume, self._runtime = resume, runtime
        self._in_background, self._ends = in_background, False
        self._sums = {"train": dict.fromkeys(_SUMS, 0.0), "eval": dict.fromkeys(_SUMS, 0.0)}
        self._logged_step = 0
        self.add_callback(SaveWhenDue(self))

    def run(self) -> None:
        """Train to the end, from the checkpoint if there is one."""
        if not self._resume.first_step:
            self.train()
        else:
            with TemporaryDirectory() as folder:  # the trainer reads its own state from a file
                (Path(folder) / "trainer_state.json").write_text(json.dumps(self._resume.state["trainer"]))
                self.train(resume_from_checkpoint=folder)
        self._resume.finish()

    # --- batches --------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> EpochLoader:
        """Micro-batches in the order of `args.seed`."""
        accumulation = self.args.gradient_accumulation_steps
        return self._loader(self.train_dataset, accumulation * self.args.train_batch_size, seed=self.args.seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> EpochLoader:
        """Each row once, as they stand."""
        return self._loader(eval_dataset or self.eval_dataset, self.args.eval_batch_size, seed=None)

    def _loader(self, dataset: Any, per_rank: int, *, seed: int | None) -> EpochLoader:
        args, ranks = self.args, self.accelerator.num_processes
        split = Split(per_rank * ranks, args.train_batch_size, self.accelerator.process_index, ranks)
        dataset = self._remove_unused_columns(dataset)
        return loader(
            dataset,
            GlobalBatches(len(dataset), split, seed=seed),
            self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    # --- metrics --------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss. Beside it, sums over tokens and ranks: TRL averages over micro-batches, whatever their size."""
        mode = "train" if self.model.training else "eval"
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = (result[0] if return_outputs else result).detach()
        trained = (inputs["labels"][..., 1:] != -100).sum()
        read = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["labels"].numel()
        # In training the loss is this rank's part of the batch's mean, times the ranks; else a mean of its own rows.
        weight = 1 / self.accelerator.num_processes if mode == "train" else trained
        tokens, loss_sum, filled = self._summed([trained, loss * weight, read * (trained == 0)])
        sums = self._sums[mode]
        sums["tokens"] += tokens
        sums["loss"] += loss_sum
        sums["correct"] += round(self._metrics[mode]["mean_token_accuracy"][-1] * tokens)
        if mode == "train":
            self._total_train_tokens -= int(filled)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        return result

    def _summed(self, values: list[Any]) -> list[float]:
        mine = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.args.device) for v in values])
        summed: Any = self.accelerator.reduce(mine, reduction="sum")
        return summed.tolist()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with means over all tokens since the last time, and of the loss over the steps."""
        mode = "eval" if "eval_loss" in logs else "train"
        sums, self._sums[mode] = self._sums[mode], dict.fromkeys(_SUMS, 0.0)
        if sums["tokens"]:
            self._metrics[mode]["mean_token_accuracy"] = [sums["correct"] / sums["tokens"]]
        if mode == "eval":
            logs["eval_loss"] = sums["loss"] / max(1.0, sums["tokens"])
        elif "loss" in logs:
            logs["loss"] = sums["loss"] / (self.state.global_step - self._logged_step)
            self._logged_step = self.state.global_step
        super().log(logs, start_time)

    # --- checkpoints: what `transformers.Trainer` calls, in our own format ------------------------------

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._resume.attach(self.model, self.optimizer, state=self._plain_state, tensors=self._random_tensors)
        if self._resume.first_step:
            scheduler: Any = self.lr_scheduler
            optimizer: Any = self.optimizer
            scheduler.load_state_dict(self._resume.state["scheduler"])
            for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = lr
            self._restore_counts(self._resume.state["counts"])
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights are there: `Resume.load_weights` comes before the trainer."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """This rank's random states. Another number of ranks has none to go on with: only dropout draws from them."""
        plain = self._resume.state.get("random", [])
        if checkpoint is not None and len(plain) == self._runtime.world_size:
            files, prefix = self._resume.tensors("random"), f"{self._runtime.rank}."
            names = [name for name in files.names() if name.startswith(prefix)]
            restore_rng({n.removeprefix(prefix): files.whole(n) for n in names}, plain[self._runtime.rank])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._ends:
            self._resume.save_and_end(self.state.global_step)
        self._resume.save(self.state.global_step, in_background=self._in_background)

    def wants_checkpoint(self) -> bool:
        """Whether one is due, or the run is asked to end; after every step, on all ranks.

        Not in the last step, which ends the run by itself: transformers would go on from there with a step too many.
        """
        self._ends = self._runtime.is_asked_to_end() and self.state.global_step < self.state.max_steps
        self._resume.commit_if_written()
        return self._ends or self._resume.is_due(self.state.global_step, self.state.max_steps)

    def _plain_state(self) -> dict[str, Any]:
        """What is no tensor; the random states are those of all ranks."""
        scheduler: Any = self.lr_scheduler
        return {
            "trainer": asdict(self.state),
            "scheduler": scheduler.state_dict(),
            "counts": {
                "tokens": self._total_train_tokens,
                "sums": dict(self._sums["train"]),
                "logged": self._logged_step,
            },
            "random": self._runtime.gather_objects([rng_state()[1]]),
        }

    def _random_tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"random": {f"{self._runtime.rank}.{name}": tensor for name, tensor in rng_state()[0].items()}}

    def _restore_counts(self, counts: dict[str, Any]) -> None:
        self._total_train_tokens, self._logged_step = counts["tokens"], counts["logged"]
        self._sums["train"] = dict(counts["sums"])


class SaveWhenDue(TrainerCallback):
    """Asks for a checkpoint; at the end of an epoch after the evaluation there, which a resumed run skips."""

    def __init__(self, trainer: SplitFreeTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ends_epoch = state.epoch == int(state.epoch)
        control.should_save = not ends_epoch and self._trainer.wants_checkpoint()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = self._trainer.wants_checkpoint()


_SUMS = ("tokens", "loss", "correct")
