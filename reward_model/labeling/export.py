"""`rlhf label export`: what was labeled, for training and for the record, as one folder that appears whole.

rankings.*.jsonl     rankings of K responses, in our own format, with tokens and aggregated wins
pairs.*.jsonl        pairs, in the same format
preferences.*.jsonl  the same pairs as TRL reads them: prompt, chosen, rejected
judgments.jsonl      everything that was said, withdrawn answers too, as shown and as canonical
agreement.json/html  how far annotators agree, and how far each can be trusted
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reward_model.labeling.agreement import wins_matrix
from reward_model.labeling.agreement_page import render
from reward_model.labeling.judge_votes import judge_wins
from reward_model.labeling.other_tools import WRITERS
from reward_model.labeling.preferences import (
    LABELERS,
    Labeled,
    is_conversational,
    is_held_out,
    label_items,
    preference_row,
    ranking_of,
    unreadable,
)
from reward_model.labeling.records import Item, Judgment
from reward_model.labeling.reliability import agreement_report
from reward_model.labeling.store import LabelStore
from rlhf.checkpoint import export_folder
from rlhf.config_labeling import LabelingStage
from rlhf.data.records import write_rankings
from rlhf.errors import DataError
from rlhf.types import Ranking, RunResult

SPLITS = ("train", "heldout")
README = """What was labeled: {title}
Labeled by: {labels}. Every line says by whom, under `labels` (in our own format under `meta`).

  preferences.*.jsonl  pairs for TRL (DPOTrainer, RewardTrainer): prompt, chosen, rejected
  pairs.*.jsonl        the same pairs in our own format, with tokens: rlhf reward CONFIG dataset.path=FILE
  rankings.*.jsonl     rankings of more responses, in our own format
  judgments.jsonl      all answers, one a line; `effective` is false where a later one took its place
  agreement.json/html  agreement of the annotators

train and heldout share no prompt. Labels that were derived from ratings have files of their own (*_from_ratings.*):
train on those or on comparisons, not on both at once.
"""


def main(cfg: LabelingStage) -> RunResult:
    """Write `run_dir/export/`, in place of an earlier one, and print what it holds.

    Raises:
        DataError: nothing was labeled.
    """
    with LabelStore.open(cfg) as store:
        items, states = store.items(), store.item_states()
        everything, effective = store.judgments(effective=False), store.judgments()
    labeled, left_out = label_items(items, states, effective, cfg.export)
    if not labeled:
        reasons = ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "the queue is empty"
        raise DataError(f"there is nothing to export: {reasons}", fix="judge some items first: rlhf label serve CONFIG")
    folder = Path(cfg.run_dir) / "export"
    report = agreement_report(items, effective, seed=cfg.seed, resamples=cfg.export.resamples, models=True)
    with export_folder(folder) as staging:
        written = write_labels(staging, labeled, left_out, cfg)
        write_judgments(staging / "judgments.jsonl", items, everything, {j.id for j in effective})
        report |= {"exported": written, "left_out": dict(left_out)}
        _write(staging / "agreement.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        _write(staging / "agreement.html", render(report, cfg.title))
        _write(staging / "README.txt", README.format(title=cfg.title, labels=", ".join(report["labels"])))
        for tool in cfg.export.also:
            WRITERS[tool](staging, items, effective)
    outputs = {name.removesuffix(".jsonl").replace(".", "_"): str(folder / name) for name in written}
    _print(folder, report)
    if cfg.export.heldout_fraction and not any(".heldout." in name for name in written):
        chance = f"each has a chance of {cfg.export.heldout_fraction:g}"
        print(f"  no prompt fell to the held-out side ({chance}): label more, or train with eval_dataset: null")
    return RunResult(cfg.run_dir, {"exported": written, "left_out": dict(left_out)}, outputs)


def write_labels(
    folder: Path, labeled: Sequence[Labeled], left_out: Counter[str], cfg: LabelingStage
) -> dict[str, int]:
    """Pairs and rankings into files of their own; returns the number of lines by file.

    What could not be read back is left out and counted in `left_out`.
    """
    parts: dict[str, list[Labeled]] = {split: [] for split in SPLITS}
    for label in labeled:
        held_out = is_held_out(label.item.prompt, cfg.export.heldout_fraction, cfg.seed)
        parts[SPLITS[held_out]].append(label)
    written = {}
    for split, part in parts.items():
        for source, suffix in (("comparisons", ""), ("ratings", "_from_ratings")):
            same = [label for label in part if label.source == source]
            for kind, name in (("ranking", "rankings"), ("pair", "pairs")):
                rankings = [ranking_of(label) for label in same if label.item.kind == kind]
                if readable := _readable(rankings, name, left_out):
                    file = f"{name}{suffix}.{split}.jsonl"
                    write_rankings(folder / file, readable)
                    written[file] = len(readable)
            if rows := _preference_rows(same, labeled, left_out, cfg):
                file = f"preferences{suffix}.{split}.jsonl"
                write_lines(folder / file, rows)
                written[file] = len(rows)
    return written


def _readable(rankings: Sequence[Ranking], name: str, left_out: Counter[str]) -> list[Ranking]:
    reasons = [unreadable(ranking) for ranking in rankings]
    left_out.update(f"{name}: {reason}" for reason in reasons if reason)
    return [ranking for ranking, reason in zip(rankings, reasons, strict=True) if not reason]


def _preference_rows(
    part: Sequence[Labeled], labeled: Sequence[Labeled], left_out: Counter[str], cfg: LabelingStage
) -> list[dict[str, Any]]:
    """The pairs of `part` as TRL reads them; turns or text, and whether there are margins, is one thing for all."""
    pairs = [label for label in labeled if label.item.kind == "pair"]
    conversational = is_conversational(pairs, cfg.export)
    margins = any(label.margin is not None for label in pairs)
    rows = []
    for label in part:
        if label.item.kind == "pair":
            try:
                rows.append(preference_row(label, cfg.export, conversational=conversational, margins=margins))
            except DataError as error:
                left_out[f"preferences: {error.message} ({error.fix})"] += 1
    return rows


def write_judgments(path: Path, items: Sequence[Item], judgments: Sequence[Judgment], effective: set[int]) -> None:
    """Every stored answer, one a line."""
    known = {item.key: item for item in items}
    write_lines(path, (judgment_line(j, known, effective=j.id in effective) for j in judgments))


def judgment_line(judgment: Judgment, items: Mapping[str, Item], *, effective: bool) -> dict[str, Any]:
    """One answer in both orientations; times in milliseconds, `created_ms` since 1970 (UTC).

    `wins` is what a judge that was shown this order said of every pair; null of anybody else.
    """
    item, answer = items[judgment.item_key], judgment.answer
    soft = judge_wins(judgment)
    wins = soft and wins_matrix(soft, len(judgment.order))
    return {
        "id": judgment.id,
        "labels": LABELERS[judgment.labeler],
        "annotator": judgment.annotator,
        "item": judgment.item_key,
        "kind": judgment.kind,
        "prompt_id": item.prompt_id,
        "batch": item.batch,
        "gold": item.gold_ranks is not None,
        "presentation": judgment.presentation,
        "choice": answer.choice,
        "shown": {"order": judgment.order, "value": answer.value, "ranks": answer.ranks},
        "canonical": {"value": judgment.value, "ranks": judgment.ranks, "wins": wins},
        "confidence": answer.confidence,
        "notes": answer.notes,
        "ms_active": answer.ms_active,
        "created_ms": judgment.created_ms,
        "supersedes": judgment.supersedes,
        "effective": effective,
    }


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines."""
    _write(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")  # the folder is staged, and appears whole


def _print(folder: Path, report: Mapping[str, Any]) -> None:
    print(f"{folder}: labeled by {', '.join(report['labels'])}")
    for name, lines in report["exported"].items():
        print(f"  {lines:>6}  {name}")
    for reason, n in report["left_out"].items():
        print(f"  {n:>6}  left out: {reason}")
    raw, alpha = report["pairs"]["raw"], report["pairs"]["alpha_nominal"]
    if raw["value"] is not None:
        chance = alpha["note"] if alpha["value"] is None else f"{alpha['value']:.2f}"
        print(f"  agreement of two annotators on a pair: {raw['value']:.1%}, Krippendorff's alpha {chance}")
