"""A PPO run that tells where it is, and that can be told where to die.

`arm` is called in the child (see `forked_runs.Forked`), for it changes our classes. The board is a small file that
parent and child map.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PHASES = ("start", "generate", "score", "update", "log", "checkpoint", "export", "between")
_LAYOUT = struct.Struct("=BBxxIId")  # phase, steps done, calls, lines, when the last checkpoint was finished
PACKAGES = tuple(str(Path(__file__).resolve().parents[1] / name) + os.sep for name in ("rlhf", "reward_model"))


class Board:
    """Where a run is; what it has done so far."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(_LAYOUT.size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _LAYOUT.size)

    def _get(self, index: int) -> Any:
        return _LAYOUT.unpack(self._memory[:])[index]

    def _set(self, index: int, value: Any) -> None:
        values = list(_LAYOUT.unpack(self._memory[:]))
        values[index] = value
        self._memory[:] = _LAYOUT.pack(*values)

    phase = property(lambda self: self._get(0), lambda self, value: self._set(0, value))
    step = property(lambda self: self._get(1), lambda self, value: self._set(1, value))
    calls = property(lambda self: self._get(2), lambda self, value: self._set(2, value))
    lines = property(lambda self: self._get(3), lambda self, value: self._set(3, value))
    saved = property(lambda self: self._get(4), lambda self, value: self._set(4, value))

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, PHASES.index(phase)
        yield
        self.phase = before


def arm(given: dict[str, Any]) -> None:
    """Watch the run into `given["run_dir"]` on the board `given["board"]`.

    `given["calls"]` or `given["lines"]`: dies by SIGKILL before that call of the operating system that changes the run
    folder, or that line of ours; a tensor file is left torn. -1: only counts them.
    """
    board = Board(Path(given["board"]))
    board.phase, board.step, board.saved = PHASES.index("start"), 0, time.monotonic()
    _mark_phases(board)
    if calls := given.get("calls"):
        _count_calls(board, given["run_dir"], calls)
    if lines := given.get("lines"):
        _count_lines(board, lines)


def _mark_phases(board: Board) -> None:
    from rlhf.checkpoint import Checkpoints
    from rlhf.rollout.ppo_run import PPORun

    phase, steps, save = PPORun.phase, PPORun.steps, Checkpoints.save

    @contextlib.contextmanager
    def marked(run: Any, name: str) -> Iterator[None]:
        with board.during(name), phase(run, name):
            yield

    def counted(run: Any) -> Iterator[int]:
        for step in steps(run):
            board.phase, board.step = PHASES.index("between"), step
            yield step

    def saved(*args: Any, **keys: Any) -> Any:
        path = save(*args, **keys)
        board.saved = time.monotonic()
        return path

    PPORun.phase, PPORun.steps, Checkpoints.save = marked, counted, _within(board, "checkpoint", saved)
    PPORun.log = _within(board, "log", PPORun.log)
    PPORun.finish = _within(board, "export", PPORun.finish)


def _within(board: Board, phase: str, function: Callable[..., Any]) -> Any:
    def wrapped(*args: Any, **keys: Any) -> Any:
        with board.during(phase):
            return function(*args, **keys)

    return wrapped


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _count_calls(board: Board, run_dir: str, at: int) -> None:
    from rlhf import tensor_files

    def touches(args: Any, keys: Any) -> bool:
        """fsync has a descriptor; rmtree names files relative to an open folder."""
        return isinstance(args[0], int) or "dir_fd" in keys or os.fspath(args[0]).startswith(run_dir)

    def counted(function: Any, *, torn: bool = False) -> Any:
        def wrapped(*args: Any, **keys: Any) -> Any:
            if not torn and not touches(args, keys):
                return function(*args, **keys)
            board.calls += 1
            if board.calls == at:
                if torn:
                    function(*args, **keys)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                die()
            return function(*args, **keys)

        return wrapped

    for name in ("fsync", "rename", "replace", "open", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    io.open = counted(io.open)
    tensor_files.save_file = counted(tensor_files.save_file, torn=True)


def _count_lines(board: Board, at: int) -> None:
    count = 0

    def line(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == at:
                die()
            if at < 0:
                board.lines = count
        return line

    def call(frame: Any, event: str, arg: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(PACKAGES) else None

    sys.settrace(call)
