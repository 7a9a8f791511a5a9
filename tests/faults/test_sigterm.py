"""SIGTERM anywhere in a PPO run: it ends with code 143 and a checkpoint, and the same command finishes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked_runs import Forked, differences, start_ranks, untimed


def steps_saved(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoints/*"))


def ask(place: str, step: int, rank: int = 0) -> dict[str, Any]:
    given = {"signal": "SIGTERM", "place": place, "step": step, "rank": rank}
    return {"prepare": "injections:signal_itself", "given": given}


# Before an update begins the rollouts of the step are worth nothing; afterwards the step is finished.
KEPT = {("generate", 0): 0, ("generate", 2): 2, ("score", 2): 2, ("update", 0): 1, ("update", 2): 3, ("log", 1): 2}
SHORT = [("generate", 2), ("update", 2)]


@pytest.mark.parametrize(
    ("place", "step"), [at if at in SHORT else pytest.param(*at, marks=pytest.mark.slow) for at in KEPT]
)
def test_nothing_but_rollouts_is_lost(
    tmp_path: Path, config: Callable[..., list[str]], finished: Callable[..., Path], place: str, step: int
) -> None:
    """With no checkpoint but the one that the signal asks for."""
    command, kept = config("run", save_every=0), KEPT[place, step]
    run = Forked(command, tmp_path / "run.log", **ask(place, step))
    assert run.end() == 143, run.said()
    assert f"ended by SIGTERM after step {kept}; run the same command again to go on" in run.said()
    assert "Traceback" not in run.said()
    assert steps_saved(tmp_path / "run") == ([f"step_{kept}"] if kept else [])
    lines = untimed(tmp_path / "run") if kept else []
    assert [line["step"] for line in lines] == list(range(1, kept + 1))
    assert not (tmp_path / "run" / "result.json").exists()
    again = Forked(command, tmp_path / "again.log")
    assert again.end() == 0, again.said()
    assert differences(tmp_path / "run", finished(save_every=0)) == []


@pytest.mark.slow
def test_a_checkpoint_that_is_there_is_not_written_twice_and_a_finished_run_ends_well(
    tmp_path: Path, config: Callable[..., list[str]], finished: Callable[..., Path]
) -> None:
    unharmed = finished()
    for name, place, step, code in (("a", "checkpoint", 0, 143), ("b", "export", 2, 0), ("c", "load", -1, -15)):
        run = Forked(config(name), tmp_path / f"{name}.log", **ask(place, step))
        assert run.end() == code, run.said()
        again = Forked(config(name), tmp_path / f"{name}.log")
        assert again.end() == 0, again.said()
        assert differences(tmp_path / name, unharmed) == []


@pytest.mark.parametrize(
    ("zero", "place"),
    [
        (0, "generate"),
        *(pytest.param(*at, marks=pytest.mark.slow) for at in [(0, "update"), (2, "score"), (3, "generate")]),
    ],
)
def test_all_ranks_agree_when_one_is_asked(
    tmp_path: Path,
    config: Callable[..., list[str]],
    finished_ranks: Callable[..., Path],
    zero: int,
    place: str,
) -> None:
    command = config("run", batch_size=4, save_every=0)
    ranks = start_ranks(command, tmp_path, zero=zero, **ask(place, 1, rank=1))
    assert [rank.end() for rank in ranks] == [143, 143], ranks[0].said() + ranks[1].said()
    assert steps_saved(tmp_path / "run") == ["step_2" if place == "update" else "step_1"]
    assert not (tmp_path / "run" / "result.json").exists()
    again = start_ranks(command, tmp_path / "again", zero=zero)
    assert [rank.end() for rank in again] == [0, 0], again[0].said()
    assert differences(tmp_path / "run", finished_ranks(zero, save_every=0)) == []
