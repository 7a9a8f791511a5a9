"""NaN in the loss of one rank: all ranks skip that optimizer step, whatever shards them, and say so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from forked_runs import start_ranks, untimed
from safetensors.torch import load_file

from rlhf.rollout.buffer import RolloutBuffer


def learned(run: Path, step: int) -> dict[str, bytes]:
    """Weights and moments of a checkpoint, of both ranks."""
    files = (run / "checkpoints" / f"step_{step}").glob("*.safetensors")
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("zero", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_skip_a_step_together(tmp_path: Path, config: Callable[..., list[str]], zero: int) -> None:
    """One update a step, so the checkpoint after the poisoned one is the checkpoint before it."""
    command = config("run", steps=4, batch_size=4, micro_batch_size=4, minibatches=1, keep_checkpoints=3)
    options = {"zero": zero, "prepare": "injections:nan_loss", "given": {"rank": 1, "calls": [1]}}
    ranks = start_ranks(command, tmp_path, **options)
    assert [rank.end() for rank in ranks] == [0, 0], ranks[0].said() + ranks[1].said()
    lines = untimed(tmp_path / "run")
    assert [line["train/skipped_updates"] for line in lines] == [0, 1, 0, 0]
    after = [learned(tmp_path / "run", step) for step in (1, 2, 3)]
    assert len(after[0]) == 4
    assert after[1] == after[0]
    assert all(after[2][name] != after[1][name] for name in after[1])
    for tensor in load_file(tmp_path / "run" / "final" / "model.safetensors").values():
        assert tensor.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 2])
def test_three_in_a_row_end_all_ranks_and_keep_their_rollouts(
    tmp_path: Path, config: Callable[..., list[str]], zero: int
) -> None:
    command = config("run", steps=6, batch_size=4, micro_batch_size=4, minibatches=1)
    options = {"zero": zero, "prepare": "injections:nan_loss", "given": {"rank": 1, "calls": [0, 1, 2]}}
    ranks = start_ranks(command, tmp_path, **options)
    assert [rank.end() for rank in ranks] == [2, 2], ranks[0].said() + ranks[1].said()
    assert "the gradient was not finite 3 times in a row" in " ".join(ranks[0].said().split())
    kept = sorted((tmp_path / "run" / "failed").iterdir())
    assert [path.name for path in kept] == [f"step_000003_rank_{rank}.parquet" for rank in (0, 1)]
    assert [len(RolloutBuffer.from_parquet(path).rollouts) for path in kept] == [4, 4]
