"""The store of a labeling project: items in, tasks out, answers in, judgments out. All that is said goes through it.

It is safe to use from many threads, and from many processes on one database. The rules hold in the database:
no item gets more deciding judgments by people than it asks for, leases included; what is sent twice is stored once;
judgments are only ever added.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from reward_model.labeling import answers, history, queueing, serving
from reward_model.labeling.database import open_database
from reward_model.labeling.records import Added, Answer, Item, Judgment, Labeler, Progress, Receipt, Task
from reward_model.labeling.schema import EventRow, UserRow
from rlhf.config_labeling import LabelingStage
from rlhf.errors import LabelError

__all__ = ["Added", "LabelStore", "Progress", "Receipt", "Task"]

TOTALS_MS = 1_000
"""How old the project's totals may be that go with every item; without a user they are always fresh."""


def now_ms() -> int:
    """Milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


class LabelStore:
    """The database of one labeling project; a context manager.

    Args:
        engine: as `database.open_database` gives it.
        cfg: the project's rules.
        clock: the time in milliseconds.
    """

    def __init__(self, engine: Engine, cfg: LabelingStage, clock: Callable[[], int] = now_ms) -> None:
        self.engine = engine
        self.cfg = cfg
        self.clock = clock
        self._writing = engine.execution_options(write=True)
        # SQLite has one writer. Threads that queue here take turns; its own waiting is sleep and luck.
        self._turn: AbstractContextManager[Any] = threading.Lock() if engine.dialect.name == "sqlite" else nullcontext()
        self._totals = (-TOTALS_MS, history.Totals())

    @classmethod
    def open(cls, cfg: LabelingStage, clock: Callable[[], int] = now_ms) -> LabelStore:
        """Opens the project's database; makes or migrates it where needed.

        Raises:
            ConfigError: it cannot be made or reached.
            LabelError: a newer version wrote it.
        """
        return cls(open_database(cfg), cfg, clock)

    def close(self) -> None:
        """Ends all connections."""
        self.engine.dispose()

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def begin(self) -> Iterator[Session]:
        """One write transaction: committed at the end, rolled back on an error. Never call the store inside."""
        with self._turn, Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """One read transaction; on SQLite, a snapshot."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    # --- items ------------------------------------------------------------------------------------------------

    def add_items(self, items: Iterable[Item]) -> Added:
        """Queues items. One that is known by its `key` stays as it is.

        Raises:
            LabelError: an item cannot be judged or stored; names it. Nothing is added.
        """
        with self.begin() as session:
            return queueing.add_items(session, items, self.clock())

    def items(self) -> list[Item]:
        """All items, in the order in which they were queued."""
        with self.read() as session:
            return queueing.all_items(session)

    def item_states(self) -> dict[str, str]:
        """By key: open, full, flagged (held back) or retired."""
        with self.read() as session:
            return queueing.item_states(session)

    # --- people -----------------------------------------------------------------------------------------------

    def ensure_user(self, name: str, *, role: str, labeler: Labeler = "person") -> int:
        """The id of the user of this name, made without a password where there is none.

        Raises:
            LabelError: the name is empty, too long, or another kind of labeler's.
        """
        if not answers.is_storable(name, 64) or not name:
            raise LabelError(f"user name {name!r}: empty, too long or not plain text", fix="use 1 to 64 characters")
        try:
            with self.begin() as session:
                user = session.scalar(select(UserRow).where(UserRow.name == name))
                if user is None:
                    user = UserRow(name=name, role=role, labeler=labeler, created_ms=self.clock())
                    session.add(user)
                    session.flush()
                kind, user_id = user.labeler, user.id
        except IntegrityError:  # another process made it at the same moment
            return self.ensure_user(name, role=role, labeler=labeler)
        if kind != labeler:
            raise LabelError(f"the name {name!r} is taken by a {kind}", fix="give the labeler a name of its own")
        return user_id

    def log_event(self, user_id: int | None, kind: str, detail: dict[str, Any]) -> None:
        """Adds a line to the audit log."""
        with self.begin() as session:
            session.add(EventRow(created_ms=self.clock(), user_id=user_id, kind=kind, detail=detail))

    # --- labeling ---------------------------------------------------------------------------------------------

    def next_task(self, user_id: int) -> Task | None:
        """What this user has before them, leased for `lease_minutes` from now; None: nothing left, or paused.

        Raises:
            LabelError: no such user.
        """
        now = self.clock()
        with self.begin() as session:
            if not serving.has_expired_leases(session, now):
                return serving.lease_next(session, self.cfg, user_id, now)
        with self.begin() as session:
            serving.free_expired(session, now)
        with self.begin() as session:
            return serving.lease_next(session, self.cfg, user_id, now)

    def submit(self, user_id: int, assignment_id: int, answer: Answer, submission_id: str) -> Receipt:
        """Stores an answer. Sent again with the same `submission_id`, it is the same one.

        Raises:
            LabelError: the answer does not fit the item, or the assignment is unknown.
            LeaseError: it is judged, or the lease ran out and somebody else has the place.
        """
        with self.begin() as session:
            return answers.submit_answer(session, self.cfg, user_id, assignment_id, answer, submission_id, self.clock())

    def submit_and_next(
        self, user_id: int, assignment_id: int, answer: Answer, submission_id: str
    ) -> tuple[Receipt, Task | None]:
        """`submit` and `next_task`, in one transaction if it can be.

        Raises:
            LabelError, LeaseError: as `submit`.
        """
        now, task = self.clock(), None
        with self.begin() as session:
            receipt = answers.submit_answer(session, self.cfg, user_id, assignment_id, answer, submission_id, now)
            if not serving.has_expired_leases(session, now):
                # The item just judged is locked. Two who wait for each other's would wait for ever.
                task = serving.lease_next(session, self.cfg, user_id, now, wait=False)
        if task is None:
            task = self.next_task(user_id)
        return receipt, task

    def undo(self, user_id: int) -> Task | None:
        """Withdraws the user's last judgment that stands, and leases its item again; None: there is none.

        Skips and flags whose item is gone are passed over, see `Task.passed_over`.

        Raises:
            LabelError: the annotator is paused.
            LeaseError: nothing is left but such skips and flags, or the place went to somebody else just now.
        """
        with self.begin() as session:
            return answers.undo_last(session, self.cfg, user_id, self.clock())

    def renew(self, user_id: int, assignment_id: int) -> int:
        """A sign of life: the lease runs for its full time again; its new end.

        Raises:
            LabelError: the assignment is unknown.
            LeaseError: it is judged, or the lease ran out and somebody else has the place.
        """
        with self.begin() as session:
            return serving.renew_lease(session, self.cfg, user_id, assignment_id, self.clock())

    def record(
        self,
        annotator: str,
        labeler: Labeler,
        item_key: str,
        order: list[int],
        answer: Answer,
        *,
        presentation: int,
        submission_id: str,
    ) -> int:
        """Stores an answer that nobody was served: a machine's, or an imported one. It takes no place of the item.

        A later one of the same annotator, item and presentation supersedes it; the same submission is stored once.

        Returns:
            The judgment's id.

        Raises:
            LabelError: the item is unknown, the answer does not fit it, or the order is not that of before.
        """
        user_id = self.ensure_user(annotator, role="annotator", labeler=labeler)
        with self.begin() as session:
            shown = history.Shown(item_key, order, presentation)
            return history.record_answer(session, user_id, shown, answer, submission_id, self.clock())

    # --- what came of it --------------------------------------------------------------------------------------

    def progress(self, user_id: int | None = None) -> Progress:
        """Where the project stands, and one user in it."""
        with self.read() as session:
            if user_id is None:
                return history.progress(session, history.totals(session), None)
            taken_ms, totals = self._totals
            if time.monotonic() * 1_000 - taken_ms >= TOTALS_MS:
                totals = history.totals(session)
                self._totals = (time.monotonic() * 1_000, totals)
            return history.progress(session, totals, user_id)

    def judgments(self, *, effective: bool = True) -> list[Judgment]:
        """All judgments in the order in which they were given; `effective`: only those that stand."""
        with self.read() as session:
            return history.all_judgments(session, effective=effective)
