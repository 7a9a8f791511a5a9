"""Label sampled rollouts: score, judge pair by pair, aggregate, rank, split by prompt.

The labels are simulated: annotators with known faults judge by a programmatic gold score. Every file says so.
What people write by hand has the same format and enters at the same place: the reward stage reads rankings,
whoever made them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reward_model.labeling.agreement import (
    TIE,
    DawidSkene,
    Pair,
    agreement_with_gold,
    annotator_report,
    dawid_skene,
    majority,
    ranks_from_wins,
    wins_matrix,
)
from reward_model.labeling.rounds import joined, read_sides
from reward_model.labeling.simulate import Judgment, judge_pairs
from rlhf.config_schema import LabelStage
from rlhf.errors import DataError
from rlhf.rollout.scorers import SCORERS
from rlhf.runs import HELDOUT_RANKINGS, RANKINGS
from rlhf.types import Prompt, Ranking, Rollout, RunResult

NOTICE = (
    "Labels in this folder are SIMULATED: no person has judged anything. Annotators with known faults were "
    "simulated around a programmatic score; to label by hand, write `ranks` for each prompt in the format of "
    "rankings.*.jsonl and point `rlhf reward` at the file (README.txt says how)."
)

README = """Labels in this folder are SIMULATED. No person has judged anything.

A program scored every response ({scorer}). Simulated annotators, with known noise, bias and carelessness,
compared the responses of each prompt in pairs. Their votes were aggregated ({aggregate}) into rankings.

  rankings.train.jsonl    one prompt a line: its responses and their ranks, for training the reward model
  rankings.heldout.jsonl  the same for the prompts kept for testing; no prompt is in both files
  judgments.jsonl         one vote a line: item and the two sides as shown, by prompt and response index
  labels_report.json      how good each annotator was, and how far the aggregate agrees with the score

To label by hand instead
  1. Copy the lines of rankings.train.jsonl to a new file.
  2. For each line, read `prompt` and `responses`, and write `ranks`: one number per response, 1 for the best,
     equal numbers for a tie. [2, 1, 3] says that the second response is the best. Do not look at old ranks.
  3. Delete `wins` and `gold_scores`: they come from the simulation, and `wins` counts for more than `ranks`.
     Keep `tokens`, if present, as they are; a response whose text you edit is read from its text. Write "human"
     for "simulated" in `meta`.
  4. Train on it: rlhf reward CONFIG dataset.path=YOUR_FILE dataset.format=ranking
The least that a line needs: {{"prompt": "...", "responses": ["One answer.", "Another."], "ranks": [2, 1]}}
"""


@dataclass
class LabelResult:
    """What labeling yields, before anything is written."""

    train: list[Ranking]
    heldout: list[Ranking]
    judgments: list[dict[str, Any]]
    report: dict[str, Any]


@dataclass
class Group:
    """The distinct responses to one prompt; `duplicates` counts those dropped."""

    prompt: Prompt
    prompt_id: str
    rollouts: list[Rollout] = field(default_factory=list)
    duplicates: int = 0


def main(cfg: LabelStage, ctx: Any = None) -> RunResult:
    """Run the stage: read `cfg.rollouts`, write rankings, judgments and a report into `cfg.run_dir`.

    Args:
        cfg: the stage's configuration.
        ctx: unused; labeling has no device and nothing to resume.

    Raises:
        DataError: the rollouts cannot be read, or hold nothing to compare.
    """
    from rlhf.rollout.buffer import RolloutBuffer

    rollouts = RolloutBuffer.from_parquet(cfg.rollouts).rollouts
    heldout = RolloutBuffer.from_parquet(cfg.heldout_rollouts).rollouts if cfg.heldout_rollouts else []
    result = label_rollouts(rollouts, cfg, heldout)
    if cfg.earlier:
        earlier, chosen = read_sides(cfg.earlier), cfg.heldout_rollouts is not None
        result.train, result.heldout = joined(earlier, (result.train, result.heldout), chosen=chosen)
    outputs = _write(result, cfg)
    _print_table(result.report)
    agreement = result.report["agreement_with_gold"]["aggregate"]
    summary = {"labels": "simulated", **result.report["counts"], "agreement_with_gold": agreement}
    return RunResult(cfg.run_dir, summary, outputs)


def label_rollouts(
    rollouts: Sequence[Rollout], cfg: LabelStage, heldout_rollouts: Sequence[Rollout] = ()
) -> LabelResult:
    """The stage without its files: rollouts in, rankings, judgments and report out.

    The same annotators label all of it. Held out are the prompts of `heldout_rollouts`, else a share.

    Raises:
        DataError: a prompt has a single response, no prompt has two different ones, or one is to be trained on and
            held out.
    """
    held_ids = {rollout.prompt_id for rollout in heldout_rollouts}
    if both := held_ids & {rollout.prompt_id for rollout in rollouts}:
        raise DataError(
            f"{len(both)} prompts are in rollouts and in heldout_rollouts, {min(both)!r} for one",
            fix="sample held-out prompts that are not in the training prompts",
        )
    everyone = group_rollouts([*rollouts, *heldout_rollouts])
    groups = [group for group in everyone if len(group.rollouts) >= 2]
    if not groups:
        raise DataError(
            f"none of {len(everyone)} prompts has two different responses: there is nothing to compare",
            fix="sample with completions_per_prompt of 2 or more and a higher temperature",
        )
    gold_BK = [SCORERS[cfg.scorer](group.rollouts) for group in groups]
    votes = judge_pairs(gold_BK, cfg.annotators, cfg.seed)
    fit = dawid_skene(votes) if cfg.aggregate == "dawid_skene" else None
    posteriors = fit.posteriors if fit else majority(votes)
    rankings = _rankings(groups, gold_BK, posteriors, cfg)
    if held_ids:
        train, heldout = split_off(rankings, held_ids)
    else:
        train, heldout = split_by_prompt(rankings, cfg.heldout_fraction, cfg.seed)
    report = {
        "notice": NOTICE,
        "labels": "simulated",
        "scorer": cfg.scorer,
        "aggregate": cfg.aggregate,
        "counts": {
            "prompts": len(groups),
            "prompts_train": len(train),
            "prompts_heldout": len(heldout),
            "prompts_left_out": len(everyone) - len(groups),
            "responses": sum(len(group.rollouts) for group in groups),
            "duplicates_dropped": sum(group.duplicates for group in everyone),
            "pairs": len(posteriors),
            "pairs_undecided": sum(abs(p - 0.5) <= TIE for p in posteriors.values()),
            "pairs_gold_tied": sum(gold_BK[b][i] == gold_BK[b][j] for b, i, j in posteriors),
            "judgments": len(votes),
        },
        **_quality(votes, posteriors, gold_BK, fit),
        "configured_annotators": [annotator.model_dump() for annotator in cfg.annotators],
    }
    return LabelResult(train, heldout, [_judgment_line(vote, groups) for vote in votes], report)


def group_rollouts(rollouts: Sequence[Rollout]) -> list[Group]:
    """Rollouts by prompt, in order of appearance. Of identical texts to one prompt, the first is kept.

    Raises:
        DataError: a prompt has a single response, or an id stands for two prompts.
    """
    groups: dict[str, Group] = {}
    for rollout in rollouts:
        group = groups.setdefault(rollout.prompt_id, Group(rollout.prompt, rollout.prompt_id))
        if group.prompt != rollout.prompt:
            raise DataError(
                f"prompt_id {rollout.prompt_id!r} stands for two different prompts",
                fix="sample all rollouts of this file in one run",
            )
        if any(rollout.response == kept.response for kept in group.rollouts):
            group.duplicates += 1
        else:
            group.rollouts.append(rollout)
    for group in groups.values():
        if len(group.rollouts) + group.duplicates < 2:
            raise DataError(
                f"prompt {group.prompt_id!r} has a single response; a preference needs two",
                fix="sample with completions_per_prompt of 2 or more",
            )
    return list(groups.values())


def split_by_prompt(
    rankings: Sequence[Ranking], heldout_fraction: float, seed: int
) -> tuple[list[Ranking], list[Ranking]]:
    """Train and held-out rankings, each in the given order; no prompt is in both.

    Prompts are sorted by a hash of (seed, prompt_id) and the first round(fraction * n) are held out: the
    share is exact, the order of the input plays no part. With a fraction above 0, of two prompts or more at
    least one is held out, and at least one is always left to train on.
    """
    ids = {ranking.prompt_id for ranking in rankings}
    order = sorted(ids, key=lambda prompt_id: hashlib.sha256(f"{seed}/{prompt_id}".encode()).digest())
    n = round(heldout_fraction * len(order))
    if heldout_fraction > 0:
        n = min(max(n, 1), len(order) - 1)
    return split_off(rankings, set(order[:n]))


def split_off(rankings: Sequence[Ranking], held_ids: set[str]) -> tuple[list[Ranking], list[Ranking]]:
    """(train, held-out), each in the given order."""
    train = [ranking for ranking in rankings if ranking.prompt_id not in held_ids]
    return train, [ranking for ranking in rankings if ranking.prompt_id in held_ids]


def _rankings(
    groups: Sequence[Group], gold_BK: Sequence[list[float]], posteriors: dict[Pair, float], cfg: LabelStage
) -> list[Ranking]:
    by_item: list[dict[tuple[int, int], float]] = [{} for _ in groups]
    for (item, i, j), p in posteriors.items():
        by_item[item][i, j] = p
    labeler = f"simulated: {len(cfg.annotators)} annotators around {cfg.scorer}, {cfg.aggregate}"
    rankings = []
    for group, gold_K, posteriors_of_item in zip(groups, gold_BK, by_item, strict=True):
        wins = wins_matrix(posteriors_of_item, len(group.rollouts))
        rankings.append(
            Ranking(
                prompt=group.prompt,
                responses=[rollout.response for rollout in group.rollouts],
                ranks=ranks_from_wins(wins),
                wins=wins,
                tokens=[rollout.tokens for rollout in group.rollouts],
                gold_scores=gold_K,
                prompt_id=group.prompt_id,
                meta={"labels": "simulated", "labeler": labeler},
            )
        )
    return rankings


def _quality(
    votes: Sequence[Judgment],
    posteriors: dict[Pair, float],
    gold_BK: Sequence[Sequence[float]],
    fit: DawidSkene | None,
) -> dict[str, Any]:
    """The report's figures on annotators and aggregate."""
    quality: dict[str, Any] = annotator_report(votes, posteriors, gold_BK)
    agreement: dict[str, Any] = {
        "aggregate": agreement_with_gold(posteriors, gold_BK),
        "majority": agreement_with_gold(majority(votes), gold_BK),
    }
    if agreement["aggregate"] is None:
        agreement["notes"] = {"aggregate": "undefined (gold ties on every pair)"}
    quality["agreement_with_gold"] = agreement
    if fit:
        estimated = asdict(fit)
        for bulky in ("posteriors", "objectives"):
            del estimated[bulky]
        quality["dawid_skene"] = estimated
    return quality


def _judgment_line(vote: Judgment, groups: Sequence[Group]) -> dict[str, Any]:
    return {"simulated": True, "prompt_id": groups[vote.item].prompt_id, **asdict(vote)}


def _write(result: LabelResult, cfg: LabelStage) -> dict[str, str]:
    """Write every file whole, the report last; returns the next stage's inputs."""
    from rlhf.data.records import write_rankings
    from rlhf.files import atomic_write

    run_dir = Path(cfg.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(run_dir / "README.txt", README.format(scorer=cfg.scorer, aggregate=cfg.aggregate))
    write_rankings(run_dir / RANKINGS, result.train)
    write_rankings(run_dir / HELDOUT_RANKINGS, result.heldout)
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in result.judgments)
    atomic_write(run_dir / "judgments.jsonl", "".join(lines))
    report = json.dumps(result.report, indent=1, ensure_ascii=False)
    atomic_write(run_dir / "labels_report.json", report + "\n")
    outputs = {"train": str(run_dir / RANKINGS)}
    if result.heldout:
        outputs["heldout"] = str(run_dir / HELDOUT_RANKINGS)
    return outputs


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    counts = report["counts"]
    sizes = ", ".join(f"{counts[key]} {key}" for key in ("prompts", "pairs", "judgments"))
    table = Table(title=f"simulated labels: {sizes}")
    for column in ("annotator", "left rate", "agrees with aggregate", "agrees with gold"):
        table.add_column(column, justify="left" if column == "annotator" else "right")
    for name, row in report["annotators"].items():
        table.add_row(name, *(_percent(row[key]) for key in ("left_rate", "agreement", "accuracy")))
    table.add_row(report["aggregate"], "", "", _percent(report["agreement_with_gold"]["aggregate"]))
    Console().print(table)


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.1%}"
