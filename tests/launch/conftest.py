"""Whole stages under launch files, on the CPU, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.rollout.buffer import RolloutBuffer

ROOT = Path(__file__).resolve().parents[2]
FILES = {"ddp": "cpu", "zero1": "cpu_zero1", "zero2": "cpu_zero2", "zero3": "cpu_zero3"}
ON_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
UNLIKE = ("time/", "perf/", "train/reused_forwards")
"""Metrics that depend on the machine, or on how the work is cut into micro-batches."""


@dataclass
class Left:
    """What a run left behind."""

    folder: Path
    said: str

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Of all final models."""
        found = {}
        for part in ("final", "critic"):
            for file in sorted((self.folder / part).rglob("*.safetensors")):
                found |= {f"{part}.{file.parent.name}.{name}": tensor for name, tensor in load_file(file).items()}
        return found

    @property
    def result(self) -> dict[str, Any]:
        """result.json."""
        return json.loads((self.folder / "result.json").read_text())

    @property
    def answers(self) -> list[str]:
        """Of all rollouts, in the order of their files."""
        files = sorted((self.folder / "rollouts").glob("*.parquet"))
        return [rollout.response for file in files for rollout in RolloutBuffer.from_parquet(file).rollouts]

    @property
    def metrics(self) -> list[dict[str, float]]:
        """Lines of metrics.jsonl, without what is not the same on every machine."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith(UNLIKE)} for line in lines]

    def distance(self, other: Left) -> float:
        """Largest difference of any weight."""
        mine, theirs = self.weights, other.weights
        assert mine.keys() == theirs.keys()
        return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


@pytest.fixture
def launch(tmp_path: Path, stage_config: Callable[..., Any]) -> Callable[..., Left]:
    """`launch("ppo", "ddp", run="b", resume="auto", steps=3, ...)`: a finished run; "alone" is one process."""
    from rlhf.config import dump

    def go(stage: str, kind: str, *, run: str = "", resume: str = "auto", processes: int = 2, **changes: Any) -> Left:
        folder = tmp_path / (run or f"{stage}_{kind}")
        if stage in ("sft", "reward", "ppo"):  # where it counts per process
            changes["batch_size"] = changes.get("batch_size", 8) // (1 if kind == "alone" else processes)
        cfg = stage_config(stage, run_dir=str(folder), **changes)
        (tmp_path / "launched.yaml").write_text(dump(cfg), encoding="utf-8")
        command = ["-m", "rlhf", stage, str(tmp_path / "launched.yaml"), "--resume", resume]
        if kind != "alone":
            options = ["--config_file", f"launch/{FILES[kind]}.yaml", "--num_processes", str(processes)]
            command = ["-m", "accelerate.commands.launch", *options, *command]
        done = subprocess.run(
            ["timeout", "-k", "5", "300", sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **ON_CPU},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return Left(folder, done.stdout + done.stderr)

    return go
