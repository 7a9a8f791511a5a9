"""SIGKILL anywhere in a PPO run: the same command goes on, and ends bit for bit where the unharmed run ends."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked_runs import Forked, differences, left_over
from kill_points import PHASES, Board

TICK = 1 / os.sysconf("SC_CLK_TCK")
AGAIN = 0.25
"""Chance that a run that goes on after a kill is killed, too."""


@dataclass
class Kill:
    """One SIGKILL that hit."""

    kind: str
    phase: str
    lost_s: float
    """Work since the last checkpoint, which is done again."""


class Fuzz:
    """Kills runs at random points and lets them go on.

    A point is a call of the operating system that changes the run folder, a line of our code, or a time on the
    process's clock: within torch's kernels, too.
    """

    def __init__(self, folder: Path, config: Callable[..., list[str]], seed: int) -> None:
        self._folder, self._config, self._random = folder, config, random.Random(seed)
        self.kills: list[Kill] = []
        self.calls, self.lines, self.cpu_s = self._measure("calls"), self._measure("lines"), 0.0
        self.unharmed = folder / "unharmed"
        self._attempt("unharmed", "none", 0)

    def _start(self, name: str, given: dict[str, Any]) -> Forked:
        given = {"board": str(self._folder / f"{name}.board"), "run_dir": str(self._folder / name), **given}
        (self._folder / f"{name}.board").unlink(missing_ok=True)
        command = self._config(name)
        return Forked(command, self._folder / f"{name}.log", prepare="kill_points:arm", given=given)

    def _measure(self, kind: str) -> int:
        """How many points of this kind an unharmed run has."""
        process = self._start(kind, {kind: -1})
        assert process.end() == 0, process.said()
        return getattr(Board(self._folder / f"{kind}.board"), kind)

    def _attempt(self, name: str, kind: str, at: float) -> bool:
        """Run until the end, or until it is killed; whether it was."""
        process = self._start(name, {kind: int(at)} if kind in ("calls", "lines") else {})
        while process.runs and kind in ("time", "none"):
            used = cpu_seconds(process.pid)
            self.cpu_s = max(self.cpu_s, used) if kind == "none" else self.cpu_s
            if kind == "time" and used >= at:
                process.send(signal.SIGKILL)
                break
            time.sleep(0.002)
        code = process.end()
        if code == -signal.SIGKILL:
            board = Board(self._folder / f"{name}.board")
            phase = PHASES[board.phase] if board.saved else "start"
            self.kills.append(Kill(kind, phase, time.monotonic() - board.saved if board.saved else 0.0))
        else:
            assert code == 0, process.said()
        return code != 0

    def _point(self) -> tuple[str, float]:
        kind = self._random.choice(["calls", "calls", "lines", "time"])
        most = {"calls": self.calls, "lines": self.lines, "time": self.cpu_s}[kind]
        return kind, self._random.uniform(0.02, most) if kind == "time" else self._random.randint(1, int(most))

    def one_run(self) -> None:
        """Kill a run, perhaps several times; let it end; compare."""
        points = [self._point()]
        while self._random.random() < AGAIN:
            points.append(self._point())
        for point in points:
            if not self._attempt("killed", *point):
                break  # it was shorter, for it had gone on from a checkpoint
        else:
            assert not self._attempt("killed", "none", 0)
        run = self._folder / "killed"
        assert differences(run, self.unharmed) == [], (points, (self._folder / "killed.log").read_text())
        assert left_over(run) == [], points
        shutil.rmtree(run)
        (self._folder / "killed.log").unlink()

    def table(self) -> str:
        """Kills, and seconds of work done again, by phase."""
        lines = ["SIGKILL in    times  survived  seconds lost: mean  most"]
        for phase in (*PHASES, "all"):
            lost = [kill.lost_s for kill in self.kills if phase in (kill.phase, "all")]
            if lost:
                mean, most = sum(lost) / len(lost), max(lost)
                lines.append(f"{phase:12}  {len(lost):5}  {len(lost):8}  {mean:18.2f}  {most:4.2f}")
        return "\n".join(lines)


def cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) * TICK


@pytest.fixture
def fuzz(tmp_path: Path, config: Callable[..., list[str]]) -> Callable[..., Fuzz]:
    """`fuzz(seed, **changes)`, with a run small enough to be killed by the hundred."""

    def make(seed: int, **changes: Any) -> Fuzz:
        small = {"batch_size": 4, "sampling": {"max_new_tokens": 6, "batch_size": 4}, **changes}
        return Fuzz(tmp_path, lambda name: config(name, **small), seed)

    return make


def test_a_killed_run_ends_where_the_unharmed_one_ends(fuzz: Callable[..., Fuzz]) -> None:
    some = fuzz(seed=0, steps=3)
    while len(some.kills) < 5:
        some.one_run()


@pytest.mark.slow
@pytest.mark.parametrize("share", range(4))
def test_200_kills_at_random_points_lose_nothing(fuzz: Callable[..., Fuzz], share: int) -> None:
    many = fuzz(seed=100 + share, steps=4)
    while len(many.kills) < 50:
        many.one_run()
    print(f"\n{many.table()}")
    reached = {kill.phase for kill in many.kills}
    assert reached >= {"start", "update", "checkpoint", "export"}, many.table()
