"""Rows of very different length for supervised fine-tuning, and a pipeline of seconds on the tiny model."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rlhf.cli import app
from rlhf.stages import pipeline

TOPICS = "sun star light moon sea sky blue red water rain cloud wind"


@pytest.fixture
def ragged_file(jsonl: Any) -> str:
    """43 demonstrations of 1 to 20 words: with a batch of 8 the last one of an epoch has 3 rows."""
    draw = random.Random(0)
    words = ["the", "sun", "star", "light", "is", "big", "hot", "gives", "us", "water", "rain", "wind", "tree", "fish"]

    def text(longest: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, longest)))

    return jsonl("ragged.jsonl", [{"prompt": f"explain {text(6)}", "completion": text(20)} for _ in range(43)])


@pytest.fixture
def ragged_sft(stage_config: Any, ragged_file: str, tmp_path: Path) -> Callable[..., Any]:
    """`ragged_sft("name", ...)`: 20 steps of 8 rows, 6 an epoch, evaluated after each; some steps are clipped."""

    def build(name: str, *, trainer: dict[str, Any] | None = None, **changes: Any) -> Any:
        settings = {
            "run_dir": str(tmp_path / name),
            "dataset": {"path": ragged_file},
            "eval_dataset": {"path": ragged_file, "limit": 5},
            "batch_size": 8,
            "lr": 1e-3,
            "trainer": {"max_steps": 20, "max_grad_norm": 3.0, **(trainer or {})},
        }
        return stage_config("sft", **{**settings, **changes})

    return build


@pytest.fixture(scope="session")
def pipeline_file(tiny: Any) -> Callable[..., Path]:
    """`pipeline_file(folder, rounds=2, ...)` writes a pipeline's YAML and data there; further keywords are its keys."""

    def write(root: Path, **changes: Any) -> Path:
        words = TOPICS.split()
        answers = ["the sun is hot .", "rain is water .", "it is a big star .", "we see the light ."]
        rows = [{"prompt": f"explain {w}", "completion": answers[i % 4]} for i, w in enumerate(words)]
        data = {"path": str(root / "rows.jsonl")}
        (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sampling = {"max_new_tokens": 8, "batch_size": 16}
        blocks = {
            "run_dir": str(root / "run"),
            "title": "Tiny",
            "model": tiny.path,
            "precision": "fp32",
            "tracking": {"wandb": "off"},
            "sft": {
                "dataset": data,
                "batch_size": 4,
                "micro_batch_size": 4,
                "max_length": 64,
                "lr": 1e-2,
                "epochs": 2,
            },
            "sample": {"prompts": data, "completions_per_prompt": 3, "sampling": sampling},
            "label": {"annotators": [{"name": "ada", "noise": 0.5}, {"name": "bob"}], "heldout_fraction": 0.25},
            "reward": {
                "loss": "all_pairs",
                "normalise_on": data,
                "batch_size": 4,
                "micro_batch_size": 2,
                "max_length": 64,
            },
            "ppo": {"prompts": data, "sampling": sampling, "steps": 2, "batch_size": 8, "optim": {"lr": 1e-3}},
            "evaluate": {"prompts": data, "sampling": sampling, "samples_per_prompt": 2},
        }
        (root / "p.yaml").write_text(yaml.safe_dump({**blocks, **changes}))
        return root / "p.yaml"

    return write


@pytest.fixture
def stages_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The stages that a pipeline starts, run in this process to save their start-up."""
    started: list[str] = []

    def run(command: list[str], **_: Any) -> Any:
        started.append(command[3])
        result = CliRunner().invoke(app, command[3:])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return subprocess.CompletedProcess(command, result.exit_code)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "subprocess", SimpleNamespace(run=run))
        yield started
