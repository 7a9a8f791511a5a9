"""A reward model measured on held-out labels, for `rlhf reward` and `rlhf reward eval`: a summary and a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reward_model.calibrate import (
    Scored,
    Units,
    accuracy,
    accuracy_by,
    best_of_n,
    calibration,
    judged_pairs,
    length_bias,
    outcomes_of,
    rating_fit,
)
from reward_model.data import RankedTokens
from reward_model.ensemble import disagreement
from reward_model.model import RewardModel
from rlhf.eval.reward_page import render_reward_page
from rlhf.eval.winrate import share_interval
from rlhf.files import atomic_write
from rlhf.progress import Progress

REPORT, PAGE = "reward_report.json", "reward_report.html"


@dataclass(frozen=True)
class Measured:
    """`summary`: headline numbers, flat. `report`: all of it, as JSON holds it."""

    summary: dict[str, Any]
    report: dict[str, Any]

    def write(self, folder: Path, *, title: str) -> None:
        """`reward_report.json`, and the same as a page."""
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / REPORT, json.dumps({"title": title, **self.report}, indent=1, ensure_ascii=False))
        atomic_write(folder / PAGE, render_reward_page(title, self.report))


def measure(scorer: RewardModel, heldout: Sequence[RankedTokens], units: Units, progress: Progress) -> Measured:
    """Score and judge labeled items.

    Raises:
        DataError: rankings of which no two responses have different ranks.
    """
    progress.phase("evaluate", total=sum(len(item.rows) for item in heldout), unit="rows")
    scores_MN = scorer.score_members([row for item in heldout for row in item.rows], progress.advance)
    scored = attach(scores_MN, scorer.aggregate(scores_MN), heldout)
    pairs = judged_pairs(scored, units.std)
    report: dict[str, Any] = {
        "prompts": len({item.group for item in heldout}),
        "responses": scores_MN.shape[1],
        "members": scorer.members,
        "length": length_bias(scored, pairs),
        "best_of_n": best_of_n(scored),
    }
    if pairs or units.ratings is None:
        report["accuracy"] = accuracy(pairs)
        report["calibration"] = calibration(pairs)
        report["by_confidence"] = accuracy_by(pairs, [abs(pair.logit) for pair in pairs])
        report["by_length_gap"] = accuracy_by(pairs, [pair.gap for pair in pairs])
    if gold := gold_accuracy(scored):
        report["gold_accuracy"] = gold
    if units.ratings is not None:
        report["ratings"] = rating_fit(scored, units)
    if scorer.members > 1:
        report["ensemble"] = {
            "aggregate": scorer.aggregate.kind,
            "coef": scorer.aggregate.coef,
            "disagreement": float(disagreement(scores_MN).mean()),
            "member_accuracies": [_label_accuracy(scored, member) for member in range(scorer.members)],
            "by_disagreement": accuracy_by(pairs, [pair.spread for pair in pairs]),
        }
    return Measured(summarise(report), report)


def attach(scores_MN: Tensor, scores_N: Tensor, items: Sequence[RankedTokens]) -> list[Scored]:
    """Flat scores (every member's, and as one) back to the items whose rows they are of."""
    counts = [len(item.rows) for item in items]
    parts = zip(scores_MN.split(counts, dim=1), scores_N.split(counts), items, strict=True)
    return [Scored(item, scores_K.tolist(), members_MK.tolist()) for members_MK, scores_K, item in parts]


def gold_accuracy(scored: Sequence[Scored]) -> dict[str, Any] | None:
    """Accuracy against gold scores, where they are known."""
    outcomes, groups = [], []
    for one in scored:
        new = outcomes_of(one.scores, [-gold for gold in one.item.gold or []])
        outcomes += new
        groups += [one.item.group] * len(new)
    if not outcomes:
        return None
    found = share_interval(outcomes, groups)
    return {"value": found.value, "low": found.low, "high": found.high, "pairs": len(outcomes)}


def _label_accuracy(scored: Sequence[Scored], member: int) -> float:
    outcomes = [x for one in scored for x in outcomes_of(one.members[member], one.item.ranks)]
    return sum(outcomes) / max(1, len(outcomes))


def summarise(report: dict[str, Any]) -> dict[str, Any]:
    """Headline numbers of a report: accuracy against gold scores where they are known, else against the labels."""
    found: dict[str, Any] = {"prompts": report["prompts"]}
    best = report.get("gold_accuracy") or report.get("accuracy")
    if best is not None:
        found |= {
            "accuracy": best["value"],
            "accuracy_low": best["low"],
            "accuracy_high": best["high"],
            "accuracy_against": "gold" if "gold_accuracy" in report else "label",
            "pairs": best["pairs"],
            "label_accuracy": report["accuracy"]["value"],
        }
    keys = ("ece", "brier", "log_loss", "entropy_floor", "temperature")
    found |= {key: report.get("calibration", {}).get(key) for key in keys}
    length = report["length"]
    found |= {"length_correlation": length["correlation"]}
    found |= {"length_correlation_within": length["correlation_within_prompts"]}
    for where in ("labels", "model"):
        share = length[f"longer_wins_in_{where}"]
        found[f"longer_wins_{where}"] = None if share is None else share["value"]
    found |= {f"rating_{key}": value for key, value in report.get("ratings", {}).items() if key != "ratings"}
    found |= {key: report.get("ensemble", {}).get(key) for key in ("member_accuracies", "disagreement")}
    return {key: value for key, value in found.items() if value is not None}
