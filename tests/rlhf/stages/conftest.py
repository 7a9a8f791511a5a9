"""Supervised fine-tuning on rows of very different length, for tests of its splits and of its checkpoints."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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
