"""What the report shows and how it writes numbers: the rows of its table and its charts, as data.

A new metric or chart is one entry here; what was not recorded is left out of the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf.eval import charts
from rlhf.eval.charts import Reference
from rlhf.eval.run_files import finite

DASH = "\u2013"


@dataclass(frozen=True)
class Metric:
    """A row of the table of policies, shown with `digits` decimals or as percent.

    `better` is the good direction, None when neither is.
    """

    key: str
    label: str
    unit: str
    better: Literal["up", "down"] | None = None
    digits: int = 2
    percent: bool = False

    def show(self, value: float | None) -> str:
        """The value as the table prints it; a dash when it is unknown."""
        return show_percent(value) if self.percent else show_fixed(value, self.digits)


METRICS = (
    Metric("grade", "Reading grade", "US school years", "down", digits=1),
    Metric("gold_score", "Gold score", "unit of the scorer", "up", digits=1),
    Metric("reward_score", "Reward score", "unit of the reward model", "up"),
    Metric("kl", "KL to the reference", "nats per answer", digits=1),
    Metric("length_mean", "Answer length", "tokens", digits=1),
    Metric("eos_frac", "Answers that end (EOS)", "share", "up", percent=True),
    Metric("distinct_1", "Distinct words", "share of all words", "up"),
    Metric("distinct_2", "Distinct word pairs", "share of all pairs", "up"),
    Metric("entropy", "Entropy", "nats per token"),
    Metric("perplexity", "Perplexity", "under the base model", "down", digits=1),
)


@dataclass(frozen=True)
class Chart:
    """One panel: which series of which stage, and what a healthy curve does."""

    stage: str
    title: str
    unit: str
    series: tuple[tuple[str, str], ...]
    reading: str
    reference: Reference | None = None
    floor: float | None = None


CHARTS = (
    Chart(
        "ppo",
        "Reward",
        "score",
        (("objective/scores", "score"), ("objective/rlhf_reward", "score with KL penalty")),
        "Rises, then flattens. If the gap between the two widens, the KL penalty eats the gain.",
    ),
    Chart(
        "ppo",
        "Disagreement of the reward model's members",
        "standard deviation of the score",
        (("objective/reward_std", "disagreement"),),
        "Steady. Where it grows, the policy writes what nobody labeled.",
        floor=0.0,
    ),
    Chart(
        "ppo",
        "KL to the reference",
        "nats",
        (("objective/kl", "KL"),),
        "Grows, then levels off: at the target, if there is one.",
        floor=0.0,
    ),
    Chart(
        "ppo",
        "KL coefficient",
        "",
        (("objective/kl_coef", "coefficient"),),
        "Falls while the KL is under its target, rises while it is over.",
    ),
    Chart(
        "ppo",
        "Entropy",
        "nats per token",
        (("policy/entropy_avg", "entropy"),),
        "Falls slowly. A cliff means collapse.",
        floor=0.0,
    ),
    Chart(
        "ppo",
        "Answer length",
        "tokens",
        (("response/length_mean", "length"),),
        "Steady, unless the task rewards short or long answers.",
    ),
    Chart("ppo", "Answers that end", "share", (("response/eos_frac", "EOS share"),), "Goes to 1.", floor=0.0),
    Chart(
        "ppo",
        "Policy loss",
        "",
        (("loss/policy_avg", "policy loss"),),
        "Small, around 0; its sign says nothing.",
    ),
    Chart(
        "ppo",
        "Value loss",
        "",
        (("loss/value_avg", "value loss"),),
        "Falls while the critic learns.",
        floor=0.0,
    ),
    Chart(
        "ppo",
        "Explained variance",
        "",
        (("val/explained_var", "explained variance"),),
        "Above 0 after warm-up; 1 is a perfect critic.",
        Reference(0.0, "constant guess"),
    ),
    Chart(
        "ppo",
        "Clip fraction",
        "share of tokens",
        (("policy/clipfrac_avg", "clipped"),),
        "Under 0.3; 0 throughout means updates are very small.",
        floor=0.0,
    ),
    Chart(
        "ppo",
        "KL of one update",
        "nats per token",
        (("policy/approxkl_avg", "approximate KL"),),
        "Small against 0.1; spikes are steps that were too large.",
        floor=0.0,
    ),
    Chart(
        "ppo",
        "Throughput",
        "tokens per second",
        (("perf/tokens_per_s", "throughput"),),
        "Level; it changes with the length of the answers.",
        floor=0.0,
    ),
    Chart(
        "sft",
        "Fine-tuning loss",
        "nats per token",
        (("loss/train", "training"), ("loss/eval", "held out")),
        "Both fall. Held out rising again means too many epochs.",
    ),
    Chart(
        "reward",
        "Reward model loss",
        "nats per pair",
        (("loss/train", "training"), ("loss/eval", "held out")),
        "Starts near 0.69, the loss of a coin, and falls.",
    ),
    Chart(
        "reward",
        "Reward model accuracy",
        "held out",
        (("eval/accuracy", "accuracy"),),
        "Rises above one half; noisy labels put a ceiling under 1.",
        Reference(0.5, "coin"),
    ),
)


def duration(seconds: float | None) -> str:
    """18 s, 4 min 05 s, 2 h 07 min."""
    if seconds is None:
        return DASH
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def show_number(value: Any) -> str:
    """Three significant digits; a dash for what is not a finite number."""
    known = finite(value)
    return DASH if known is None else charts.number(known)


def show_fixed(value: Any, digits: int = 1) -> str:
    """`digits` decimals; a dash for what is not a finite number."""
    known = finite(value)
    return DASH if known is None else charts.fixed(known, digits)


def show_percent(value: Any) -> str:
    """A share in [0, 1] as whole percent; a dash for what is not a finite number."""
    known = finite(value)
    return DASH if known is None else f"{100 * known:.0f}%"
