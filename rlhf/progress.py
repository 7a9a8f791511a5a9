"""What a stage shows while it works: a live display on a terminal, plain lines otherwise.

    with Progress("ppo") as progress:
        steps = progress.phase("steps", total=200, outer=True)
        for _ in range(200):
            generate = progress.phase("generate", total=1024, unit="tokens")   # replaces the phase before
            generate.advance(64)
            steps.advance(1, reward=-7.42, kl=3.1)

The outer phase spans the stage: its ETA is the ETA of all steps, its fields (reward, KL) are the headline. At
most one inner phase stands below it. The two of them are all there is; no bar is ever nested deeper.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_INTERVAL_S = 5.0
"""Plain lines come no more often than this; the last one always comes."""
_REFRESH_PER_S = 4
_BAR_WIDTH, _TEXT_WIDTH = 24, 66
_COUNTED_BY_STEP = ("step", "steps")

Field = float | int | str


class Phase:
    """One counted piece of work: `done` of `total` units. A context manager that finishes on leaving."""

    def __init__(self, owner: Progress, name: str, total: float | None, unit: str, done: float) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.fields: dict[str, Field] = {}
        self._owner = owner
        self._first = done
        self._clock = owner.clock
        self._started = self._clock()
        self._ended: float | None = None

    def advance(self, n: float = 1, **fields: Field) -> None:
        """`n` more units are done; `fields` are shown beside them until they change."""
        self.done += n
        # A new dict, because the live display reads this one from its own thread.
        self.fields = {**self.fields, **fields}
        self._owner._changed()

    def finish(self) -> None:
        """No more comes. An inner phase vanishes; another one is finished for it by the next `phase()`."""
        if self._ended is None:
            self._ended = self._clock()
            self._owner._finished(self)

    @property
    def elapsed(self) -> float:
        """Seconds since the phase began."""
        return (self._clock() if self._ended is None else self._ended) - self._started

    @property
    def rate(self) -> float | None:
        """Units per second in this process: what an earlier one had done does not count."""
        done, elapsed = self.done - self._first, self.elapsed
        return done / elapsed if done > 0 and elapsed > 0 else None

    @property
    def eta(self) -> float | None:
        """Seconds to go; None while unknown."""
        rate = self.rate
        return None if self.total is None or rate is None else max(0.0, self.total - self.done) / rate

    def __enter__(self) -> Phase:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()


class Progress:
    """The display of one stage.

    Args:
        stage: first word of every line.
        enabled: False on every rank but 0: phases count, nothing is shown.
        console: where to write; by default standard output.
        clock: seconds, rising.
    """

    def __init__(
        self,
        stage: str,
        *,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage = stage
        self.clock = clock
        self._enabled = enabled
        self._console = console or Console(highlight=False)
        self._outer: Phase | None = None
        self._inner: Phase | None = None
        self._live: Live | None = None
        self._footer: Text | None = None
        self._last_line = clock()
        self._last_text = ""

    def __enter__(self) -> Progress:
        if self._enabled and self._console.is_interactive:
            rate = _REFRESH_PER_S
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=rate)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for phase in (self._inner, self._outer):
            if phase:
                phase.finish()
        if self._live:
            self._live.stop()
            self._live = None

    def phase(
        self, name: str, *, total: float | None, unit: str = "steps", outer: bool = False, done: float = 0
    ) -> Phase:
        """Begin a phase. The running one of the same level is finished first.

        Args:
            name: one word, e.g. generate.
            total: units in all; None when unknown.
            unit: tokens, rows, steps ..
            outer: this phase spans the stage and stays in sight above the inner ones.
            done: units that an earlier process did, on a resume.
        """
        new = Phase(self, name, total, unit, done)
        before = self._outer if outer else self._inner
        if before:
            before.finish()
        if outer:
            self._outer = new
        else:
            self._inner = new
        return new

    def advance(self, n: float = 1, **fields: Field) -> None:
        """Advance the innermost running phase; see `Phase.advance`."""
        phase = self._inner or self._outer
        if phase is None:
            raise RuntimeError("advance was called before any phase began; call phase() first")
        phase.advance(n, **fields)

    @property
    def console(self) -> Console:
        """Where the display writes; whole tables and panels go here."""
        return self._console

    def say(self, text: str) -> None:
        """Show one line of text without breaking the display."""
        if self._enabled:
            self._console.print(Text(text), soft_wrap=True)

    def footer(self, text: str, *, alarm: bool) -> None:
        """A line that stays under the live display until the next one; plain lines do not show it."""
        self._footer = Text(text, "bold yellow" if alarm else "green")

    def _changed(self) -> None:
        if self._enabled and self._live is None and self.clock() - self._last_line >= LINE_INTERVAL_S:
            self._print_line()

    def _finished(self, phase: Phase) -> None:
        alone = phase is self._inner and self._outer is None
        if self._live and alone:
            self._console.print(self._render())  # its last state stays above the display
        elif self._live is None and self._enabled and (alone or phase is self._outer):
            self._print_line()
        if phase is self._inner:
            self._inner = None

    # ------------------------------------------------------------------------------------- plain lines

    def _print_line(self) -> None:
        phases = [phase for phase in (self._outer, self._inner) if phase]
        text = " | ".join([f"{self.stage} {_line(phases[0])}", *(_line(phase) for phase in phases[1:])])
        if text != self._last_text:
            self._console.print(Text(text), soft_wrap=True)
        self._last_line, self._last_text = self.clock(), text

    # -------------------------------------------------------------------------------------------- live

    def _render(self) -> RenderableType:
        phases = [phase for phase in (self._outer, self._inner) if phase]
        if not phases:
            return Group()
        width = min(_BAR_WIDTH, max(4, self._console.width - _TEXT_WIDTH))  # text matters more than the bar
        table = Table.grid(padding=(0, 2, 0, 0))
        for _ in range(6):
            table.add_column(no_wrap=True)
        for i, phase in enumerate(phases):
            name = Text.assemble((f"{self.stage if i == 0 else '':{len(self.stage)}} ", "bold"), phase.name)
            bar = ProgressBar(phase.total, phase.done, width=width, pulse=phase.total is None)
            times = (
                Text(seconds(phase.elapsed), "cyan"),
                Text(_eta(phase), "dim"),
                Text(_rate(phase), "green"),
            )
            table.add_row(name, bar, Text(_count(phase)), *times)
        rows: list[RenderableType] = [table]
        if fields := "  ".join(_fields(phase) for phase in phases if phase.fields):
            rows.append(Padding(Text(fields, "magenta"), (0, 0, 0, 2)))
        if self._footer:
            rows.append(Padding(self._footer, (0, 0, 0, 2)))
        return Group(*rows)


def _line(phase: Phase) -> str:
    parts = (phase.name, _count(phase), seconds(phase.elapsed), _eta(phase), _rate(phase), _fields(phase))
    return "  ".join(part for part in parts if part)


def _count(phase: Phase) -> str:
    total = "" if phase.total is None else f"/{number(phase.total)}"
    unit = "" if phase.unit == phase.name else f" {phase.unit}"
    return f"{number(phase.done)}{total}{unit}"


def _eta(phase: Phase) -> str:
    eta = phase.eta
    return f"eta {seconds(eta)}" if eta else ""


def _rate(phase: Phase) -> str:
    """Tokens and rows per second; for steps, which take seconds, the time of one."""
    rate = phase.rate
    if not rate:
        return ""
    return f"{1 / rate:.1f} s/step" if phase.unit in _COUNTED_BY_STEP else f"{number(rate)} {phase.unit}/s"


def _fields(phase: Phase) -> str:
    return "  ".join(f"{name} {number(value)}" for name, value in phase.fields.items())


def number(value: Field) -> str:
    """Three significant digits below a thousand, whole above: -7.42, 3.1, 1e-06, 1,234."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (abs(value) >= 1000 and value == value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def seconds(value: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
