"""A disk that runs full, a real one: a clear error, nothing half-written, and on it goes when there is space again."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_runs import Forked, differences, left_over, start_ranks

from rlhf.checkpoint import Checkpoints


def mount(*options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Of 8 MB; the folder `run` on it is the run's."""
    path = tmp_path / "disk"
    path.mkdir()
    try:
        mount("-o", "size=8m", "tmpfs", str(path))
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def fault(kind: str, place: str, step: int, **given: Any) -> dict[str, Any]:
    return {"prepare": f"injections:{kind}", "given": {"place": place, "step": step, "rank": 0, **given}}


def panel(run: Forked) -> str:
    """What the run said, without the frame and the line breaks of its panel."""
    return " ".join(run.said().translate(str.maketrans("", "", "│╭╮╰╯─")).split())


def verified(run: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none; none of them may be damaged."""
    said: list[str] = []
    found = Checkpoints(run, say=said.append, writer=False).latest()
    assert said == []
    return found.step if found else 0


@pytest.mark.parametrize(
    ("place", "step", "words"),
    [
        (
            "checkpoint",
            1,
            ["CheckpointError", "cannot write", "step_2", "No space left", "older checkpoints are intact"],
        ),
        pytest.param("log", 0, ["No space left on device", "free disk space"], marks=pytest.mark.slow),
        pytest.param("update", 1, ["CheckpointError", "step_2", "bytes, the disk has 0 free"], marks=pytest.mark.slow),
        ("export", 2, ["No space left on device", "free disk space"]),
    ],
)
def test_a_run_on_a_full_disk_says_so_and_goes_on(
    tmp_path: Path,
    disk: Path,
    config: Callable[..., list[str]],
    finished: Callable[..., Path],
    place: str,
    step: int,
    words: list[str],
) -> None:
    command = config("disk/run")
    run = Forked(command, tmp_path / "run.log", **fault("fill_disk", place, step, file=str(disk / "filler")))
    assert run.end() == 2, run.said()
    assert all(word in panel(run) for word in words), panel(run)
    assert str(disk / "run") in run.said().replace("\n", "").replace("│", "").replace(" ", "")
    assert "Traceback" not in run.said()
    assert verified(disk / "run") == step
    assert left_over(disk / "run") == []
    assert not any((disk / "run" / name).exists() for name in ("final", "result.json"))
    (disk / "filler").unlink()
    again = Forked(command, tmp_path / "again.log")
    assert again.end() == 0, again.said()
    assert differences(disk / "run", finished()) == []


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_ends_all_with_the_same_error(
    tmp_path: Path, disk: Path, config: Callable[..., list[str]], finished_ranks: Callable[..., Path], rank: int
) -> None:
    command = config("disk/run", batch_size=4)
    ranks = start_ranks(command, tmp_path, **fault("fill_disk", "checkpoint", 1, file=str(disk / "filler"), rank=rank))
    assert [one.end() for one in ranks] == [2, 2], ranks[0].said() + ranks[1].said()
    assert "No space left" in panel(ranks[0])
    assert verified(disk / "run") == 1
    (disk / "filler").unlink()
    again = start_ranks(command, tmp_path / "again")
    assert [one.end() for one in again] == [0, 0], again[0].said()
    assert differences(disk / "run", finished_ranks(0)) == []


@pytest.mark.slow
@pytest.mark.parametrize(("place", "step"), [("checkpoint", 1), ("export", 2)])
def test_a_limit_of_bytes_counts_as_a_full_disk(
    tmp_path: Path, config: Callable[..., list[str]], finished: Callable[..., Path], place: str, step: int
) -> None:
    """Without a disk of its own: files of at most 20 kB."""
    command = config("run")
    run = Forked(command, tmp_path / "run.log", **fault("small_files", place, step, bytes=20_000))
    assert run.end() == 2, run.said()
    assert "File too large" in panel(run)
    assert verified(tmp_path / "run") == step
    assert left_over(tmp_path / "run") == []
    again = Forked(command, tmp_path / "again.log")
    assert again.end() == 0, again.said()
    assert differences(tmp_path / "run", finished()) == []
