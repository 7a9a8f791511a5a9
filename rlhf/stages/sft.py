"""Supervised fine-tuning: a thin face on `trl.SFTTrainer`, which brings packing, PEFT and chat templates."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from rlhf.checkpoint import export_folder
from rlhf.config import did_you_mean
from rlhf.config_schema import DatasetConfig, SFTStage
from rlhf.data.records import read_demonstrations
from rlhf.data.templates import located, prompt_tokens, response_tokens, show_examples
from rlhf.errors import ConfigError, DataError
from rlhf.models.adapters import save_adapter
from rlhf.models.load import load_causal_lm, load_tokenizer
from rlhf.models.tuning import apply_tuning, merge_tuning, storage_dtype
from rlhf.progress import Progress
from rlhf.resume import Resume
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime
from rlhf.tracking import Tracker
from rlhf.types import RunResult

OURS = (
    *("save_steps", "save_total_limit", "save_only_model", "save_on_each_node", "load_best_model_at_end"),
    *("resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint"),
    *("train_sampling_strategy", "dataloader_drop_last", "auto_find_batch_size"),
    *("average_tokens_across_devices", "accelerator_config", "deepspeed"),
)
"""Keys of trl for what `rlhf.supervised` does in its own way: checkpoints, and batches that no split changes."""


def main(cfg: SFTStage, options: RunOptions) -> RunResult:
    """Train on the demonstrations; leaves `final/` and metrics.jsonl."""
    from rlhf.supervised.trainer import SplitFreeTrainer

    runtime = Runtime.start(seed=cfg.seed, precision=cfg.precision)
    tokenizer = load_tokenizer(cfg.model)
    resume = Resume.open(cfg, options, runtime, say=print)
    with (
        Progress(stage="sft", enabled=runtime.is_main) as progress,
        runtime.minding_sigterm(),
        Tracker.open(
            cfg.run_dir,
            cfg.tracking,
            stage="sft",
            config=cfg.model_dump(mode="json"),
            enabled=runtime.is_main,
            resume_step=resume.first_step or None,
            say=progress.say,
        ) as tracker,
    ):
        train = to_dataset(cfg.dataset, tokenizer, cfg, progress)
        evaluation = to_dataset(cfg.eval_dataset, tokenizer, cfg, progress) if cfg.eval_dataset else None
        reporter = Reporter(progress, tracker)
        arguments = trainer_config(cfg, has_eval=evaluation is not None)
        runtime.load_models_whole()  # after `trainer_config`, which asks for the opposite
        lm = load_causal_lm(cfg.model, dtype=storage_dtype(cfg.tuning, runtime.dtype))
        handle = apply_tuning(lm, cfg.tuning, runtime.dtype)
        resume.load_weights(handle)
        resume.begin()
        if runtime.uses_deepspeed:
            handle.forward = runtime.autocast()(handle.forward)
        try:
            trainer = SplitFreeTrainer(
                resume,
                runtime,
                in_background=cfg.save_in_background,
                model=handle,
                args=arguments,
                train_dataset=train,
                eval_dataset=evaluation,
                processing_class=tokenizer,
                callbacks=[reporter],
            )
        except (TypeError, ValueError) as error:  # values that contradict one another
            raise ConfigError(f"trainer: trl.SFTTrainer refuses it: {error}", fix="correct the value") from error
        trainer.remove_callback(_printer_callback())
        if runtime.is_main:
            show_examples(progress.console, tokenizer, "SFT (prompt and completion)", trained_examples(trainer))
        trainer.run()
    final = Path(cfg.run_dir) / "final"
    runtime.make_whole(handle)
    if runtime.is_main:
        save_adapter(handle, Path(cfg.run_dir) / "adapter")
        with export_folder(final) as folder:
            merge_tuning(handle).to(runtime.dtype).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    runtime.barrier()
    summary = {"demonstrations": len(train), "steps": trainer.state.global_step, **reporter.last}
    return RunResult(cfg.run_dir, summary, {"model": str(final)})


def to_dataset(source: DatasetConfig, tokenizer: Any, cfg: SFTStage, progress: Progress) -> Any:
    """Demonstrations as TRL's tokenized dataset: `input_ids`, and `labels` that are -100 where nothing is trained.

    Tokenized here and not by TRL, so that every stage reads the same tokens: some chat templates end an answer
    with a line break after EOS, which no sampled answer has and nothing would ever train away.

    Raises:
        DataError: a demonstration leaves no room for its completion within `max_length`.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()  # TRL cuts to max_length in a moment; its bars would tear ours
    rows = read_demonstrations(source)
    progress.say(f"{source.path}: format {rows.format}, {len(rows)} demonstrations")
    progress.phase("tokenize", total=len(rows), unit="rows")
    converted, cut = [], 0
    for row in rows:
        prompt = located(row.where, prompt_tokens, tokenizer, row.prompt, chat=source.chat)
        if len(prompt) >= cfg.max_length:
            raise DataError(
                f"{row.where}: the prompt has {len(prompt)} tokens, max_length is {cfg.max_length}: nothing to train",
                fix="raise max_length, or shorten or remove the row",
            )
        tokens = prompt + response_tokens(tokenizer, row.completion, finished=True)
        cut += len(tokens) > cfg.max_length
        untrained = len(prompt) if cfg.completion_only_loss else 0
        converted.append({"input_ids": tokens, "labels": [-100] * untrained + tokens[untrained:]})
        progress.advance(1)
    if cut and not cfg.packing:
        progress.say(f"{source.path}: {cut} of {len(rows)} demonstrations are cut at max_length and teach no EOS")
    return Dataset.from_list(converted)


def trainer_config(cfg: SFTStage, *, has_eval: bool) -> Any:
    """`trl.SFTConfig` from our typed keys and the pass-through block.

    Raises:
        ConfigError: a key under `trainer:` is unknown to trl, or belongs to us.
    """
    import dataclasses

    from trl.trainer.sft_config import SFTConfig

    on_cpu = not torch.cuda.is_available()
    on_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    ours = {
        "output_dir": str(Path(cfg.run_dir) / "trainer"),
        "num_train_epochs": cfg.epochs,
        "per_device_train_batch_size": cfg.micro_batch_size,
        "per_device_eval_batch_size": cfg.micro_batch_size,
        "gradient_accumulation_steps": cfg.batch_size // cfg.micro_batch_size,
        "learning_rate": cfg.lr,
        "max_length": cfg.max_length,
        "packing": cfg.packing,
        "completion_only_loss": cfg.completion_only_loss,
        "save_strategy": "no",
        "seed": cfg.seed,
        # Under DeepSpeed it would turn the weights themselves to bf16; `main` wraps the forward in an autocast instead.
        "bf16": cfg.precision == "bf16" and not on_deepspeed,
        "use_cpu": on_cpu,
        "ddp_backend": "gloo" if on_cpu and processes > 1 else None,
        "report_to": [],
        "disable_tqdm": True,
    }
    defaults = {
        "eval_strategy": "epoch" if has_eval else "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "dataloader_pin_memory": not on_cpu,
    }
    known = {f.name: f.default for f in dataclasses.fields(SFTConfig)}
    check_trainer_keys(cfg.trainer, known, {*ours, *OURS})
    merged = {**defaults, **cfg.trainer, **ours}
    if "activation_checkpointing" in known:  # what transformers 5.20 calls it; the old name warns on every run
        merged.setdefault("activation_checkpointing", merged["gradient_checkpointing"])
    try:
        arguments = SFTConfig(**merged)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainer: trl.SFTConfig refuses it: {error}", fix="correct the value") from None
    _ = arguments.device  # counts the GPUs: a process would spread a batch over all that it sees
    arguments._n_gpu = min(1, arguments._n_gpu)
    if arguments.deepspeed_plugin is not None:  # the launch file speaks for our own loops
        arguments.deepspeed_plugin.deepspeed_config |= {
            "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
            "gradient_clipping": arguments.max_grad_norm,
        }
    return arguments


def check_trainer_keys(given: dict[str, Any], known: dict[str, Any], ours: Collection[str]) -> None:
    """`given` holds keys of trl (`known`, with their defaults) that are not `ours`, and values of their kind.

    Raises:
        ConfigError: it does not.
    """
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    for key, value in given.items():
        if key in ours:
            raise ConfigError(f"trainer.{key} is set by our own keys", fix="remove it, and set ours (see SFTStage)")
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"trainer.{key}: unknown to trl.SFTConfig{hint}", fix="correct or remove it")
        if isinstance(known[key], float) and not isinstance(value, int | float):
            raise ConfigError(f"trainer.{key}: {value!r} is not a number", fix="write a number")
    # transformers refuses these two only when the model is loaded and the data are tokenized.
    for key, choices in (("lr_scheduler_type", list(SchedulerType)), ("optim", list(OptimizerNames))):
        if (value := given.get(key, choices[0])) not in choices:
            names = [choice.value for choice in choices]
            hint = did_you_mean(str(value), names)
            raise ConfigError(f"trainer.{key}: {value!r} is unknown{hint}", fix=f"use one of {', '.join(names)}")


def trained_examples(trainer: Any) -> list[tuple[list[int], list[bool]]]:
    """(tokens, trained?) of the first two rows, from the very batch that the trainer would see."""
    rows = [trainer.train_dataset[i] for i in range(min(2, len(trainer.train_dataset)))]
    examples = []
    for row in rows:
        batch = trainer.data_collator([row])
        tokens, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        examples.append((tokens, [label != -100 for label in labels]))
    return examples


def _printer_callback() -> Any:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


class Reporter(TrainerCallback):
    """The trainer's numbers into our progress line and metrics.jsonl."""

    names = {"loss": "loss/train", "eval_loss": "loss/eval", "grad_norm": "train/grad_norm", "learning_rate": "lr"}

    def __init__(self, progress: Progress, tracker: Tracker) -> None:
        self._progress, self._tracker = progress, tracker
        self.last: dict[str, float] = {}
        self._tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for logs in state.log_history:  # of the run that this one goes on with
            self.last.update(self._metrics(logs))
        self._progress.phase("train", total=state.max_steps, unit="steps", done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        shown = {"loss": self.last["loss/train"]} if "loss/train" in self.last else {}
        self._progress.advance(1, **shown)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if metrics := self._metrics(logs or {}):
            self.last.update(metrics)
            self._tracker.log(state.global_step, metrics)

    def _metrics(self, logs: dict[str, Any]) -> dict[str, float]:
        found = {ours: float(logs[theirs]) for theirs, ours in self.names.items() if theirs in logs}
        for theirs, ours in (("mean_token_accuracy", "train/token_accuracy"), ("num_tokens", "train/tokens")):
            if theirs in logs and math.isfinite(float(logs[theirs])):
                found[ours] = float(logs[theirs])
        return found
