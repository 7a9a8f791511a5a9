"""Label sampled rollouts: judge pair by pair, aggregate, rank, split by prompt.

The labels are simulated (annotators with known faults judge by a programmatic gold score), a language model's
(`labeler: ai`, `reward_model/labeling/judged.py`) or people's (`labeler: people`, `reward_model/labeling/people.py`).
Every file says which. What is written by hand has the same format and enters at the same place: the reward stage reads
rankings, whoever made them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
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
)
from reward_model.labeling.groups import Group, LabelResult, comparable, group_rollouts, split
from reward_model.labeling.judged import judge_rollouts
from reward_model.labeling.rounds import joined, read_sides
from reward_model.labeling.simulate import Judgment, judge_pairs
from rlhf.config_schema import LabelStage
from rlhf.rollout.scorers import SCORERS
from rlhf.runs import HELDOUT_RANKINGS, RANKINGS
from rlhf.types import Ranking, Rollout, RunResult

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


def main(cfg: LabelStage, ctx: Any = None) -> RunResult:
    """Run the stage: read `cfg.rollouts`, write rankings, judgments and a report into `cfg.run_dir`.

    Args:
        cfg: the stage's configuration.
        ctx: unused; what a judge model answered is kept in the run folder and never asked again.

    Raises:
        DataError: the rollouts cannot be read, or hold nothing to compare.
        JudgeError: a judge model fails (`labeler: ai`); its answers so far are kept for the next run.
        LabelsPending: people have still to label them (`labeler: people`).
    """
    from rlhf.rollout.buffer import RolloutBuffer

    rollouts = RolloutBuffer.from_parquet(cfg.rollouts).rollouts
    heldout = RolloutBuffer.from_parquet(cfg.heldout_rollouts).rollouts if cfg.heldout_rollouts else []
    result = LABELERS[cfg.labeler](rollouts, cfg, heldout)
    if cfg.earlier:
        earlier, chosen = read_sides(cfg.earlier), cfg.heldout_rollouts is not None
        result.train, result.heldout = joined(earlier, (result.train, result.heldout), chosen=chosen)
    outputs = _write(result, cfg)
    if result.unfinished:
        raise result.unfinished
    return RunResult(cfg.run_dir, result.summary, outputs)


def label_rollouts(
    rollouts: Sequence[Rollout], cfg: LabelStage, heldout_rollouts: Sequence[Rollout] = ()
) -> LabelResult:
    """Simulated labels, without files: rollouts in, rankings, judgments and report out.

    The same annotators label all of it. Held out are the prompts of `heldout_rollouts`, else a share.

    Raises:
        DataError: a prompt has a single response, no prompt has two different ones, or one is to be trained on and
            held out.
    """
    everyone = group_rollouts(rollouts, heldout_rollouts)
    groups = comparable(everyone)
    gold_BK = [SCORERS[cfg.scorer](group.rollouts) for group in groups]
    votes = judge_pairs(gold_BK, cfg.annotators, cfg.seed)
    fit = dawid_skene(votes) if cfg.aggregate == "dawid_skene" else None
    posteriors = fit.posteriors if fit else majority(votes)
    rankings = _rankings(groups, gold_BK, posteriors, cfg)
    train, heldout = split(rankings, heldout_rollouts, cfg.heldout_fraction, cfg.seed)
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
    lines = [_judgment_line(vote, groups) for vote in votes]
    readme = README.format(scorer=cfg.scorer, aggregate=cfg.aggregate)
    agreement = report["agreement_with_gold"]["aggregate"]
    summary = {"labels": "simulated", **report["counts"], "agreement_with_gold": agreement}
    _print_table(report)
    return LabelResult(train, heldout, lines, report, readme, summary)


def _rankings(
    groups: Sequence[Group], gold_BK: Sequence[list[float]], posteriors: dict[Pair, float], cfg: LabelStage
) -> list[Ranking]:
    by_item: list[dict[tuple[int, int], float]] = [{} for _ in groups]
    for (item, i, j), p in posteriors.items():
        by_item[item][i, j] = p
    labeler = f"simulated: {len(cfg.annotators)} annotators around {cfg.scorer}, {cfg.aggregate}"
    return [
        group.ranking(posteriors_of_item, {"labels": "simulated", "labeler": labeler}, gold_K)
        for group, gold_K, posteriors_of_item in zip(groups, gold_BK, by_item, strict=True)
    ]


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
    atomic_write(run_dir / "README.txt", result.readme)
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


def _by_people(rollouts: Sequence[Rollout], cfg: LabelStage, heldout_rollouts: Sequence[Rollout] = ()) -> LabelResult:
    from reward_model.labeling.people import people_rollouts  # the database's packages are an extra

    return people_rollouts(rollouts, cfg, heldout_rollouts)


LABELERS = {"simulated": label_rollouts, "ai": judge_rollouts, "people": _by_people}
