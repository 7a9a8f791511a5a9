"""One side of bench_sft: `ours` or `trl`; prints one JSON line with its speed. The first step warms up."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from harness import BUILD
from sides import prepare

ROWS, MICRO_BATCH = 64, 8


def demonstrations() -> Path:
    """The first rows of the demo's demonstrations."""
    from rlhf.config import resolve_path

    file = BUILD / "demonstrations.jsonl"
    with open(resolve_path("shipped:data/plain_language/demonstrations.train.jsonl")) as source:
        file.write_text("".join(islice(source, ROWS)))
    return file


def timed_steps(run: Any) -> list[float]:
    """The clock after every optimizer step of whatever trainer `run` makes."""
    import trl
    from transformers import TrainerCallback

    marks: list[float] = []

    class Mark(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    plain = trl.SFTTrainer.__init__

    def marked(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.add_callback(Mark())

    trl.SFTTrainer.__init__ = marked
    run()
    return marks


def ours(model: str, data: Path) -> None:
    from rlhf import config
    from rlhf.runs import RunOptions
    from rlhf.stages import sft

    run_dir = BUILD / "ours_sft"
    shutil.rmtree(run_dir, ignore_errors=True)
    plain = {
        "run_dir": str(run_dir),
        "model": model,
        "dataset": {"path": str(data)},
        "batch_size": MICRO_BATCH,
        "micro_batch_size": MICRO_BATCH,
        "tracking": {"wandb": "off"},
    }
    file = run_dir.with_suffix(".yaml")
    file.write_text(json.dumps(plain))
    sft.main(config.load(str(file), "sft", []), RunOptions())
    shutil.rmtree(run_dir)


def trl_default(model: str, data: Path) -> None:
    import torch
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    where = {} if torch.cuda.is_available() else {"use_cpu": True}
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=1,
        per_device_train_batch_size=MICRO_BATCH,
        save_strategy="no",
        report_to=[],
        **where,
    )
    rows = load_dataset("json", data_files=str(data), split="train")
    SFTTrainer(model=model, args=config, train_dataset=rows).train()


def main() -> None:
    name = sys.argv[1]
    model, _ = prepare()
    data = demonstrations()
    with contextlib.redirect_stdout(sys.stderr):
        marks = timed_steps(lambda: (ours if name == "ours" else trl_default)(model, data))
    seconds = marks[-1] - marks[0]
    samples = (len(marks) - 1) * MICRO_BATCH
    print(json.dumps({"samples_per_s": samples / seconds, "steps": len(marks), "version": f"trl {version('trl')}"}))


if __name__ == "__main__":
    main()
