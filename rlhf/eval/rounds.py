"""Of a run in rounds: what each round's labels, reward model and policy came to, as rows of a table and as a chart."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from rlhf.eval import charts
from rlhf.eval.run_files import RunFiles, display_name, finite


def round_rows(run: RunFiles) -> list[dict[str, Any]]:
    """The policy before PPO, then one row per round; [] for a run of a single round. KL is in nats per answer.

    `judgments` counts the round's own labels; `accuracy` is its reward model's, on held-out pairs of all rounds so
    far, the new policy's answers among them.
    """
    if run.rounds < 2:
        return []
    rows = [{"name": display_name(run.baseline), "judgments": None, "accuracy": None, **_policy(run, run.baseline)}]
    for number in range(1, run.rounds + 1):
        is_last = number == run.rounds
        suffix = "" if is_last else f" {number}"
        label, reward = (run.results[f"{stage}{suffix}"].get("summary") or {} for stage in ("label", "reward"))
        policy = run.candidate if is_last else f"round {number}"
        numbers = {"judgments": finite(label.get("judgments")), "accuracy": finite(reward.get("accuracy"))}
        rows.append({"name": f"Round {number}", **numbers, **_policy(run, policy)})
    return rows


def gold_chart(rows: list[dict[str, Any]]) -> Markup:
    """Gold score against KL, a dot per row, joined in the order of the rounds; empty without rows."""
    points = [(row["kl"], row["gold_score"]) for row in rows if None not in (row["kl"], row["gold_score"])]
    series = charts.Series("gold score", points)
    return charts.point_chart([series], title="Gold score by KL", x_unit="KL to the reference, nats per answer")


def _policy(run: RunFiles, name: str) -> dict[str, float | None]:
    measured = run.policies.get(name, {})
    return {key: finite(measured.get(key)) for key in ("kl", "gold_score", "grade")}
