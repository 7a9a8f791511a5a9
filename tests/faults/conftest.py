"""A tiny PPO run that can be started in a moment, as often as faults ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_runs import Forked, kill_all, start_ranks, start_server

from rlhf.config import dump

if not Path("/proc/self/task").is_dir():  # processes are looked at through Linux's /proc
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def server() -> None:
    start_server()


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    yield
    kill_all()


@pytest.fixture
def config(tmp_path: Path, stage_config: Callable[..., Any]) -> Callable[..., list[str]]:
    """`config("name", steps=4, ...)`: the command line of a PPO run into the folder `name`, a checkpoint every step."""

    def write(name: str, **changes: Any) -> list[str]:
        settings = {"steps": 3, "save_every": 1, "keep_checkpoints": 2, "epochs": 1, "samples_per_step": 2}
        cfg = stage_config("ppo", run_dir=str(tmp_path / name), **{**settings, **changes})
        (tmp_path / f"{name}.yaml").write_text(dump(cfg), encoding="utf-8")
        return ["ppo", str(tmp_path / f"{name}.yaml")]

    return write


@pytest.fixture(scope="session")
def finished_before() -> dict[str, Path]:
    """Runs that nothing happened to, which any test may read."""
    return {}


@pytest.fixture
def finished(tmp_path: Path, config: Callable[..., list[str]], finished_before: dict[str, Path]) -> Callable[..., Path]:
    """`finished(...)`: the folder of a run of one process that nothing happened to."""

    def run(**changes: Any) -> Path:
        key = f"one process {sorted(changes.items())}"
        if key not in finished_before:
            process = Forked(config("unharmed", **changes), tmp_path / "unharmed.log")
            assert process.end() == 0, process.said()
            finished_before[key] = tmp_path / "unharmed"
        return finished_before[key]

    return run


@pytest.fixture
def finished_ranks(
    tmp_path: Path, config: Callable[..., list[str]], finished_before: dict[str, Path]
) -> Callable[..., Path]:
    """`finished_ranks(zero, ...)`: the same of two ranks with 4 rows each."""

    def run(zero: int, **changes: Any) -> Path:
        key = f"two ranks {zero} {sorted(changes.items())}"
        if key not in finished_before:
            ranks = start_ranks(config("unharmed", batch_size=4, **changes), tmp_path / "unharmed logs", zero=zero)
            assert [rank.end() for rank in ranks] == [0, 0], ranks[0].said()
            finished_before[key] = tmp_path / "unharmed"
        return finished_before[key]

    return run
