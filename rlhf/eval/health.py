"""Health of a run in words: what was measured, the likely cause when it is out of range, and the next step.

What PPO's guards said while it ran comes from its health.json (`rlhf.eval.guards`); the checks here measure what
only the evaluation and the reward model's test can tell. Each is a small function that returns a `Note`, or None
when its numbers were not recorded.
"""

from __future__ import annotations

from rlhf.errors import DataError
from rlhf.eval.charts import number
from rlhf.eval.guards import (
    MAX_LENGTH_CORRELATION,
    MAX_LENGTH_RATIO,
    MIN_DISTINCT_RATIO,
    MIN_EOS_SHARE,
    Guards,
    Limits,
)
from rlhf.eval.notes import WORDS, Note, Words
from rlhf.eval.run_files import RunFiles, display_name, finite


def health_notes(run: RunFiles) -> list[Note]:
    """What the guards and the checks say, warnings first.

    Of two notes with one name an alarm stands, else the check's: it was measured on held-out prompts.

    Raises:
        DataError: health.json is malformed.
    """
    found: dict[str, Note] = {}
    for note in [*(note for check in CHECKS if (note := check(run)) is not None), *guard_notes(run)]:
        if note.name not in found or (found[note.name].ok and not note.ok):
            found[note.name] = note
    return sorted(found.values(), key=lambda note: note.ok)


def guard_notes(run: RunFiles) -> list[Note]:
    """Those of health.json; of a run that left none, what the guards say of its metrics.

    Raises:
        DataError: health.json is malformed.
    """
    if run.ppo_health is None:
        return Guards(Limits.of(run.ppo_config), run.rows("ppo")).notes()
    try:
        return [Note.from_json(entry) for entry in run.ppo_health["notes"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{run.dirs['ppo'] / 'health.json'} is malformed: {error}", fix="remove it; the metrics say the same"
        ) from None


# --- the checks ---------------------------------------------------------------------------------------------


def _gold(run: RunFiles) -> Note | None:
    """Reward up while gold falls is over-optimisation (Gao et al. 2022, arXiv:2210.10760)."""
    reward, gold = _change(run, "reward_score"), _change(run, "gold_score")
    if reward is None or gold is None:
        return None
    return _note(
        "gold",
        ok=not (reward > 0 and gold < 0),
        measured=f"Against {display_name(run.baseline)}, the reward score changed by {number(reward)} "
        f"and the gold score by {number(gold)}",
    )


def _reward_model_accuracy(run: RunFiles) -> Note | None:
    summary = (run.results.get("reward") or {}).get("summary") or {}
    accuracy, low = finite(summary.get("accuracy")), finite(summary.get("accuracy_low"))
    if accuracy is None:
        return None
    words = Words(
        title="Reward model beats a coin",
        alarm="The reward model is no better than a coin",
        cause="Too few pairs, labels that contradict each other, or an unsuitable learning rate.",
        next_step="Read some pairs and the annotators' agreement, then label more before running PPO.",
    )
    ok = (accuracy if low is None else low) > 0.5
    return Note.of(
        "reward_model", words, ok=ok, measured=f"It ranks {accuracy:.0%} of the held-out pairs as the labels do"
    )


def _reward_model_length(run: RunFiles) -> Note | None:
    summary = (run.results.get("reward") or {}).get("summary") or {}
    value = finite(summary.get("length_correlation"))
    if value is None:
        return None
    words = Words(
        title="Reward does not follow length",
        alarm="The reward follows length",
        cause="The reward model learned length in place of quality, because the labels preferred "
        f"{'long' if value > 0 else 'short'} answers.",
        next_step="Add pairs of like length, or pairs whose better answer has the other length.",
    )
    ok = abs(value) <= MAX_LENGTH_CORRELATION
    return Note.of(
        "reward_model_length", words, ok=ok, measured=f"The correlation of reward with answer length is {number(value)}"
    )


def _eos(run: RunFiles) -> Note | None:
    value = finite(run.policies[run.candidate].get("eos_frac"))
    if value is None:
        return None
    measured = f"{value:.0%} of the {display_name(run.candidate)} answers end with EOS; others are cut"
    return _note("eos", ok=value >= MIN_EOS_SHARE, measured=measured)


def _distinct(run: RunFiles) -> Note | None:
    after = finite(run.policies[run.candidate].get("distinct_2"))
    before = finite(run.policies[run.baseline].get("distinct_2"))
    if after is None or not before:
        return None
    measured = f"Distinct word pairs: {after:.2f}, against {before:.2f} for {display_name(run.baseline)}"
    return _note("distinct", ok=after / before >= MIN_DISTINCT_RATIO, measured=measured)


def _length(run: RunFiles) -> Note | None:
    after = finite(run.policies[run.candidate].get("length_mean"))
    before = finite(run.policies[run.baseline].get("length_mean"))
    if not after or not before:
        return None
    return _note(
        "length",
        ok=1 / MAX_LENGTH_RATIO <= after / before <= MAX_LENGTH_RATIO,
        measured=f"{after:.0f} tokens on average, against {before:.0f} for {display_name(run.baseline)}",
    )


def _finite_losses(run: RunFiles) -> Note | None:
    counts = {
        f"{stage} {name}": n
        for stage, metrics in run.metrics.items()
        for name, n in metrics.not_finite.items()
        if name.startswith(("loss/", "objective/"))
    }
    if not counts:
        return None
    bad = {name: n for name, n in counts.items() if n}
    listed = ", ".join(f"{name} ({n}x)" for name, n in bad.items())
    words = Words(
        title="Losses are finite",
        alarm="Some losses were not finite",
        cause="Overflow, a learning rate that is too high, or an empty batch.",
        next_step="Lower the learning rate, or set `precision: fp32` to find out which it is.",
    )
    measured = f"Not finite: {listed}" if bad else "Every recorded loss and objective is a finite number"
    return Note.of("finite", words, ok=not bad, measured=measured)


CHECKS = (_gold, _reward_model_accuracy, _reward_model_length, _eos, _distinct, _length, _finite_losses)


def _note(name: str, *, ok: bool, measured: str) -> Note:
    """With the words of the guard that measures the same while PPO runs."""
    return Note.of(name, WORDS[name], ok=ok, measured=measured)


def _change(run: RunFiles, key: str) -> float | None:
    after = finite(run.policies[run.candidate].get(key))
    before = finite(run.policies[run.baseline].get(key))
    return None if after is None or before is None else after - before
