"""What a judge did, and how far it can be believed: place bias, length bias, controls, agreement with people, cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reward_model.labeling.agreement import TIE
from reward_model.labeling.judge import Judge, Judged, Pair
from reward_model.labeling.judge_ledger import Spent
from rlhf.config_judge import JudgeBudgetConfig
from rlhf.eval.winrate import wilson_interval
from rlhf.files import atomic_write

FILE = "judge_report.json"
People = Mapping[tuple[int, int], float]
"""What people say of a contest's pairs: P(response i is better than j), i < j."""


def judge_report(
    judge: Judge, *, wanted: int, seconds: float, people: Sequence[People] | None = None
) -> dict[str, Any]:
    """The report, ready for JSON. Shares come with their 95% interval (Wilson) and the number that they are of.

    Intervals take verdicts as independent; those on one contest are not quite, so they are a little too narrow.

    Args:
        judge: after its last batch.
        wanted: contests that were to be judged.
        seconds: of this run.
        people: by judged contest, in order; None where no person judged.
    """
    cfg, spent = judge.cfg, judge.ledger.spent()
    theirs = people or [{} for _ in judge.work.judged]
    asked = [(one, said) for one, said in zip(judge.work.judged, theirs, strict=True) if not one.unasked]
    pairs = [pair for one, _ in asked for pair in one.pairs.values()]
    labeled = sum(one.labels is not None for one, _ in asked)
    return {
        "labels": "judge",
        "judge": {"name": cfg.annotator, "model": cfg.model, "answer": cfg.answer, "local": cfg.endpoint is None},
        "counts": {
            "items": wanted,
            "items_labeled": labeled,
            "items_unlabeled": len(asked) - labeled,
            "items_not_asked": wanted - len(asked),
            "pairs": len(pairs),
            "pairs_labeled": sum(pair.label is not None for pair in pairs),
            "contradictions": sum(pair.contradicts for pair in pairs),
            "ties": sum(pair.label == 0.5 and not pair.contradicts for pair in pairs),
        },
        "failures": dict(sorted(judge.failures.items())),
        "failure_examples": judge.examples,
        "flip_rate": proportion(sum(pair.contradicts for pair in pairs), sum(pair.both is not None for pair in pairs)),
        "first_slot_rate": _first_slot_rate(pairs),
        "length": _length(asked),
        "people": _people(asked),
        "controls": _controls(judge),
        "usage": {**asdict(spent), "requests_this_run": spent.requests - judge.before.requests, "seconds": seconds},
        "budget_left": _left(cfg.budget, spent),
        "budget_used_up": judge.ledger.exhausted,
    }


def write_report(report: dict[str, Any], run_dir: str | Path, console: Console) -> None:
    """judge_report.json and a table on the terminal."""
    atomic_write(Path(run_dir) / FILE, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    counts, usage, controls = report["counts"], report["usage"], report["controls"]
    table = Table(title=f"labels by a model: {report['judge']['name']}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("what it says")
    failed = ", ".join(f"{n} {kind}" for kind, n in report["failures"].items()) or "none"
    length, agreement = report["length"], report["people"]
    rows = [
        ("items labeled", f"{counts['items_labeled']} of {counts['items']}", f"not asked: {counts['items_not_asked']}"),
        ("questions without answer", str(sum(report["failures"].values())), failed),
        ("both orders contradict", _share(report["flip_rate"]), "such pairs count as ties"),
        ("first place preferred", _share(report["first_slot_rate"]), "50% without a place bias"),
        ("longer one preferred", _share(length["longer_wins"]), f"expected: {length['expected_from']}"),
        ("kappa with people", _number(agreement["kappa"]), agreement["note"] or f"{agreement['pairs']} pairs"),
        ("controls failed", f"{controls['failed']} of {controls['answered']}", controls["alarm"] or "no alarm"),
        ("requests", f"{usage['requests']:,}", f"{usage['requests_this_run']:,} in this run"),
        ("tokens", f"{usage['tokens_in'] + usage['tokens_out']:,}", f"cost {usage['cost']:.4g}"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if report["budget_used_up"]:
        console.print(
            f"The budget is used up: {counts['items_not_asked']} items are left. Raise judge.budget and run the same "
            "command again: it goes on from here.",
            markup=False,
        )


def proportion(successes: float, n: int) -> dict[str, Any] | None:
    """A share with its 95% interval; None of nothing."""
    if n == 0:
        return None
    low, high = wilson_interval(successes, n)
    return {"value": successes / n, "low": low, "high": high, "n": n}


def _first_slot_rate(pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """The share of verdicts for place A, over pairs with two verdicts: they show each response in both places."""
    decided = [said.p_first for pair in pairs for said in pair.both or () if abs(said.p_first - 0.5) > TIE]
    return proportion(sum(p > 0.5 for p in decided), len(decided))


def _length(asked: Sequence[tuple[Judged, People]]) -> dict[str, Any]:
    """How often the longer response (in characters) wins, of pairs that are decided and differ in length.

    Expected is what people prefer on the same pairs; where they judged none, one half.
    """
    longer: list[bool] = []
    theirs: list[bool] = []
    for one, said in asked:
        for (i, j), pair in one.pairs.items():
            gap = len(one.contest.responses[i]) - len(one.contest.responses[j])
            if gap == 0 or pair.label is None:
                continue
            if pair.label != 0.5:
                longer.append((pair.label > 0.5) == (gap > 0))
            if (by_people := said.get((i, j), 0.5)) != 0.5:
                theirs.append((by_people > 0.5) == (gap > 0))
    share, expected = proportion(sum(longer), len(longer)), proportion(sum(theirs), len(theirs))
    expects = expected["value"] if expected else 0.5
    return {
        "longer_wins": share,
        "expected": expects,
        "expected_from": f"people, {expects:.0%} of {len(theirs)} pairs" if theirs else "no preference, 50%",
        "excess": share and share["value"] - expects,
    }


def _people(asked: Sequence[tuple[Judged, People]]) -> dict[str, Any]:
    """Agreement on pairs that both judged, a tie being a verdict like any other; Cohen 1960's kappa."""
    ours: list[int] = []
    theirs: list[int] = []
    for one, said in asked:
        for key, pair in one.pairs.items():
            if pair.label is not None and key in said:
                ours.append(_sign(pair.label))
                theirs.append(_sign(said[key]))
    kappa, note = None, ""
    if not ours:
        note = "undefined (no pair judged by both)"
    elif len({*ours, *theirs}) == 1:
        note = "undefined (all agree)"
    else:
        from sklearn.metrics import cohen_kappa_score

        kappa = float(cohen_kappa_score(ours, theirs))
    agreement = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours) if ours else None
    return {"pairs": len(ours), "agreement": agreement, "kappa": kappa, "note": note}


def _sign(p: float) -> int:
    return 0 if abs(p - 0.5) <= TIE else 1 if p > 0.5 else -1


def _controls(judge: Judge) -> dict[str, Any]:
    kinds: dict[str, dict[str, int]] = {}
    for control, pair in judge.work.controls:
        row = kinds.setdefault(control.kind, {"asked": 0, "answered": 0, "failed": 0})
        row["asked"] += 1
        row["answered"] += pair.label is not None
        row["failed"] += pair.label is not None and pair.label <= 0.5 + TIE
    total = {key: sum(row[key] for row in kinds.values()) for key in ("asked", "answered", "failed")}
    return {**total, "kinds": kinds, "alarm": judge.work.alarm}


def _left(budget: JudgeBudgetConfig, spent: Spent) -> dict[str, Any]:
    """What the budget still allows, of each of its limits."""
    used = (("requests", spent.requests), ("tokens", spent.tokens_in + spent.tokens_out), ("cost", spent.cost))
    limits = {key: (getattr(budget, f"max_{key}"), value) for key, value in used}
    return {key: limit - value for key, (limit, value) in limits.items() if limit is not None}


def _share(share: dict[str, Any] | None) -> str:
    if share is None:
        return "undefined"
    return f"{share['value']:.1%} ({share['low']:.0%} to {share['high']:.0%})"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"
