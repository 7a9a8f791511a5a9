"""Damage to a real checkpoint: every flipped bit, cut or missing file of it is seen, and the one before is used."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked_runs import start_ranks

from rlhf.checkpoint import Checkpoints, open_checkpoint
from rlhf.errors import CheckpointError


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def positions(folder: Path, count: int, *, whole: str) -> Iterator[tuple[Path, int]]:
    """About `count` places, evenly over all bytes, in every file; and every byte of the files that end with `whole`."""
    files = sorted(folder.iterdir())
    pace = max(1, sum(file.stat().st_size for file in files) // count)
    for file in files:
        step = 1 if whole and file.suffix == whole else min(pace, max(1, file.stat().st_size // 5))
        yield from ((file, position) for position in range(0, file.stat().st_size, step))


@pytest.fixture
def checkpoints(tmp_path: Path, config: Callable[..., list[str]]) -> Callable[[int], Path]:
    """`checkpoints(ranks)`: the folder of two checkpoints, `step_1` and `step_2`, of a PPO run."""

    def make(ranks: int) -> Path:
        processes = start_ranks(config("run", batch_size=8 // ranks), tmp_path, world_size=ranks)
        assert [process.end() for process in processes] == [0] * ranks, processes[0].said()
        return tmp_path / "run" / "checkpoints"

    return make


def test_some_flips_are_seen_and_the_checkpoint_before_is_used(checkpoints: Callable[[int], Path]) -> None:
    folder = checkpoints(1)
    said: list[str] = []
    store = Checkpoints(folder.parent, say=said.append)
    tried = list(positions(folder / "step_2", 40, whole=""))
    for i, (file, position) in enumerate(tried):
        flip(file, position, i % 8)
        found = store.latest()
        assert found is not None
        assert found.step == 1
        assert file.name in said[-2]
        flip(file, position, i % 8)
    assert len(tried) >= 50
    assert open_checkpoint(folder / "step_2").step == 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_thousands_of_flips_are_seen(checkpoints: Callable[[int], Path], ranks: int) -> None:
    folder = checkpoints(ranks) / "step_2"
    draw, tried = random.Random(ranks), dict.fromkeys((file.name for file in folder.iterdir()), 0)
    for file, position in positions(folder, 3000, whole=".json"):
        bit = draw.randrange(8)
        flip(file, position, bit)
        with pytest.raises(CheckpointError, match=file.name):
            open_checkpoint(folder)
        flip(file, position, bit)
        tried[file.name] += 1
    assert open_checkpoint(folder).step == 2
    print(f"\nbits flipped, all seen: {sum(tried.values())} {tried}")
    assert sum(tried.values()) > 3000


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_cut_longer_and_missing_files_are_seen(checkpoints: Callable[[int], Path], ranks: int) -> None:
    folder = checkpoints(ranks) / "step_2"
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], whole[:-1], whole + b"\n", None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=file.name):
                open_checkpoint(folder)
            file.write_bytes(whole)
    assert open_checkpoint(folder).step == 2
