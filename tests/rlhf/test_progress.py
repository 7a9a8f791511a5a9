"""The display: plain lines at their pace without a terminal, one live block on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from rlhf.progress import Progress, number, seconds


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(*, terminal: bool = False, width: int = 100) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=width, highlight=False, _environ={}), out


def test_plain_lines_come_every_five_seconds_and_at_the_end() -> None:
    console, out = plain()
    clock = Clock()
    with Progress("sft", console=console, clock=clock) as progress:
        progress.phase("steps", total=100, outer=True)
        for step in range(100):
            clock.now += 0.5
            progress.advance(1, loss=2.0 - step / 100)
    lines = out.getvalue().splitlines()
    assert len(lines) == 10, "50 seconds"
    assert lines[0] == "sft steps  10/100  0:05  eta 0:45  0.5 s/step  loss 1.91"
    assert lines[-1] == "sft steps  100/100  0:50  0.5 s/step  loss 1.01"


def test_the_last_line_comes_even_when_all_is_quick() -> None:
    console, out = plain()
    clock = Clock()
    with (
        Progress("label", console=console, clock=clock) as progress,
        progress.phase("judge", total=3, unit="rows") as rows,
    ):
        clock.now += 2
        rows.advance(3)
    assert out.getvalue() == "label judge  3/3 rows  0:02  1.5 rows/s\n"


def test_nested_phases_share_a_line_and_only_the_outer_one_ends_it() -> None:
    console, out = plain()
    clock = Clock()
    with Progress("ppo", console=console, clock=clock) as progress:
        steps = progress.phase("steps", total=4, outer=True)
        for step in range(2):
            for name in ("generate", "score"):
                progress.phase(name, total=6000, unit="tokens")
                clock.now += 3
                progress.advance(6000)
            steps.advance(1, reward=-7.42 + step, kl=3.1)
    first, second, last = out.getvalue().splitlines()
    assert first == "ppo steps  0/4  0:06 | score  6,000/6,000 tokens  0:03  2,000 tokens/s"
    assert second.startswith("ppo steps  1/4  0:12  eta 0:36  12.0 s/step  reward -7.42  kl 3.1 | score  ")
    assert last == "ppo steps  2/4  0:12  eta 0:12  6.0 s/step  reward -6.42  kl 3.1"


def test_steps_done_before_a_resume_do_not_make_the_rate_too_good() -> None:
    console, _ = plain()
    clock = Clock()
    progress = Progress("ppo", console=console, clock=clock)
    steps = progress.phase("steps", total=100, outer=True, done=50)
    assert (steps.rate, steps.eta) == (None, None)
    clock.now += 10
    steps.advance(5)
    assert (steps.done, steps.rate, steps.eta, steps.elapsed) == (55, 0.5, 90.0, 10.0)


def test_an_unknown_total_has_no_eta() -> None:
    console, out = plain()
    clock = Clock()
    with Progress("data", console=console, clock=clock) as progress:
        progress.phase("read", total=None, unit="rows")
        clock.now += 10
        progress.advance(10, bad=3, file="a.jsonl")
        progress.advance(10, file="b.jsonl")
    assert out.getvalue().splitlines()[0] == "data read  10 rows  0:10  1 rows/s  bad 3  file a.jsonl"
    assert out.getvalue().splitlines()[-1].endswith("bad 3  file b.jsonl"), "fields stay until they change"


def test_say_is_one_line_and_not_markup() -> None:
    console, out = plain(width=20)
    with Progress("sft", console=console) as progress:
        progress.say("saved runs/[bold]x[/bold]/checkpoints/step_10, 3 files")
    assert out.getvalue() == "saved runs/[bold]x[/bold]/checkpoints/step_10, 3 files\n"


def test_other_ranks_count_and_show_nothing() -> None:
    for terminal in (False, True):
        console, out = plain(terminal=terminal)
        clock = Clock()
        with Progress("ppo", enabled=False, console=console, clock=clock) as progress:
            steps = progress.phase("steps", total=2, outer=True)
            clock.now += 60
            progress.advance(2, reward=1.0)
            progress.say("saved")
        assert out.getvalue() == ""
        assert steps.done == 2


def test_advance_without_a_phase_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"call phase\(\) first"):
        Progress("ppo", console=plain()[0]).advance(1)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_on_a_terminal_outer_and_inner_phase_stand_together(width: int) -> None:
    console, out = plain(terminal=True, width=width)
    clock = Clock()
    with Progress("ppo", console=console, clock=clock) as progress:
        steps = progress.phase("steps", total=200, outer=True)
        clock.now += 20
        steps.advance(12, reward=-7.42, kl=3.1)
        progress.phase("generate", total=1024, unit="tokens")
        clock.now += 2
        progress.advance(340)
        progress.say("checkpoint step_12 saved")
        paper, shown = plain(width=width)
        paper.print(progress._render())
    text = shown.getvalue().rstrip("\n")
    rows = [row.split() for row in text.splitlines()]
    assert rows[0][:2] == ["ppo", "steps"] or width < 80
    assert "12/200" in rows[0]
    if width >= 80:
        assert "340/1,024" in rows[1]
        assert rows[1][-3:] == ["0:04", "170", "tokens/s"]
    assert rows[2] == ["reward", "-7.42", "kl", "3.1"]
    assert len(rows) == 3
    assert max(map(len, text.splitlines())) <= width
    everything = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "checkpoint step_12 saved\n" in everything
    assert out.getvalue().rstrip().endswith("\x1b[?25h"), "the cursor is shown again"


def test_a_lone_phase_stays_on_the_terminal_when_it_is_done() -> None:
    console, out = plain(terminal=True)
    with Progress("sample", console=console, clock=Clock()) as progress:
        for name in ("generate", "write"):
            with progress.phase(name, total=1, unit="rows"):
                progress.advance(1)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert [name for name in ("generate", "write") if f"sample {name}" in text] == ["generate", "write"]


def fail_inside(progress: Progress) -> None:
    with progress:
        progress.phase("steps", total=2, outer=True)
        raise KeyError("stop")


def test_the_footer_stands_under_the_live_display_until_the_next_one() -> None:
    for terminal in (True, False):
        console, out = plain(terminal=terminal)
        with Progress("ppo", console=console) as progress:
            progress.phase("steps", total=2, outer=True)
            progress.footer("health: ok", alarm=False)
            progress.footer("health: [KL] is high", alarm=True)
        assert ("health: [KL] is high" in out.getvalue()) == terminal
        assert out.getvalue().count("health: ok") == 0


def test_an_error_inside_restores_the_terminal_and_passes() -> None:
    console, out = plain(terminal=True)
    with pytest.raises(KeyError, match="stop"):
        fail_inside(Progress("sft", console=console))
    assert "\x1b[?25h" in out.getvalue()


def test_numbers_and_times_are_short() -> None:
    values = (-7.42, 3.1, 1e-6, 0.012345, 1234.5, -98765.4, 12, 2048, "warm-up", float("nan"))
    assert [number(v) for v in values] == [
        "-7.42", "3.1", "1e-06", "0.0123", "1,234", "-98,765", "12", "2,048", "warm-up", "nan",
    ]  # fmt: skip
    assert [seconds(s) for s in (0, 59.6, 65, 3599, 3723)] == ["0:00", "1:00", "1:05", "59:59", "1:02:03"]
