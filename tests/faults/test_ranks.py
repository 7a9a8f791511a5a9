"""A rank that dies or hangs: the others end within the timeout, and the same command goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_runs import differences, start_ranks

TIMEOUT_S = 20
"""What ranks wait for one another; a step takes less on a busy machine, too."""


@pytest.mark.parametrize(
    ("number", "rank", "place", "zero"),
    [
        ("SIGKILL", 1, "update", 0),
        *(
            pytest.param(*at, marks=pytest.mark.slow)
            for at in [
                ("SIGSTOP", 1, "update", 0),
                ("SIGKILL", 0, "checkpoint", 0),
                ("SIGKILL", 1, "checkpoint", 2),
                ("SIGSTOP", 0, "generate", 0),
                ("SIGSTOP", 1, "update", 2),
                ("SIGKILL", 1, "update", 3),
                ("SIGSTOP", 1, "score", 3),
            ]
        ),
    ],
)
def test_the_other_rank_ends_and_the_job_goes_on(
    tmp_path: Path,
    config: Callable[..., list[str]],
    finished_ranks: Callable[..., Path],
    number: str,
    rank: int,
    place: str,
    zero: int,
) -> None:
    command, wait = config("run", batch_size=4), {"RLHF_TIMEOUT_S": str(TIMEOUT_S)}
    given = {"signal": number, "place": place, "step": 1, "rank": rank}
    ranks = start_ranks(command, tmp_path, zero=zero, environment=wait, prepare="injections:signal_itself", given=given)
    harmed, other = ranks[rank], ranks[1 - rank]
    assert other.end() not in (0, 2, 143), other.said()
    assert harmed.runs == (number == "SIGSTOP")
    harmed.send(signal.SIGKILL)  # as the launcher does with what does not end
    assert harmed.end() == -signal.SIGKILL
    assert not (tmp_path / "run" / "result.json").exists()
    again = start_ranks(command, tmp_path / "again", zero=zero)
    assert [one.end() for one in again] == [0, 0], again[0].said()
    assert "going on after step 1" in again[0].said()
    assert differences(tmp_path / "run", finished_ranks(zero)) == []
