"""Out of memory: the error names the phase and the setting to lower, and with it lowered the same run goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked_runs import Forked, untimed

from rlhf.errors import MemoryLimitError
from rlhf.runtime import explaining_memory


@pytest.mark.parametrize(
    ("place", "fix", "smaller"),
    [
        pytest.param(
            "generate", "lower sampling.batch_size, which is 16", "sampling.batch_size=4", marks=pytest.mark.slow
        ),
        pytest.param("score", "lower micro_batch_size, which is 4", "micro_batch_size=2", marks=pytest.mark.slow),
        ("update", "or set gradient_checkpointing: true", "gradient_checkpointing=true"),
    ],
)
def test_the_phase_and_the_setting_are_named_and_the_run_goes_on(
    tmp_path: Path, config: Callable[..., list[str]], place: str, fix: str, smaller: str
) -> None:
    command, given = config("run"), {"place": place, "step": 1}
    run = Forked(command, tmp_path / "run.log", prepare="injections:little_memory", given=given)
    assert run.end() == 2, run.said()
    said = " ".join(run.said().replace("│", "").split())
    assert "MemoryLimitError" in said
    assert f"out of memory in the phase '{place}'" in said
    assert "can't allocate memory" in said
    assert fix in said
    again = Forked([*command, smaller], tmp_path / "again.log")
    assert again.end() == 0, again.said()
    assert "going on after step 1" in again.said()
    assert [line["step"] for line in untimed(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "explained"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), True),
        (MemoryError(), True),
        (RuntimeError("a shape is wrong"), False),
    ],
)
def test_only_lack_of_memory_is_explained(error: Exception, explained: bool) -> None:
    with (
        pytest.raises(MemoryLimitError if explained else RuntimeError) as caught,
        explaining_memory("train", "lower x"),
    ):
        raise error
    assert caught.type is (MemoryLimitError if explained else RuntimeError)
    if isinstance(caught.value, MemoryLimitError):
        assert caught.value.message.startswith("out of memory in the phase 'train': ")
        assert "more" not in caught.value.message
        assert caught.value.fix == "lower x"
