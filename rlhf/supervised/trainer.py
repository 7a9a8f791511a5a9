"""`trl.SFTTrainer` whose batches, loss and metrics do not depend on how a batch is split over ranks and micro-batches.

The loss itself is TRL's: a sum over the trained tokens, divided by those of the whole batch over all ranks. What is
ours: which rows a step reads, how metrics are averaged, and what a checkpoint is (`rlhf.supervised.saver`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback
from trl.trainer.sft_trainer import SFTTrainer

from rlhf.supervised.batches import EpochLoader, GlobalBatches, Split, loader
from rlhf.supervised.saver import SFTSaver


class SplitFreeTrainer(SFTTrainer):
    """Same rows, loss and metrics for any number of ranks and any micro-batch size."""

    model: Any

    def __init__(self, saver: SFTSaver, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._saver = saver
        self._sums = {"train": dict.fromkeys(_SUMS, 0.0), "eval": dict.fromkeys(_SUMS, 0.0)}
        self._logged_step = 0
        self.add_callback(SaveWhenDue(saver))

    def run(self) -> None:
        """Train to the end, from the checkpoint that the saver found."""
        found = self._saver.found
        self.train(resume_from_checkpoint=str(found.path) if found else None)

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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._saver.save(self)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._saver.load_weights(self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._saver.load_optimizer(self)
            self._saver.load_counts(self)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._saver.load_rng()

    def counts(self) -> dict[str, Any]:
        """What was counted in all, and since the last line of metrics."""
        return {"tokens": self._total_train_tokens, "sums": self._sums["train"], "logged_step": self._logged_step}

    def restore_counts(self, counts: dict[str, Any]) -> None:
        """Go on counting from what `counts` gave."""
        self._total_train_tokens, self._logged_step = counts["tokens"], counts["logged_step"]
        self._sums["train"] = dict(counts["sums"])


class SaveWhenDue(TrainerCallback):
    """Asks for a checkpoint; at the end of an epoch after the evaluation there, which a resumed run skips."""

    def __init__(self, saver: SFTSaver) -> None:
        self._saver = saver

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        ends_epoch = state.epoch == int(state.epoch)
        control.should_save = not ends_epoch and self._saver.is_due(state.global_step, state.max_steps)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = self._saver.is_due(state.global_step, state.max_steps)


_SUMS = ("tokens", "loss", "correct")
