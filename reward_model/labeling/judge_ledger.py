"""Every question that a judge was asked in a run folder, with its answer and its price: cache, budget and resume.

A row is on the disk before its question is sent, with the most that it can cost, and is settled when the answer is
there. So a process that is killed asks again only what was in flight, and has not forgotten what that may have cost.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config_judge import JudgeBudgetConfig
from rlhf.errors import JudgeError

FILE = "judge_cache.sqlite"

_TABLE = """
CREATE TABLE IF NOT EXISTS asked (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    tokens_in INTEGER NOT NULL,
    tokens_out INTEGER NOT NULL,
    answer TEXT
);
CREATE INDEX IF NOT EXISTS ix_asked_key ON asked (key);
"""


@dataclass(frozen=True)
class Spent:
    """What was used; `cost` in the currency of the prices."""

    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


@dataclass(frozen=True)
class Size:
    """Tokens of a question: those that are read, and those of the answer; before it is asked, the most of each."""

    tokens_in: int
    tokens_out: int


class Ledger:
    """Safe for threads; one process at a time.

    Args:
        folder: of the run.
        budget: for all that was ever asked in this folder.

    Raises:
        JudgeError: another process judges in this folder, or the file is damaged.
    """

    def __init__(self, folder: Path, budget: JudgeBudgetConfig) -> None:
        self._budget = budget
        self._changed = threading.Condition()
        self._in_flight: dict[int, Size] = {}
        self.exhausted = False
        path = folder / FILE
        try:
            self._database = sqlite3.connect(path, timeout=0.1, isolation_level=None, check_same_thread=False)
            for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.executescript(_TABLE)
            totals = "SELECT count(*), coalesce(sum(tokens_in), 0), coalesce(sum(tokens_out), 0) FROM asked"
            self._requests, self._tokens_in, self._tokens_out = self._database.execute(totals).fetchone()
        except sqlite3.OperationalError as error:
            raise JudgeError(
                f"{path} is in use or cannot be written ({error})", fix="wait for the other judge in this run folder"
            ) from None
        except sqlite3.DatabaseError as error:
            raise JudgeError(f"{path} is damaged ({error})", fix="move it away; all is then asked anew") from None

    def close(self) -> None:
        """Give the file free."""
        self._database.close()

    def spent(self) -> Spent:
        """By all runs in this folder, that in flight at its most."""
        with self._changed:
            return self._priced(self._requests, self._tokens_in, self._tokens_out)

    def answer(self, key: str) -> Any:
        """The newest stored answer to a question; None where there is none."""
        with self._changed:
            query = "SELECT answer FROM asked WHERE key = ? AND answer IS NOT NULL ORDER BY id DESC LIMIT 1"
            row = self._database.execute(query, (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def reserve(self, keys: Sequence[str], sizes: Sequence[Size]) -> list[int]:
        """Rows for as many of the first questions as the budget allows; they may be sent then.

        Where not even one fits, this waits for what is in flight, which may cost less than its most. No rows: the
        budget is used up, now and for all that comes.
        """
        with self._changed:
            while not self.exhausted and not self._fits(sizes[:1]):
                if not self._in_flight:
                    self.exhausted = True
                    self._changed.notify_all()
                else:
                    self._changed.wait()
            if self.exhausted:
                return []
            count = max(n for n in range(1, len(sizes) + 1) if self._fits(sizes[:n]))
            return [self._write(key, size) for key, size in zip(keys[:count], sizes[:count], strict=True)]

    def settle(self, row: int, used: Size | None, answer: Any = None) -> None:
        """The answer to a question that was sent, and what it used; None: not known, its most is taken for it."""
        with self._changed:
            reserved = self._in_flight.pop(row)
            used = used or reserved
            text = None if answer is None else json.dumps(answer)
            update = "UPDATE asked SET tokens_in = ?, tokens_out = ?, answer = ? WHERE id = ?"
            self._database.execute(update, (used.tokens_in, used.tokens_out, text, row))
            self._add(Size(used.tokens_in - reserved.tokens_in, used.tokens_out - reserved.tokens_out))
            self._changed.notify_all()

    def _write(self, key: str, size: Size) -> int:
        insert = "INSERT INTO asked (key, tokens_in, tokens_out) VALUES (?, ?, ?)"
        row = self._database.execute(insert, (key, size.tokens_in, size.tokens_out)).lastrowid
        assert row is not None
        self._in_flight[row] = size
        self._requests += 1
        self._add(size)
        return row

    def _add(self, size: Size) -> None:
        self._tokens_in += size.tokens_in
        self._tokens_out += size.tokens_out

    def _fits(self, sizes: Sequence[Size]) -> bool:
        budget = self._budget
        after = self._priced(
            self._requests + len(sizes),
            self._tokens_in + sum(size.tokens_in for size in sizes),
            self._tokens_out + sum(size.tokens_out for size in sizes),
        )
        limits = (
            (after.requests, budget.max_requests),
            (after.tokens_in + after.tokens_out, budget.max_tokens),
            (after.cost, budget.max_cost),
        )
        return all(limit is None or value <= limit for value, limit in limits)

    def _priced(self, requests: int, tokens_in: int, tokens_out: int) -> Spent:
        cost = (tokens_in * self._budget.input_price + tokens_out * self._budget.output_price) / 1e6
        return Spent(requests, tokens_in, tokens_out, cost)
