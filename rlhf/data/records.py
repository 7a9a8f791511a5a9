"""Rows read into typed records. A malformed row is named by file, line and key.

It is an error, unless the data set's `max_bad_fraction` tolerates it: then the row is quarantined, which means
left out, counted, and listed in `Records.quarantined`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from rlhf.config_schema import DatasetConfig
from rlhf.data.fields import FieldError, Fields, as_chat
from rlhf.data.formats import (
    DEMONSTRATIONS,
    PROMPTS,
    RANKINGS,
    RATINGS,
    detect_format,
    labels_of,
    scalar_meta,
)
from rlhf.data.rows import BadRow, Row, iterate
from rlhf.errors import DataError
from rlhf.types import Prompt, Ranking, Rating

__all__ = [
    "BadRow",
    "Demonstration",
    "PromptRecord",
    "Records",
    "Row",
    "as_chat",
    "detect_format",
    "prompt_id",
    "read_demonstrations",
    "read_prompts",
    "read_rankings",
    "read_ratings",
    "read_rows",
    "write_rankings",
]

log = logging.getLogger(__name__)
T = TypeVar("T")
P = TypeVar("P")

_SHOWN = 3  # bad rows named in a message


class Records(list[T]):
    """The usable records in file order, their format, and the rows that were left out.

    `places`: of rankings and ratings, which do not carry it themselves, where each one stands.
    """

    def __init__(self, records: Iterable[T] = (), *, format: str = "", quarantined: Iterable[BadRow] = ()) -> None:
        super().__init__(records)
        self.format = format
        self.quarantined = list(quarantined)
        self.places: list[str] = []


@dataclass
class PromptRecord:
    """A prompt to answer. `prompt_id` depends on it alone; `meta` holds the row's other single values."""

    prompt: Prompt
    prompt_id: str
    meta: dict[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass
class Demonstration:
    """A prompt with the answer to imitate. A plain text (format `text`) is an answer to the prompt ""."""

    prompt: Prompt
    completion: str
    where: str = ""


def prompt_id(prompt: Prompt) -> str:
    """12 hexadecimal digits of the SHA-1 of the prompt: the same in every run, file and process."""
    text = json.dumps(prompt, sort_keys=True, ensure_ascii=False)
    return hashlib.sha1(text.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()[:12]


# --- the five readers --------------------------------------------------------------------------------------


def read_rows(cfg: DatasetConfig) -> Records[Row]:
    """The rows as they are, the first `limit` of them. `split` speaks of the hub only: a local file has one.

    Raises:
        DataError: no such file or hub id, nothing in it, or more bad rows than tolerated.
    """
    return _keep(cfg, lambda row: row)


def read_prompts(cfg: DatasetConfig) -> Records[PromptRecord]:
    """The prompt part of every row, whatever the format. Pairs, rankings and ratings of one prompt give one record.

    Raises:
        DataError: see `read_rows`; also rows without a usable prompt.
    """
    parser = _Parser(cfg, PROMPTS, "prompts")

    def build(row: Row) -> PromptRecord:
        prompt = parser(row)
        return PromptRecord(prompt, prompt_id(prompt), scalar_meta(row.fields), row.where)

    records = _keep(cfg, build, parser)
    if parser.format in RANKINGS or parser.format in RATINGS:
        first = {record.prompt_id: record for record in reversed(records)}
        records[:] = [record for record in records if first[record.prompt_id] is record]
    return records


def read_demonstrations(cfg: DatasetConfig) -> Records[Demonstration]:
    """Prompt and answer of every row; of a pair, the chosen answer.

    Raises:
        DataError: see `read_rows`; also a format without answers, or rows without a usable one.
    """
    parser = _Parser(cfg, DEMONSTRATIONS, "demonstrations")
    return _keep(cfg, lambda row: Demonstration(*parser(row), where=row.where), parser)


def read_rankings(cfg: DatasetConfig) -> Records[Ranking]:
    """Rankings; a pair is a ranking of two, with `wins` if it has a `probability`.

    Raises:
        DataError: see `read_rows`; also a format without preferences, equal sides, or a malformed ranking.
    """
    parser = _Parser(cfg, RANKINGS, "preferences")
    places: list[str] = []

    def build(row: Row) -> Ranking:
        ranking = parser(row)
        places.append(row.where)
        ranking.prompt_id = ranking.prompt_id or prompt_id(ranking.prompt)
        ranking.meta = ranking.meta if parser.format == "ranking" else scalar_meta(row.fields)
        return ranking

    records = _keep(cfg, build, parser)
    records.places = places
    return records


def read_ratings(cfg: DatasetConfig) -> Records[Rating]:
    """A rating per row; a prompt may have several.

    Raises:
        DataError: see `read_rows`; also a format without ratings, or a comparison among them.
    """
    parser = _Parser(cfg, RATINGS, "ratings")
    places: list[str] = []

    def build(row: Row) -> Rating:
        rating = parser(row)
        places.append(row.where)
        rating.prompt_id = prompt_id(rating.prompt)
        return rating

    records = _keep(cfg, build, parser)
    records.places = places
    return records


def write_rankings(path: str | Path, rankings: Iterable[Ranking]) -> None:
    """JSON lines that `read_rankings` reads back. The file appears whole or not at all.

    Raises:
        DataError: a value that JSON cannot hold, such as NaN among the gold scores.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staged.open("w", encoding="utf-8") as file:
            for i, ranking in enumerate(rankings, 1):
                file.write(_ranking_line(ranking, f"{path}:{i}") + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def _ranking_line(ranking: Ranking, where: str) -> str:
    present = {key: value for key, value in asdict(ranking).items() if value is not None}
    try:
        return json.dumps(present, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        fix = "give finite numbers, and only texts, numbers, lists and objects in meta"
        raise DataError(f"{where}: this ranking cannot be written as JSON ({error})", fix=fix) from None


# --- tolerance ---------------------------------------------------------------------------------------------


class _Parser:
    """Reads every row by the data set's one format, settled by its first readable row.

    One format for all rows, because a pair that lost a side would else pass for something simpler.
    """

    def __init__(self, cfg: DatasetConfig, table: Mapping[str, Callable[[Fields], Any]], wanted: str) -> None:
        self.format = "" if cfg.format == "auto" else cfg.format
        self._table, self._wanted, self._checked = table, wanted, False

    def __call__(self, row: Row) -> Any:
        if not self._checked:
            self.format = self.format or detect_format(row.fields)
            self._check(row)
            self._checked = True
        self._refuse_mixture(row)
        return self._table[self.format](row.fields)

    def _check(self, row: Row) -> None:
        if self.format in self._table:
            return
        fix = f"give one of the formats {', '.join(self._table)}; or set `format:` if it was taken wrongly"
        if self.format == "rollouts":
            fix = "rank the rollouts first: run the stage `label` on this file and use its rankings"
        elif self.format in RATINGS and self._wanted == "preferences":
            fix = "give comparisons; ratings are for training alone, with `loss: pointwise`"
        elif self.format in RANKINGS and self._wanted == "ratings":
            fix = "set another loss: `pointwise` learns from ratings, all others from comparisons"
        raise DataError(f"{row.where}: no {self._wanted} can be read from rows of format {self.format!r}", fix=fix)

    def _refuse_mixture(self, row: Row) -> None:
        """Not a matter of tolerance: a number for one answer and a choice between two are different measurements.

        Raises:
            DataError: a rating among comparisons, or the other way round.
        """
        if self._table is not RANKINGS and self._table is not RATINGS:
            return
        wanted = "ratings" if self._table is RATINGS else "comparisons"
        found = labels_of(row.fields)
        if found and found != wanted:
            raise DataError(
                f"{row.where}: {found} among {wanted}; no reward model learns from both in one training set",
                fix="put them into two files and train on one of them",
            )


def _keep(cfg: DatasetConfig, build: Callable[[Row], P], parser: _Parser | None = None) -> Records[P]:
    """`build` of every row that is well-formed.

    Raises:
        DataError: no row at all, none usable, or too many bad ones.
    """
    records: Records[P] = Records()
    for row in islice(iterate(cfg), cfg.limit):
        try:
            if isinstance(row, BadRow):
                records.quarantined.append(row)
            else:
                records.append(build(row))
        except FieldError as error:
            records.quarantined.append(BadRow(row.where, f"{error.message}; {error.fix}"))
    records.format = parser.format if parser else ""
    _judge(cfg, len(records), records.quarantined)
    return records


def _judge(cfg: DatasetConfig, good: int, bad: list[BadRow]) -> None:
    total = good + len(bad)
    if not total:
        raise DataError(f"{cfg.path} has no rows", fix="give a file with at least one row")
    if not bad:
        return
    share = len(bad) / total
    listed = "\n".join(f"  - {row}" for row in bad[:_SHOWN])
    if len(bad) > _SHOWN:
        listed += f"\n  - and {len(bad) - _SHOWN} more"
    summary = f"{cfg.path}: {len(bad)} of {total} rows are malformed ({share:.2%})"
    if share > cfg.max_bad_fraction:
        fix = "correct these rows, or set `format:` if it was taken wrongly"
        if share < 0.5:  # more would not be bad rows in a data set, but another data set
            fix = f"correct these rows, or leave them out with `max_bad_fraction: {_round_up(share)}`"
        raise DataError(f"{summary}, tolerated are {cfg.max_bad_fraction:.2%}\n{listed}", fix=fix)
    if not good:
        raise DataError(f"{summary}, so nothing is left\n{listed}", fix="correct the rows, or set `format:`")
    log.warning("%s and were left out\n%s", summary, listed)


def _round_up(share: float) -> float:
    return min(1.0, round(share + 0.0005, 3) if share < 0.1 else round(share + 0.005, 2))
