"""`rlhf label import CONFIG FILE`: the pairs or rankings of a file into the queue, with their labels if wanted.

The same prompt with the same responses, in whatever order, is one item: several rows about it are several answers.
Importing a file twice adds nothing the second time.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_model.labeling.history import Shown, record_answer
from reward_model.labeling.imports import NAMELESS, PARSERS, Imported, Said
from reward_model.labeling.other_tools import READERS
from reward_model.labeling.records import Answer, canonical_ranks, neutral_order
from reward_model.labeling.store import LabelStore
from rlhf.config import did_you_mean
from rlhf.config_labeling import LabelingStage
from rlhf.config_schema import DatasetConfig
from rlhf.data.fields import FieldError, Fields
from rlhf.data.formats import detect_format
from rlhf.data.rows import BadRow, iterate
from rlhf.errors import ConfigError, DataError

FORMATS = {**PARSERS, **READERS}
_SHOWN = 5  # bad rows named in a message


def main(
    cfg: LabelingStage,
    file: str,
    format: str = "auto",
    with_labels: bool = False,
    gold: bool = False,
    max_bad_fraction: float = 0.0,
) -> None:
    """Queue the items of `file`, and say what was added.

    Args:
        format: one of `FORMATS`, or auto.
        with_labels: store the file's labels, too, under the names of imported annotators.
        gold: the file's labels are the known answers of gold questions.
        max_bad_fraction: of the rows may be malformed; they are left out and named.

    Raises:
        DataError: rows are malformed; nothing is added.
        ConfigError: there is no such format, or both `with_labels` and `gold`.
    """
    if with_labels and gold:
        raise ConfigError("--with-labels and --gold exclude each other", fix="import gold questions by themselves")
    imported = merge(read(file, format, max_bad_fraction))
    for entry in imported:
        entry.item.source, entry.item.wanted = file, cfg.judgments_per_item
        entry.item.batch = entry.item.batch or cfg.queue.batch
        if gold:
            entry.item.gold_ranks = gold_ranks(entry)
    with LabelStore.open(cfg) as store:
        added = store.add_items(entry.item for entry in imported)
        what = "gold question" if gold else "item"
        print(f"{file}: {added.new} new {what}{'s' * (added.new != 1)}, {added.known} known")
        if added.known and (others := _queued_as_others(store, imported, gold)):
            one, several = ("an item", "items") if gold else ("a gold question", "gold questions")
            stay = f"was queued as {one} before and stays one"
            stay = stay if others == 1 else f"were queued as {several} before and stay such"
            print(f"  {others} of the known ones {stay}")
        if with_labels:
            labels = record(store, imported)
            names = sorted({said.annotator for entry in imported for said in entry.said})
            print(f"  {labels} labels by {len(names)} annotators: {', '.join(names[:5])}{' ...' if names[5:] else ''}")
            if soft := sum(said.was_soft for entry in imported for said in entry.said):
                kept = "their order is, and a margin as a strength"
                print(f"  {soft} of them came with probabilities, which are not stored: {kept}")


def _queued_as_others(store: LabelStore, imported: Sequence[Imported], gold: bool) -> int:
    """How many of these are gold questions in the database and were not to be, or the other way round."""
    keys = {entry.item.key for entry in imported}
    return sum((item.gold_ranks is not None) != gold for item in store.items() if item.key in keys)


def read(file: str, format: str = "auto", max_bad_fraction: float = 0.0) -> list[Imported]:
    """The rows of a file in order, each with its place; malformed ones, where they are tolerated, are named.

    Raises:
        DataError: no such file, no rows, or malformed ones: the first of them by file, line and key.
        ConfigError: there is no such format.
    """
    if format not in ("auto", *FORMATS):
        fix = f"use auto or one of {', '.join(FORMATS)}{did_you_mean(format, FORMATS)}"
        raise ConfigError(f"--format {format!r} is not known", fix=fix)
    found: list[Imported] = []
    bad: list[BadRow] = []
    for row in iterate(DatasetConfig.model_validate({"path": str(Path(file).expanduser())})):
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            format = detect(row.fields) if format == "auto" else format
            entry = FORMATS[format](row.fields)
            entry.where = row.where
            found.append(entry)
        except FieldError as error:
            bad.append(BadRow(row.where, f"{error.message}; {error.fix}"))
    if bad:
        _judge(file, format, bad, len(found) + len(bad), max_bad_fraction)
    if not found:
        raise DataError(f"{file} has no rows", fix="give a file with at least one row")
    return found


def _judge(file: str, format: str, bad: list[BadRow], total: int, max_bad_fraction: float) -> None:
    listed = "\n".join(f"  - {row}" for row in bad[:_SHOWN])
    listed += f"\n  - and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    summary = f"{file}, read as {format}: {len(bad)} of {total} rows are malformed"
    if len(bad) > max_bad_fraction * total:
        fix = "correct these rows, leave them out with --max-bad-fraction, or set --format if it was taken wrongly"
        raise DataError(f"{summary}\n{listed}", fix=fix)
    print(f"{summary} and left out\n{listed}")


def detect(fields: Fields) -> str:
    """The format of a row.

    Raises:
        FieldError: none of ours.
    """
    keys = {key for key, value in fields.items() if value is not None}
    if "fields" in keys and keys & {"responses", "suggestions"}:
        return "argilla"
    if {"data", "annotations"} <= keys or {"data", "predictions"} <= keys or {"annotation_id", "annotator"} <= keys:
        return "label_studio"
    if {"info", "summaries"} <= keys:
        return "tldr"
    if {"instruction", "completions"} <= keys:
        return "ultrafeedback"
    name = detect_format(fields)
    if name not in FORMATS:
        fix = f"give one of {', '.join(FORMATS)}; rollout buffers are queued by `rlhf label queue`"
        raise FieldError(min(keys), f"is of a row of format {name!r}, which holds no comparison", fix=fix)
    return name


def merge(entries: list[Imported]) -> list[Imported]:
    """One entry per prompt and set of responses, in the order of the first rows; responses in neutral order."""
    merged: dict[str, Imported] = {}
    for entry in entries:
        item = entry.item
        order = neutral_order(item.responses)
        item.responses = [item.responses[i] for i in order]
        first = merged.setdefault(item.key, Imported(item, [], entry.where))
        for said in entry.said:
            said.answer = reordered(said.answer, order)
            first.said.append(said)
    for entry in merged.values():
        _tell_apart(entry.said)
    return list(merged.values())


def _tell_apart(said: Sequence[Said]) -> None:
    """Rows without a name are different people's: of one person, a further answer to an item would not count."""
    times: Counter[str] = Counter()
    for one in said:
        times[one.annotator] += 1
        if one.annotator.startswith(NAMELESS) and times[one.annotator] > 1:
            one.annotator += f" {times[one.annotator]}"


def reordered(answer: Answer, order: list[int]) -> Answer:
    """An answer by response as one to the same responses in another order: place i holds what was `order[i]`."""
    changed: dict[str, Any] = {}
    if answer.ranks is not None:
        changed["ranks"] = [answer.ranks[i] for i in order]
    if answer.value is not None and order == [1, 0]:
        changed["value"] = -answer.value
    return Answer(**{**vars(answer), **changed})


def gold_ranks(entry: Imported) -> list[int]:
    """The known answer of a gold question.

    Raises:
        DataError: it has none, several that differ, or one that tells no two responses apart.
    """
    order = list(range(len(entry.item.responses)))
    answers = {tuple(canonical_ranks(said.answer, order)) for said in entry.said if said.answer.choice != "skip"}
    if len(answers) != 1 or len(set(*answers)) < 2:
        fix = "give every gold question one label that names a better response"
        raise DataError(f"{entry.where}: {len(answers)} labels, or a tie, for a gold question", fix=fix)
    return list(*answers)


def record(store: LabelStore, imported: Sequence[Imported]) -> int:
    """Stores the labels of queued items, all or none; returns how many.

    A second answer of one annotator to one item is a second presentation.
    """
    users = {
        (said.annotator, said.labeler): store.ensure_user(said.annotator, role="annotator", labeler=said.labeler)
        for entry in imported
        for said in entry.said
    }
    labels = 0
    with store.begin() as session:
        for entry in imported:
            presentations: Counter[str] = Counter()
            order = list(range(len(entry.item.responses)))
            for said in entry.said:
                shown = Shown(entry.item.key, order, presentations[said.annotator])
                presentations[said.annotator] += 1
                content = f"{shown}/{said.annotator}/{sorted(vars(said.answer).items())}"
                submission_id = f"import-{hashlib.sha256(content.encode()).hexdigest()[:32]}"
                user_id = users[said.annotator, said.labeler]
                record_answer(session, user_id, shown, said.answer, submission_id, store.clock())
                labels += 1
    return labels
