"""Health of a run in words: what was measured, the likely cause when it is out of range, and the next step.

Each check is a small function that returns a `Note`, or None when its numbers were not recorded. The
thresholds are rules of thumb for language models of any size; a warning asks for a look, it proves no fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.eval.charts import Point, number
from rlhf.eval.run_files import RunFiles, display_name, finite

MIN_EOS_SHARE = 0.9
MAX_KL_OVER_TARGET = 2.0
MIN_DISTINCT_RATIO = 0.75
MIN_KL = -0.1
MAX_LENGTH_CORRELATION = 0.5
MAX_CLIP_FRACTION = 0.3
MIN_ENTROPY_RATIO = 0.5
MAX_LENGTH_RATIO = 1.5


@dataclass(frozen=True)
class Note:
    """One check: its title when all is well, its alarm when not, and the measurement as a sentence.

    `cause` and `next_step` speak of the alarm; `` `backticks` `` mark keys of the configuration.
    """

    ok: bool
    title: str
    alarm: str
    measured: str
    cause: str
    next_step: str

    @property
    def heading(self) -> str:
        return self.title if self.ok else self.alarm


def health_notes(run: RunFiles) -> list[Note]:
    """All checks that the recorded numbers allow, warnings first, else in the order of `CHECKS`."""
    notes = [note for check in CHECKS if (note := check(run)) is not None]
    return sorted(notes, key=lambda note: note.ok)


def _gold_agrees(run: RunFiles) -> Note | None:
    """Reward up while gold falls is over-optimisation (Gao et al. 2022, arXiv:2210.10760)."""
    reward, gold = _change(run, "reward_score"), _change(run, "gold_score")
    if reward is None or gold is None:
        return None
    return Note(
        ok=not (reward > 0 and gold < 0),
        title="Reward model and gold score agree",
        alarm="The reward rose while the gold score fell",
        measured=f"Against {display_name(run.baseline)}, the reward score changed by {number(reward)} "
        f"and the gold score by {number(gold)}.",
        cause="Reward hacking: the policy found answers that only the reward model likes.",
        next_step="Lower `kl.target` or stop earlier; label this policy's answers for the reward model.",
    )


def _reward_model_accuracy(run: RunFiles) -> Note | None:
    summary = (run.results.get("reward") or {}).get("summary") or {}
    accuracy, low = finite(summary.get("accuracy")), finite(summary.get("accuracy_low"))
    if accuracy is None:
        return None
    return Note(
        ok=(accuracy if low is None else low) > 0.5,
        title="Reward model beats a coin",
        alarm="The reward model is no better than a coin",
        measured=f"It ranks {accuracy:.0%} of the held-out pairs as the labels do.",
        cause="Too few pairs, labels that contradict each other, or an unsuitable learning rate.",
        next_step="Read some pairs and the annotators' agreement, then label more before running PPO.",
    )


def _length_correlation(run: RunFiles) -> Note | None:
    summary = (run.results.get("reward") or {}).get("summary") or {}
    value = finite(summary.get("length_correlation"))
    if value is None:
        return None
    return Note(
        ok=abs(value) <= MAX_LENGTH_CORRELATION,
        title="Reward does not follow length",
        alarm="The reward follows length",
        measured=f"The correlation of reward with answer length is {number(value)}.",
        cause="The reward model learned length in place of quality, because the labels preferred "
        f"{'long' if value > 0 else 'short'} answers.",
        next_step="Add pairs of like length, or pairs whose better answer has the other length.",
    )


def _eos(run: RunFiles) -> Note | None:
    value = finite(run.policies[run.candidate].get("eos_frac"))
    if value is None:
        return None
    return Note(
        ok=value >= MIN_EOS_SHARE,
        title="Answers end by themselves",
        alarm="Many answers are cut off",
        measured=f"{value:.0%} of the {display_name(run.candidate)} answers end with EOS; others are cut.",
        cause="The answer limit is too short for the task, or nothing in the reward asks for an end.",
        next_step="Raise `sampling.max_new_tokens`, or let cut answers cost more (`missing_eos.value`).",
    )


def _distinct(run: RunFiles) -> Note | None:
    after = finite(run.policies[run.candidate].get("distinct_2"))
    before = finite(run.policies[run.baseline].get("distinct_2"))
    if after is None or not before:
        return None
    return Note(
        ok=after / before >= MIN_DISTINCT_RATIO,
        title="Answers stay diverse",
        alarm="Answers repeat the same phrases",
        measured=f"Distinct word pairs: {after:.2f}, against {before:.2f} for {display_name(run.baseline)}.",
        cause="The policy collapses onto a few phrases that score well.",
        next_step="Raise `kl.coef` or lower `kl.target`, train fewer steps, or add a small `entropy_coef`.",
    )


def _length_drift(run: RunFiles) -> Note | None:
    after = finite(run.policies[run.candidate].get("length_mean"))
    before = finite(run.policies[run.baseline].get("length_mean"))
    if not after or not before:
        return None
    return Note(
        ok=1 / MAX_LENGTH_RATIO <= after / before <= MAX_LENGTH_RATIO,
        title="Answer length is steady",
        alarm="Answer length has drifted",
        measured=f"{after:.0f} tokens on average, against {before:.0f} for {display_name(run.baseline)}.",
        cause="The reward favours one length, or the KL penalty per token pays for short answers.",
        next_step="Read the samples for padding or missing content; compare win rates at equal length.",
    )


def _kl_over_target(run: RunFiles) -> Note | None:
    points, target = run.series("ppo", "objective/kl"), run.kl_target
    if not points or not target:
        return None
    value = _late(points)
    return Note(
        ok=value <= MAX_KL_OVER_TARGET * target,
        title="KL stays near its target",
        alarm="KL is far above its target",
        measured=f"The last quarter of training has a KL of {number(value)} nats per answer; "
        f"the target is {number(target)}.",
        cause="The controller is too slow for this learning rate, or the run ended before it caught up.",
        next_step="Raise `kl.coef` at the start, shorten `kl.horizon`, or lower `optim.lr`.",
    )


def _negative_kl(run: RunFiles) -> Note | None:
    points = run.series("ppo", "objective/kl")
    if not points:
        return None
    # Plain means: a line fitted to the bend with which every KL begins would dip below 0 where no value does.
    span = max(1, 2 * len(points) // 5)  # one noisy batch is no sign of anything
    lowest = min(_mean(points[i : i + span]) for i in range(len(points) - span + 1))
    return Note(
        ok=lowest >= MIN_KL,
        title="KL is not negative",
        alarm="KL is negative",
        measured=f"The lowest mean KL of {span} steps is {number(lowest)} nats per answer.",
        cause="A true KL is never negative: sampling is truncated, padding leaks into the sum, or sampler "
        "and trainer disagree on the log-probabilities.",
        next_step="Check temperature, masks and precision before trusting this run.",
    )


def _entropy(run: RunFiles) -> Note | None:
    points = run.series("ppo", "policy/entropy_avg")
    if len(points) < 4:
        return None
    first, last = _mean(points[: max(1, len(points) // 4)]), _late(points)
    return Note(
        ok=last >= MIN_ENTROPY_RATIO * first,
        title="Entropy does not collapse",
        alarm="Entropy has collapsed",
        measured=f"{number(last)} nats per token at the end, {number(first)} at the start.",
        cause="The policy becomes certain of few answers faster than it improves.",
        next_step="Lower `optim.lr` or `epochs`, raise `kl.coef`, or add a small `entropy_coef`.",
    )


def _explained_variance(run: RunFiles) -> Note | None:
    points = run.series("ppo", "val/explained_var")
    if len(points) < 4:
        return None
    value = _mean(points[len(points) // 2 :])
    return Note(
        ok=value >= 0,
        title="The critic explains the returns",
        alarm="The critic is worse than a constant",
        measured=f"Explained variance in the second half: {number(value)}; 1 is perfect, 0 a constant guess.",
        cause="The value head lags behind the policy, so advantages are noise.",
        next_step="Raise `critic_lr`, give it `critic_warmup_steps`, or raise `batch_size`.",
    )


def _clip_fraction(run: RunFiles) -> Note | None:
    points = run.series("ppo", "policy/clipfrac_avg")
    if not points:
        return None
    value = _late(points)
    return Note(
        ok=value <= MAX_CLIP_FRACTION,
        title="Updates stay inside the clip range",
        alarm="Too many tokens are clipped",
        measured=f"{value:.0%} of the tokens were clipped in the last quarter.",
        cause="Each update moves the policy too far from the one that sampled.",
        next_step="Lower `optim.lr` or `epochs`, or set `target_kl`.",
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
    return Note(
        ok=not bad,
        title="Losses are finite",
        alarm="Some losses were not finite",
        measured=f"Not finite: {listed}." if bad else "Every recorded loss and objective is a finite number.",
        cause="Overflow, a learning rate that is too high, or an empty batch.",
        next_step="Lower the learning rate, or set `precision: fp32` to find out which it is.",
    )


CHECKS = (
    _gold_agrees,
    _reward_model_accuracy,
    _length_correlation,
    _eos,
    _distinct,
    _length_drift,
    _kl_over_target,
    _negative_kl,
    _entropy,
    _explained_variance,
    _clip_fraction,
    _finite_losses,
)


def _change(run: RunFiles, key: str) -> float | None:
    after = finite(run.policies[run.candidate].get(key))
    before = finite(run.policies[run.baseline].get(key))
    return None if after is None or before is None else after - before


def _mean(points: Sequence[Point]) -> float:
    return sum(y for _, y in points) / len(points)


def _late(points: Sequence[Point]) -> float:
    """The mean of the last quarter, at least one point: where a noisy series ended."""
    return _mean(points[-max(1, len(points) // 4) :])
