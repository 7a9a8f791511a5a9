"""What goes wrong in PPO, read from its metrics: the guards of a running stage, and of the report.

A guard is a small function of the steps so far that says whether the last one is out of range, or None where its
numbers were not recorded. `Guards` turns that into alarms: one begins after `patience` such steps in a row and ends
after as many good ones. All of it is a function of the metrics alone, so a resumed run, which reads them again,
raises the alarms of the run that was never interrupted. The thresholds are rules of thumb for language models of
any size; an alarm asks for a look, it proves no fault. What must hold exactly is asserted in `rlhf.rollout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rlhf.eval.charts import number
from rlhf.eval.notes import WORDS, Note
from rlhf.eval.run_files import finite, kl_target_of
from rlhf.eval.trends import fit_overoptimization, overoptimization_peak, project, trend

MAX_KL_OVER_TARGET = 2.0
MIN_KL = -0.1
MIN_ENTROPY_RATIO = 0.5
MIN_DISTINCT_RATIO = 0.75
MAX_DUPLICATE_RISE = 0.25
MIN_EOS_SHARE = 0.9
MAX_LENGTH_RATIO = 1.5
MAX_LENGTH_CORRELATION = 0.5
MAX_DISAGREEMENT_RATIO = 2.0
MAX_CLIP_FRACTION = 0.3
MAX_SAMPLER_GAP = 0.1

START_STEPS = 3
"""What is judged against the start is judged against their mean."""
ENTROPY_STEPS, GOLD_STEPS = 10, 20
"""The trend is that of so many last steps, or of all where there are fewer."""
MIN_GOLD_STEPS, GOLD_ERRORS = 6, 3.0
"""A fall of the gold score counts when it is so many times its standard error: noise falls half of the time."""
CRITIC_STEPS = 10
"""The critic has learned for so many steps before it is judged."""

Row = Mapping[str, Any]
"""One line of metrics.jsonl: `step` and the metrics."""


@dataclass(frozen=True)
class Limits:
    """What the guards take from the configuration. `kl_target`: nats per answer, None without one."""

    kl_target: float | None = None
    critic_warmup_steps: int = 0
    patience: int = 3
    ignore: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Limits:
        """From a PPO configuration as plain data; a key that an older one lacks has its default."""
        guards = config.get("guards") or {}
        return cls(
            kl_target=kl_target_of(config),
            critic_warmup_steps=config.get("critic_warmup_steps", 0),
            patience=guards.get("patience", cls.patience),
            ignore=frozenset(guards.get("ignore", ())),
        )


@dataclass(frozen=True)
class Reading:
    """What a guard says of the last step."""

    bad: bool
    measured: str


# --- the guards ---------------------------------------------------------------------------------------------


def _kl_high(rows: Sequence[Row], limits: Limits) -> Reading | None:
    kl, target = _now(rows, "objective/kl"), limits.kl_target
    if kl is None or target is None:
        return None
    text = f"KL is {number(kl / target)} times its target of {number(target)} nats per answer"
    return Reading(kl > MAX_KL_OVER_TARGET * target, text)


def _kl_negative(rows: Sequence[Row], limits: Limits) -> Reading | None:
    kl = _now(rows, "objective/kl")
    return None if kl is None else Reading(kl < MIN_KL, f"KL is {number(kl)} nats per answer")


def _entropy(rows: Sequence[Row], limits: Limits) -> Reading | None:
    """Its slope counts, too: an alarm after the collapse would come too late."""
    found = _now_and_start(rows, "policy/entropy_avg")
    recent = [entropy for (entropy,) in _values(rows[-ENTROPY_STEPS:], "policy/entropy_avg")]
    if found is None or len(recent) < 3:
        return None
    (now, start), ahead = found, project(recent)
    text = f"Entropy is {number(now)} nats per token, {number(start)} at the start, and in {len(recent)} steps"
    return Reading(ahead < MIN_ENTROPY_RATIO * start, f"{text} it will be {number(max(0.0, ahead))} at this pace")


def _distinct(rows: Sequence[Row], limits: Limits) -> Reading | None:
    found = _now_and_start(rows, "response/distinct_2")
    if found is None or found[1] == 0:
        return None
    now, start = found
    return Reading(
        now < MIN_DISTINCT_RATIO * start,
        f"{now:.0%} of the word pairs of a step are distinct, {start:.0%} at the start",
    )


def _duplicates(rows: Sequence[Row], limits: Limits) -> Reading | None:
    found = _now_and_start(rows, "response/duplicate_frac")
    if found is None:
        return None
    now, start = found
    return Reading(
        now - start > MAX_DUPLICATE_RISE, f"{now:.0%} of a step's answers repeat another one, {start:.0%} at the start"
    )


def _eos(rows: Sequence[Row], limits: Limits) -> Reading | None:
    share = _now(rows, "response/eos_frac")
    return None if share is None else Reading(share < MIN_EOS_SHARE, f"{share:.0%} of the answers end by themselves")


def _length(rows: Sequence[Row], limits: Limits) -> Reading | None:
    found = _now_and_start(rows, "response/length_mean")
    if found is None or found[1] == 0:
        return None
    now, start = found
    bad = not 1 / MAX_LENGTH_RATIO <= now / start <= MAX_LENGTH_RATIO
    return Reading(bad, f"Answers have {number(now)} tokens on average, {number(start)} at the start")


def _length_reward(rows: Sequence[Row], limits: Limits) -> Reading | None:
    value = _now(rows, "response/score_length_corr")
    if value is None:
        return None
    return Reading(
        abs(value) > MAX_LENGTH_CORRELATION, f"The correlation of score with answer length is {number(value)}"
    )


def _disagreement(rows: Sequence[Row], limits: Limits) -> Reading | None:
    """Recorded where the reward model is an ensemble."""
    found = _now_and_start(rows, "objective/reward_std")
    if found is None or found[1] == 0:
        return None
    now, start = found
    text = f"The members of the reward model differ by {number(now)} (standard deviation), {number(start)} at the start"
    return Reading(now > MAX_DISAGREEMENT_RATIO * start, text)


def _critic(rows: Sequence[Row], limits: Limits) -> Reading | None:
    value = _now(rows, "val/explained_var")
    if value is None or rows[-1]["step"] <= limits.critic_warmup_steps + CRITIC_STEPS:
        return None
    return Reading(value < 0, f"Explained variance is {number(value)} (1 perfect, 0 a constant guess)")


def _clip(rows: Sequence[Row], limits: Limits) -> Reading | None:
    share = _now(rows, "policy/clipfrac_avg")
    return None if share is None else Reading(share > MAX_CLIP_FRACTION, f"{share:.0%} of the tokens are clipped")


def _sampler(rows: Sequence[Row], limits: Limits) -> Reading | None:
    gap = _now(rows, "val/sampler_gap")
    if gap is None:
        return None
    return Reading(gap > MAX_SAMPLER_GAP, f"Sampler and policy differ by {number(gap)} nats per token")


def _gold(rows: Sequence[Row], limits: Limits) -> Reading | None:
    """Over-optimisation: the gold score falls, beyond noise, while the score it is optimised for rises."""
    recent = _values(rows[-GOLD_STEPS:], "objective/scores", "objective/gold")
    if _now(rows, "objective/gold") is None or len(recent) < MIN_GOLD_STEPS:
        return None
    (up, _), (slope, error) = (trend(values) for values in zip(*recent, strict=True))
    text = (
        f"In {len(recent)} steps the score changed by {number(up * len(recent))} and the gold score by "
        f"{number(slope * len(recent))}"
    )
    return Reading(up > 0 and slope < 0 and -slope > GOLD_ERRORS * error, text)


GUARDS: dict[str, Callable[[Sequence[Row], Limits], Reading | None]] = {
    "kl_high": _kl_high,
    "kl_negative": _kl_negative,
    "entropy": _entropy,
    "distinct": _distinct,
    "duplicates": _duplicates,
    "eos": _eos,
    "length": _length,
    "length_reward": _length_reward,
    "disagreement": _disagreement,
    "critic": _critic,
    "clip": _clip,
    "sampler": _sampler,
    "gold": _gold,
}


def predicted_peak_kl(rows: Sequence[Row]) -> float | None:
    """The KL, in nats per answer, at which the gold score will peak or has peaked; None while that cannot be told.

    The gain is over the first step, whose policy is the one that PPO started from.
    """
    start = finite(rows[0].get("objective/gold")) if rows else None
    if start is None:
        return None
    points = _values(rows, "objective/kl", "objective/gold")
    fitted = fit_overoptimization([(math.sqrt(kl), gold - start) for kl, gold in points if kl > 0])
    peak = None if fitted is None else overoptimization_peak(*fitted)
    return None if peak is None else peak**2


# --- alarms -------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """Of one guard: bad and good steps in a row, the alarm that is on (`since`), and those that ended."""

    bad: int = 0
    good: int = 0
    first_bad: int = 0
    last_bad: int = 0
    since: int | None = None
    earlier: list[tuple[int, int]] = field(default_factory=list)
    measured: str = ""

    def add(self, reading: Reading, step: int, patience: int) -> bool:
        """Whether an alarm began or ended with this step."""
        if reading.bad:
            self.first_bad = self.first_bad if self.bad else step
            self.bad, self.good, self.last_bad = self.bad + 1, 0, step
        else:
            self.bad, self.good = 0, self.good + 1
        began = self.since is None and self.bad >= patience
        ended = self.since is not None and self.good >= patience
        if ended and self.since is not None:
            self.earlier.append((self.since, self.last_bad))
        if began or ended:
            self.since = self.first_bad if began else None
        if self.since is None or reading.bad:  # an alarm that is on keeps the numbers that speak for it
            self.measured = reading.measured
        return began or ended


class Guards:
    """All guards over the steps of one run."""

    def __init__(self, limits: Limits, history: Iterable[Row] = ()) -> None:
        """`history`: steps that are done."""
        self.rows: list[Row] = []
        self._limits = limits
        self._states: dict[str, _State] = {}
        for row in history:
            self.add(row)

    def add(self, row: Row) -> list[Note]:
        """Judge one more step; the notes of the guards whose alarm began or ended with it."""
        self.rows.append(row)
        changed = []
        for name, guard in GUARDS.items():
            reading = None if name in self._limits.ignore else guard(self.rows, self._limits)
            if reading is not None:
                state = self._states.setdefault(name, _State())
                if state.add(reading, row["step"], self._limits.patience):
                    changed.append(self._note(name))
        return changed

    def notes(self) -> list[Note]:
        """Every guard whose numbers were recorded, alarms first, else in the order of `GUARDS`."""
        notes = [self._note(name) for name in GUARDS if name in self._states]
        return sorted(notes, key=lambda note: note.ok)

    def _note(self, name: str) -> Note:
        state = self._states[name]
        # Not in `_gold`: it reads all steps, which is too slow for every step of a history.
        peak = predicted_peak_kl(self.rows) if name == "gold" else None
        told = "" if peak is None else f"; by the law of Gao et al. gold peaks at a KL of {number(peak)}"
        if state.bad and state.since is None:  # else a number out of range would stand beside words of praise
            told += f"; out of range now, for {state.bad} of the {self._limits.patience} steps that make an alarm"
        return Note.of(
            name,
            WORDS[name],
            ok=state.since is None,
            measured=state.measured + told,
            since=state.since,
            earlier=tuple(state.earlier),
        )


# --- reading the rows ---------------------------------------------------------------------------------------


def _now(rows: Sequence[Row], key: str) -> float | None:
    return finite(rows[-1].get(key))


def _values(rows: Iterable[Row], *keys: str) -> list[tuple[float, ...]]:
    """The values of these metrics, from every row that has them all."""
    found = (tuple(value for key in keys if (value := finite(row.get(key))) is not None) for row in rows)
    return [values for values in found if len(values) == len(keys)]


def _now_and_start(rows: Sequence[Row], key: str) -> tuple[float, float] | None:
    """The last value and the mean of the first ones; None unless there are more than those."""
    now = _now(rows, key)
    if now is None:
        return None
    recorded = (value for row in rows if (value := finite(row.get(key))) is not None)
    first = list(islice(recorded, START_STEPS + 1))
    return (now, sum(first[:START_STEPS]) / START_STEPS) if len(first) > START_STEPS else None
