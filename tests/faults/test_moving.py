"""A run goes on with another number of processes, and with other sharding, as if nothing had changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from forked_runs import start_ranks, untimed
from safetensors.torch import load_file

ROWS = 8
OPTIM = {"lr": 0.1, "eps": 1.0, "max_grad_norm": 1e9}
"""With a large eps an update is proportional to the gradient: rounding stays rounding."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 0), (1, 0)), ((1, 0), (2, 0)), ((2, 0), (2, 3)), ((2, 3), (1, 0)), ((2, 2), (2, 3)), ((3, 2), (2, 2))],
    ids=lambda job: f"{job[0]} of ZeRO-{job[1]}",
)
def test_any_processes_go_on(
    tmp_path: Path,
    config: Callable[..., list[str]],
    finished: Callable[..., Path],
    before: tuple[int, int],
    after: tuple[int, int],
) -> None:
    rows = 12 if 3 in (before[0], after[0]) else ROWS

    def run(job: tuple[int, int], log: str, **fault: object) -> list[int]:
        processes, zero = job
        command = config("run", batch_size=rows // processes, micro_batch_size=2, optim=OPTIM, steps=4)
        ranks = start_ranks(command, tmp_path / log, zero=zero, world_size=processes, **fault)
        return [rank.end() for rank in ranks]

    given = {"signal": "SIGTERM", "place": "update", "step": 1}
    assert set(run(before, "before", prepare="injections:signal_itself", given=given)) == {143}
    assert set(run(after, "after")) == {0}, (tmp_path / "after" / "rank_0.log").read_text()
    said = (tmp_path / "after" / "rank_0.log").read_text()
    number = {1: "one process"}.get(before[0], f"{before[0]} processes")
    assert f"going on after step 2, which {number}{f' under ZeRO-{before[1]}' if before[1] else ''} wrote" in said
    unharmed = finished(batch_size=rows, micro_batch_size=2, optim=OPTIM, steps=4)
    for folder in ("final", "critic"):
        mine, others = (load_file(path / folder / "model.safetensors") for path in (tmp_path / "run", unharmed))
        assert mine.keys() == others.keys()
        assert max(float((mine[name] - others[name]).abs().max()) for name in mine) < 1e-5
    assert [line["step"] for line in untimed(tmp_path / "run")] == [1, 2, 3, 4]
