"""The guards of a running stage: what is said and when, what health.json holds, and what stops the run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf.errors import GuardError, InvariantError
from rlhf.eval.notes import Note
from rlhf.progress import Progress
from rlhf.rollout.watch import Watch

GOOD, BAD = {"response/eos_frac": 1.0}, {"response/eos_frac": 0.5}


@pytest.fixture
def watching(stage_config: Any, runtime: Any, tmp_path: Path) -> Callable[..., tuple[Watch, io.StringIO]]:
    """`watching(on_alarm="stop", ...)` -> (watch, what it shows)."""

    def make(history: Any = (), *, save_every: int = 10, **guards: Any) -> tuple[Watch, io.StringIO]:
        (tmp_path / "ppo").mkdir(exist_ok=True)
        out = io.StringIO()
        console = Console(file=out, width=400, _environ={})
        progress = Progress("ppo", enabled=runtime.is_main, console=console)
        cfg = stage_config("ppo", save_every=save_every, guards=guards)
        return Watch(cfg, runtime, progress, history), out

    return make


@pytest.fixture
def health(tmp_path: Path) -> Callable[[], dict[str, Any]]:
    return lambda: json.loads((tmp_path / "ppo" / "health.json").read_text(encoding="utf-8"))


def test_an_alarm_is_said_when_it_begins_and_when_it_ends(watching: Any, health: Any) -> None:
    watch, out = watching()
    said, lines, states = [], [], []
    for step, metrics in enumerate([GOOD, *[BAD] * 5, *[GOOD] * 4], 1):
        watch.step(step, metrics)
        said.append(out.getvalue())
        out.truncate(out.seek(0))
        lines.append(watch.line())
        states.append(health()["status"])
    alarm = (
        "health: 50% of the answers end by themselves since step 2 - raise sampling.max_new_tokens, or let cut answers "
        "cost more (missing_eos.value)"
    )
    assert said == [*[""] * 3, f"{alarm}\n", *[""] * 4, "health: over at step 9: Many answers are cut off\n", ""]
    assert lines == [*["health: ok"] * 3, *[alarm] * 5, *["health: ok"] * 2]
    assert states == [*["ok"] * 3, *["alarm"] * 5, *["ok"] * 2]


def test_health_json_holds_every_note_with_cause_and_next_step(watching: Any, health: Any) -> None:
    watch, _ = watching(patience=1)
    watch.step(4, {**BAD, "objective/kl": 1.0})
    found = health()
    assert (found["status"], found["step"]) == ("alarm", 4)
    assert [(n["name"], n["ok"], n["since"]) for n in found["notes"]] == [
        ("eos", False, 4),
        ("kl_high", True, None),
        ("kl_negative", True, None),
    ]
    note = found["notes"][0]
    assert (note["alarm"], note["measured"]) == ("Many answers are cut off", "50% of the answers end by themselves")
    assert note["cause"].startswith("The answer limit is too short")
    assert "`sampling.max_new_tokens`" in note["next_step"]
    assert [Note.from_json(n).ok for n in found["notes"]] == [False, True, True], "as the report reads it"


def test_several_alarms_are_one_line(watching: Any, tmp_path: Path) -> None:
    watch, _ = watching(patience=1)
    watch.step(1, {**BAD, "objective/kl": -1.0})
    assert watch.line().startswith("health: KL is \u22121 nats per answer since step 1 - ")
    assert watch.line().endswith(f"(and 1 more in {tmp_path / 'ppo' / 'health.json'})")


def test_a_resumed_watch_says_the_alarm_that_is_on_and_has_the_last_metrics(watching: Any) -> None:
    rows = [{"step": i, **BAD} for i in (1, 2, 3)]
    watch, out = watching(rows)
    assert out.getvalue() == f"{watch.line()}\n"
    assert "since step 1" in watch.line()
    assert watch.last == BAD
    quiet, out = watching(rows[:2])
    assert out.getvalue() == ""
    quiet.step(3, BAD)
    assert quiet.line() == watch.line()


def test_warn_never_stops(watching: Any) -> None:
    watch, _ = watching(patience=1)
    watch.step(1, BAD)
    assert watch.stopping() is None


def test_stop_names_guard_cause_and_next_step_when_an_alarm_begins(watching: Any, health: Any) -> None:
    watch, _ = watching(patience=2, on_alarm="stop")
    watch.step(1, BAD)
    assert watch.stopping() is None
    watch.step(2, BAD)
    error = watch.stopping()
    assert isinstance(error, GuardError)
    assert error.message == (
        "guard eos: 50% of the answers end by themselves since step 1. The answer limit is too short for the task, or "
        "nothing in the reward asks for an end."
    )
    assert error.fix == (
        "Raise sampling.max_new_tokens, or let cut answers cost more (missing_eos.value). "
        "The same command goes on from the checkpoint."
    )
    assert health()["status"] == "stopped"
    watch.step(3, BAD)
    assert watch.stopping() is None, "who goes on has seen this alarm"
    assert health()["status"] == "alarm"


def test_without_checkpoints_none_is_promised(watching: Any) -> None:
    watch, _ = watching(patience=1, on_alarm="stop", save_every=0)
    watch.step(1, BAD)
    assert "checkpoint" not in watch.stopping().fix


def test_the_other_ranks_stop_with_the_main_one(watching: Any, runtime: Any, monkeypatch: Any) -> None:
    """They judge nothing and write nothing, but are told."""
    main, _ = watching(patience=1, on_alarm="stop")
    main.step(1, BAD)
    expected = str(main.stopping())
    monkeypatch.setattr(runtime, "is_main", False)
    other, out = watching(patience=1, on_alarm="stop")
    other.step(1, BAD)
    assert other.stopping() is None
    monkeypatch.setattr(runtime, "gather_objects", lambda mine: [*main._begun, *mine])
    assert str(other.stopping()) == expected
    assert out.getvalue() == ""


def test_a_failed_assertion_stands_in_health_json(watching: Any, health: Any, tmp_path: Path) -> None:
    watch, _ = watching()

    def failing() -> None:
        with watch.assertions():
            raise InvariantError("the first minibatch's ratio is off 1", fix="look for dropout")

    (tmp_path / "ppo" / "metrics.jsonl").touch()  # of the run before: its files stay together
    with pytest.raises(InvariantError):
        failing()
    assert not (tmp_path / "ppo" / "health.json").exists()
    (tmp_path / "ppo" / "metrics.jsonl").unlink()
    with pytest.raises(InvariantError):
        failing()
    assert (health()["status"], health()["step"]) == ("stopped", 1)
    watch.step(1, GOOD)
    with pytest.raises(InvariantError):
        failing()
    assert [(n["name"], n["ok"]) for n in health()["notes"]] == [("assertion", False), ("eos", True)]
    note = health()["notes"][0]
    assert (note["measured"], note["next_step"]) == ("the first minibatch's ratio is off 1", "look for dropout")
    assert note["since"] == 2
