"""The admin page's figures, counted by the database; agreement and quality come from `reliability.agreement_report`.

Days and hours are UTC's. Only what people said and did not withdraw is counted.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import CTE, func, select
from sqlalchemy.orm import Session, aliased

from reward_model.labeling.answers import settled_ms
from reward_model.labeling.schema import AssignmentRow, EventRow, InviteRow, ItemRow, JudgmentRow, UserRow
from reward_model.labeling.store import LabelStore

_log = logging.getLogger(__name__)

HOUR_MS, DAY_MS = 3_600_000, 86_400_000
DAYS, HOURS, SHOWN = 14, 24, 100
STATES = ("open", "done", "flagged", "retired", "gold")
DECIDING = ("compare", "rank", "both_bad")
KEPT_SECONDS = 15.0


@dataclass(frozen=True)
class Period:
    """Judgments that decide, from `start` (ISO, UTC) on, for a day or an hour."""

    start: str
    judgments: int


@dataclass(frozen=True)
class Flagged:
    """An item that is held back; `notes` are (name, note) of everyone whose flag no admin has settled."""

    id: int
    prompt: str
    responses: list[str]
    batch: str
    notes: list[tuple[str, str]]


@dataclass(frozen=True)
class Event:
    """A line of the audit log; `detail` as `key=value` words, `who` "" for the command line."""

    id: int
    when: str
    who: str
    kind: str
    detail: str


def effective() -> CTE:
    """The judgments that stand: neither withdrawn nor replaced by a later one. Columns as in the tables."""
    later = aliased(JudgmentRow)
    columns = (
        JudgmentRow.id,
        JudgmentRow.choice,
        JudgmentRow.notes,
        JudgmentRow.ms_active,
        JudgmentRow.created_ms,
        AssignmentRow.user_id,
        AssignmentRow.item_id,
    )
    return (
        select(*columns)
        .join(AssignmentRow, AssignmentRow.id == JudgmentRow.assignment_id)
        .join(UserRow, UserRow.id == AssignmentRow.user_id)
        .outerjoin(later, later.supersedes_id == JudgmentRow.id)
        .where(later.id.is_(None), JudgmentRow.choice != "undo", UserRow.labeler == "person")
        .cte("effective")
    )


def items_by_state(session: Session) -> dict[str, int]:
    """Items that are open, done, flagged and retired; gold questions are counted apart, as `gold`.

    An item before an annotator is open: its state is `full` as soon as its last place is taken.
    """
    counts: dict[str, int] = dict.fromkeys(STATES, 0)
    at_work = select(AssignmentRow.item_id).where(AssignmentRow.state == "leased", AssignmentRow.presentation == 0)
    columns = (ItemRow.state, ItemRow.is_gold, ItemRow.id.in_(at_work).label("at_work"))
    for state, is_gold, is_at_work, n in session.execute(select(*columns, func.count()).group_by(*columns)):
        if is_gold:
            counts["gold"] += n
        elif state == "full":
            counts["open" if is_at_work else "done"] += n
        else:
            counts[state] += n
    return counts


def judgments_per(session: Session, now_ms: int, period_ms: int, periods: int) -> list[Period]:
    """Deciding judgments of the last `periods` days or hours, the newest first, back to the oldest that has any."""
    judged = effective()
    now = now_ms // period_ms
    number = (judged.c.created_ms // period_ms).label("number")
    found = (
        select(number, func.count())
        .where(judged.c.choice.in_(DECIDING), judged.c.created_ms >= (now - periods + 1) * period_ms)
        .group_by(number)
    )
    counts = {int(n): count for n, count in session.execute(found)}
    form = "%Y-%m-%d" if period_ms == DAY_MS else "%Y-%m-%d %H:00"
    oldest = min(counts, default=now)
    return [Period(_text(n * period_ms, form), counts.get(n, 0)) for n in range(now, oldest - 1, -1)]


def seconds_per_item(session: Session) -> tuple[float, float] | None:
    """Median and 90th percentile (nearest rank) of the active time of deciding judgments, in seconds."""
    judged = effective()
    ranked = (
        select(
            judged.c.ms_active,
            func.row_number().over(order_by=judged.c.ms_active).label("rank"),
            func.count().over().label("n"),
        )
        .where(judged.c.choice.in_(DECIDING), judged.c.ms_active > 0)
        .subquery()
    )
    picked = [
        session.scalar(select(ranked.c.ms_active).where(ranked.c.rank == (ranked.c.n * tenths + 9) // 10).limit(1))
        for tenths in (5, 9)
    ]
    return None if None in picked else (picked[0] / 1000, picked[1] / 1000)  # type: ignore[operator]


def flagged_items(session: Session) -> list[Flagged]:
    """Items that wait for an admin's word, the oldest first, at most `SHOWN`."""
    found = select(ItemRow).where(ItemRow.state == "flagged").order_by(ItemRow.id).limit(SHOWN)
    items = list(session.scalars(found))
    judged = effective()
    said = (
        select(judged.c.item_id, UserRow.name, judged.c.notes, judged.c.created_ms)
        .join(UserRow, UserRow.id == judged.c.user_id)
        .where(judged.c.choice == "flag", judged.c.item_id.in_([item.id for item in items]))
        .order_by(judged.c.id)
    )
    notes: dict[int, list[tuple[str, str]]] = {item.id: [] for item in items}
    settled = settled_ms(session, list(notes))
    for item_id, name, note, created_ms in session.execute(said):
        if created_ms > settled.get(item_id, 0):
            notes[item_id].append((name, note))
    return [
        Flagged(item.id, _prompt(item.prompt), [r["text"] for r in item.responses], item.batch, notes[item.id])
        for item in items
    ]


def users(session: Session) -> list[UserRow]:
    """Everybody, people first."""
    return list(session.scalars(select(UserRow).order_by(UserRow.labeler != "person", UserRow.id)))


def open_invites(session: Session, now_ms: int) -> list[dict[str, Any]]:
    """Invites that still work: id, role, whose password they set ("" for a new account), who made them, until when."""
    target = aliased(UserRow)
    found = (
        select(InviteRow, UserRow.name, target.name)
        .outerjoin(UserRow, UserRow.id == InviteRow.created_by)
        .outerjoin(target, target.id == InviteRow.for_user)
        .where(InviteRow.used_by.is_(None), InviteRow.expires_ms > now_ms)
        .order_by(InviteRow.id)
    )
    return [
        {"id": row.id, "role": row.role, "for": target_name or ""}
        | {"by": name or "command line", "until": _text(row.expires_ms, "%Y-%m-%d %H:%M")}
        for row, name, target_name in session.execute(found)
    ]


def events(session: Session, before: int | None = None) -> list[Event]:
    """The audit log, the newest first, `SHOWN` lines before the id `before`."""
    found = select(EventRow, UserRow.name).outerjoin(UserRow, UserRow.id == EventRow.user_id)
    if before is not None:
        found = found.where(EventRow.id < before)
    return [
        Event(
            row.id,
            _text(row.created_ms, "%Y-%m-%d %H:%M:%S"),
            name or "",
            row.kind,
            " ".join(f"{key}={value}" for key, value in sorted(row.detail.items())),
        )
        for row, name in session.execute(found.order_by(EventRow.id.desc()).limit(SHOWN))
    ]


class Agreement:
    """`reliability.agreement_report`, computed beside the requests: it reads every judgment, which takes seconds.

    Who asks waits for `patience` seconds and then gets the report before; so a small project's is always new. A report
    is kept for `KEPT_SECONDS`, or twenty times as long as it took if that is more: at most a twentieth of one core's
    time goes into it. One that fails costs its own tables alone: the page is where admins mend things.

    Attributes:
        failed: the latest report could not be computed; the traceback is in the server's log.
    """

    def __init__(self, store: LabelStore, seed: int, timer: Callable[[], float] = time.monotonic) -> None:
        self.patience = 1.0
        self.failed = False
        self._store = store
        self._seed = seed
        self._timer = timer
        self._lock = threading.Lock()
        self._running: Future[None] | None = None
        self._report: dict[str, Any] | None = None
        self._due = -math.inf

    def report(self) -> dict[str, Any] | None:
        """The report, with `as_of` (time of day, UTC); None while the first one is computed, or if that failed."""
        with self._lock:
            if self._running is None and self._timer() >= self._due:
                self._running = Future()
                # A daemon: a server that is stopped does not wait for figures.
                threading.Thread(target=self._compute, args=(self._running,), daemon=True).start()
            running = self._running
        if running is not None:
            with suppress(TimeoutError):
                running.result(self.patience)
        return self._report

    def _compute(self, running: Future[None]) -> None:
        try:
            self._renew()
            self.failed = False
        except Exception:
            _log.exception("the agreement figures cannot be computed")
            self.failed, self._due = True, self._timer() + KEPT_SECONDS
        with self._lock:
            self._running = None
        running.set_result(None)

    def _renew(self) -> None:
        # Brings torch along; who never looks at the figures never waits for it.
        from reward_model.labeling.reliability import agreement_report

        began, as_of = self._timer(), _text(self._store.clock(), "%H:%M:%S")
        report = agreement_report(self._store.items(), self._store.judgments(), seed=self._seed)
        self._report = report | {"as_of": as_of}
        ended = self._timer()
        self._due = ended + max(KEPT_SECONDS, 20 * (ended - began))


def _text(ms: int, form: str) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime(form)


def _prompt(prompt: str | Sequence[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
