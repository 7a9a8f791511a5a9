"""The launcher's part: it ends what hangs, restarts what died, and hands SIGTERM on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked_runs import differences, free_port
from launched import Launched, is_running

pytestmark = pytest.mark.slow
STEPS = 6


@pytest.fixture
def launch(tmp_path: Path, config: Callable[..., list[str]]) -> Iterator[Callable[..., Launched]]:
    """`launch(*options, NAME="...")`: two processes of one run into the folder `run`."""
    jobs = []

    def start(*options: str, **environment: str) -> Launched:
        meeting = {"PET_NNODES": "1", "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "PET_RDZV_ID": "test"}
        options = ("--num_processes", "2", "--rdzv_backend", "c10d", *options)
        command = config("run", batch_size=4, steps=STEPS)
        jobs.append(Launched("cpu.yaml", [*options], command, tmp_path / "job.log", meeting | environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def test_a_killed_rank_is_started_again_with_the_others(
    tmp_path: Path, launch: Callable[..., Launched], finished_ranks: Callable[..., Path]
) -> None:
    job = launch("--max_restarts", "1")
    job.wait_for((tmp_path / "run" / "checkpoints" / "step_1").exists)
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.end() == 0, job.said()
    assert "going on after step" in job.said()
    assert differences(tmp_path / "run", finished_ranks(0, steps=STEPS)) == []


def test_a_stopped_rank_ends_the_job_and_nothing_runs_on(
    tmp_path: Path, launch: Callable[..., Launched], finished_ranks: Callable[..., Path]
) -> None:
    job = launch(RLHF_TIMEOUT_S="10", PET_SHUTDOWN_TIMEOUT="5")
    job.wait_for((tmp_path / "run" / "checkpoints" / "step_1").exists)
    ranks = job.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    assert job.end() not in (0, 2), job.said()
    assert not any(is_running(pid) for pid in ranks.values())
    again = launch()
    assert again.end() == 0, again.said()
    assert differences(tmp_path / "run", finished_ranks(0, steps=STEPS)) == []


def test_sigterm_to_the_launcher_saves_a_checkpoint(
    tmp_path: Path, launch: Callable[..., Launched], finished_ranks: Callable[..., Path]
) -> None:
    job = launch(PET_SHUTDOWN_TIMEOUT="120")
    job.wait_for((tmp_path / "run" / "checkpoints" / "step_1").exists)
    job.send(signal.SIGTERM)
    assert job.end() != 0, job.said()
    assert "ended by SIGTERM after step" in job.said()
    assert not (tmp_path / "run" / "result.json").exists()
    again = launch()
    assert again.end() == 0, again.said()
    assert differences(tmp_path / "run", finished_ranks(0, steps=STEPS)) == []
