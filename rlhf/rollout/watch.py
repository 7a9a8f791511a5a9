"""The guards of a running PPO stage: one health line for people, health.json for programs.

An alarm is said when it begins and when it ends; in between the display keeps it in sight. The rules are those of
`rlhf.eval.guards`. What the assertions of `rlhf.rollout.assertions` find ends the run whatever is configured.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.config_schema import PPOStage
from rlhf.errors import GuardError, InvariantError
from rlhf.eval.guards import Guards, Limits
from rlhf.eval.notes import Note, Words, plain
from rlhf.files import atomic_write
from rlhf.progress import Progress
from rlhf.runtime import Runtime
from rlhf.tracking import METRICS

HEALTH = "health.json"


class Watch:
    """Asks the guards after every step. Judges on the main rank alone, which has the whole history."""

    def __init__(
        self, cfg: PPOStage, runtime: Runtime, progress: Progress, history: Iterable[dict[str, Any]] = ()
    ) -> None:
        """`history`: the metrics of the steps that an earlier process did."""
        self._path = Path(cfg.run_dir) / HEALTH
        self._runtime, self._progress = runtime, progress
        self._stops = cfg.guards.on_alarm == "stop"
        self._keeps = cfg.save_every > 0
        self._guards = Guards(Limits.of(cfg.model_dump(mode="json")), history)
        self._notes = self._guards.notes()
        self._begun: list[Note] = []
        if self._guards.rows:
            self._show()
            if self._alarms():
                progress.say(self.line())

    @property
    def last(self) -> dict[str, float]:
        """The metrics of the last step; of a resumed run, those that it goes on from."""
        return {name: value for row in self._guards.rows[-1:] for name, value in row.items() if name != "step"}

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Judge a step, say what changed, and write health.json."""
        if not self._runtime.is_main:
            return
        changed = self._guards.add({"step": step, **metrics})
        self._notes = self._guards.notes()
        self._begun = [note for note in changed if not note.ok]
        for note in changed:
            told = f"over at step {step}: {note.alarm}" if note.ok else note.line
            self._progress.say(f"health: {told}")
        self._show()
        status = "stopped" if self._stops and self._begun else "alarm" if self._alarms() else "ok"
        self._write(status, step, self._notes)

    def stopping(self) -> GuardError | None:
        """The error with which the run is to end after this step, the same on every rank; None: go on."""
        if not self._stops:
            return None
        begun = self._runtime.gather_objects(self._begun)
        if not begun:
            return None
        # Said here, too: with several processes the launcher may end this one before it can show the error.
        self._progress.say(f"health: the run stops, as guards.on_alarm says; see {self._path}")
        found = [f"{note.name}: {note.measured} since step {note.since}. {plain(note.cause)}" for note in begun]
        resume = " The same command goes on from the checkpoint." if self._keeps else ""
        steps = dict.fromkeys(plain(note.next_step) for note in begun)
        return GuardError("guard " + "\nguard ".join(found), fix=" ".join(steps) + resume)

    @contextlib.contextmanager
    def assertions(self) -> Iterator[None]:
        """An assertion that fails inside stands in health.json, too; not among the files of the run before this one."""
        try:
            yield
        except InvariantError as error:
            rows = self._guards.rows
            if self._runtime.is_main and (rows or not (self._path.parent / METRICS).exists()):
                step = rows[-1]["step"] + 1 if rows else 1
                cause = "Going on would train on wrong numbers."
                words = Words("Assertions hold", "A run-time assertion failed", cause, error.fix)
                note = Note.of("assertion", words, ok=False, measured=error.message, since=step)
                self._write("stopped", step, [note, *self._notes])
            raise

    def line(self) -> str:
        """The health of the run: the first alarm that is on, and how many others there are."""
        alarms = self._alarms()
        if not alarms:
            return "health: ok"
        others = f" (and {len(alarms) - 1} more in {self._path})" if len(alarms) > 1 else ""
        return f"health: {alarms[0].line}{others}"

    def _alarms(self) -> list[Note]:
        return [note for note in self._notes if not note.ok]

    def _show(self) -> None:
        self._progress.footer(self.line(), alarm=bool(self._alarms()))

    def _write(self, status: str, step: int, notes: list[Note]) -> None:
        record = {"status": status, "step": step, "notes": [asdict(note) for note in notes]}
        atomic_write(self._path, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
