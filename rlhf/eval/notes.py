"""The words of every check on a run: what it is called, the likely cause of its alarm, and the next step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Words:
    """What a check is called when all is well and when not; the alarm's cause and what to do about it.

    `` `backticks` `` mark keys of the configuration.
    """

    title: str
    alarm: str
    cause: str
    next_step: str


WORDS = {
    "kl_high": Words(
        "KL stays near its target",
        "KL is far above its target",
        "The policy moves faster than the controller of the KL coefficient answers.",
        "Lower `optim.lr`, raise `kl.coef`, or shorten `kl.horizon`.",
    ),
    "kl_negative": Words(
        "KL is not negative",
        "KL is negative",
        "A true KL is never negative: sampling is truncated, padding leaks into the sum, or sampler and trainer "
        "disagree on the log-probabilities.",
        "Check temperature, masks and precision before trusting this run.",
    ),
    "entropy": Words(
        "Entropy does not collapse",
        "Entropy collapses",
        "The policy becomes certain of few answers faster than it improves.",
        "Lower `optim.lr` or `epochs`, raise `kl.coef`, or add a small `entropy_coef`.",
    ),
    "distinct": Words(
        "Answers stay diverse",
        "Answers repeat the same phrases",
        "The policy collapses onto a few phrases that score well.",
        "Raise `kl.coef` or lower `kl.target`, train fewer steps, or add a small `entropy_coef`.",
    ),
    "duplicates": Words(
        "Answers differ from each other",
        "Many answers are the same",
        "The policy collapses onto stock answers that score well whatever the prompt is.",
        "Read samples.jsonl; raise `kl.coef`, and label such answers for the reward model.",
    ),
    "eos": Words(
        "Answers end by themselves",
        "Many answers are cut off",
        "The answer limit is too short for the task, or nothing in the reward asks for an end.",
        "Raise `sampling.max_new_tokens`, or let cut answers cost more (`missing_eos.value`).",
    ),
    "length": Words(
        "Answer length is steady",
        "Answer length has drifted",
        "The reward favours one length, or the KL penalty per token pays for short answers.",
        "Read the samples for padding or missing content; compare win rates at equal length.",
    ),
    "length_reward": Words(
        "Scores do not follow length",
        "Scores follow length",
        "The reward model learned length in place of quality, or answers that are cut score low.",
        "Compare scores and lengths in samples.jsonl; give the reward model pairs of like length.",
    ),
    "disagreement": Words(
        "The reward model's members agree as they did",
        "The reward model's members disagree more and more",
        "The policy writes answers unlike those that were labeled: there the score is a guess, which PPO goes for.",
        "Label this policy's answers, set `reward_aggregate: mean_minus_std`, or lower `kl.target`.",
    ),
    "critic": Words(
        "The critic explains the returns",
        "The critic is worse than a constant",
        "The value head lags behind the policy, so advantages are noise.",
        "Raise `critic_lr`, give it `critic_warmup_steps`, or raise `batch_size`.",
    ),
    "clip": Words(
        "Updates stay inside the clip range",
        "Too many tokens are clipped",
        "Each update moves the policy too far from the one that sampled.",
        "Lower `optim.lr` or `epochs`, or set `target_kl`.",
    ),
    "sampler": Words(
        "Sampler and policy agree",
        "The sampler is not the trained policy",
        "The sampler works with older weights, another temperature or another precision than the update.",
        "Set `precision: fp32` and `sampling.engine: transformers` to find out which it is.",
    ),
    "gold": Words(
        "Reward and gold score agree",
        "The reward rose while the gold score fell",
        "Reward hacking: the policy found answers that only the reward model likes.",
        "Lower `kl.target` or stop earlier; label this policy's answers for the reward model.",
    ),
}


@dataclass(frozen=True)
class Note:
    """One check: what it is called, what was measured (a clause without its full stop), and since when it is an alarm.

    `earlier` are alarms that ended, as (first step, last step).
    """

    name: str
    ok: bool
    title: str
    alarm: str
    measured: str
    cause: str
    next_step: str
    since: int | None = None
    earlier: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, name: str, words: Words, **changes: Any) -> Note:
        """With the words of a check."""
        return cls(name, **vars(words), **changes)

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Note:
        """What `dataclasses.asdict` and JSON made of a note; TypeError or ValueError where it is something else."""
        return cls(**{**entry, "earlier": tuple((first, last) for first, last in entry["earlier"])})

    @property
    def heading(self) -> str:
        return self.title if self.ok else self.alarm

    @property
    def sentence(self) -> str:
        """What was measured, and when there was an alarm."""
        since = [] if self.since is None else [f"Since step {self.since}."]
        return " ".join(
            [f"{self.measured}.", *since, *(f"An alarm from step {a} to {b} is over." for a, b in self.earlier)]
        )

    @property
    def line(self) -> str:
        """An alarm in one line of plain text: what, since when, what to do."""
        since = "" if self.since is None else f" since step {self.since}"
        step = plain(self.next_step).rstrip(".")
        return f"{self.measured}{since} - {step[:1].lower()}{step[1:]}"


def plain(text: str) -> str:
    """Without the marks of configuration keys."""
    return text.replace("`", "")
