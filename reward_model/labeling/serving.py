"""Which item an annotator gets next, in which order, and for how long.

Rows are locked in one sequence everywhere: the user, then the assignment, then the item. Two requests of one
annotator wait for each other, and two annotators never take an item's last place: on SQLite there is one writer at a
time; on PostgreSQL whoever looks for an item passes over those that others hold locked.
"""

from __future__ import annotations

import dataclasses

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session, aliased

from reward_model.labeling.design import choose_order, gold_is_due, rotations
from reward_model.labeling.records import Answer, Task
from reward_model.labeling.schema import AssignmentRow, ItemRow, JudgmentRow, UserRow
from rlhf.config_labeling import LabelingStage
from rlhf.errors import LabelError, LeaseError

SWEPT = 200
"""Leases that ran out which one request clears away at most."""


def locked_user(session: Session, user_id: int) -> UserRow:
    """The user's row, locked until the transaction ends.

    Raises:
        LabelError: no such user.
    """
    user = session.get(UserRow, user_id, with_for_update={"key_share": True}, populate_existing=True)
    if user is None:
        raise LabelError(f"there is no user {user_id}", fix="log in again")
    return user


def locked_assignment(session: Session, user_id: int, assignment_id: int) -> tuple[AssignmentRow, ItemRow]:
    """The assignment of this user and its item, both locked until the transaction ends.

    Raises:
        LabelError: this user has no such assignment, or it is a repeat that was never shown.
    """
    assignment = session.get(AssignmentRow, assignment_id, with_for_update=True, populate_existing=True)
    if assignment is None or assignment.user_id != user_id or assignment.state == "planned":
        raise LabelError(f"assignment {assignment_id} is not yours", fix="load the page again")
    return assignment, locked_item(session, assignment.item_id)


def locked_item(session: Session, item_id: int) -> ItemRow:
    """The item's row, locked until the transaction ends.

    Raises:
        LabelError: no such item.
    """
    item = session.get(ItemRow, item_id, with_for_update={"key_share": True}, populate_existing=True)
    if item is None:
        raise LabelError(f"there is no item {item_id}", fix="load the page again")
    return item


def counts(assignment: AssignmentRow, item: ItemRow) -> bool:
    """Whether the assignment takes one of the item's places."""
    return assignment.presentation == 0 and not item.is_gold


def take_place(assignment: AssignmentRow, item: ItemRow) -> bool:
    """Whether a place was free, and is now this assignment's; there always is one where none is counted."""
    if item.state == "retired":
        return False
    if counts(assignment, item):
        if item.taken >= item.wanted:
            return False
        item.taken += 1
        if item.state == "open" and item.taken == item.wanted:
            item.state = "full"
    return True


def free_place(assignment: AssignmentRow, item: ItemRow) -> None:
    """Gives the assignment's place back."""
    if counts(assignment, item):
        item.taken -= 1
        if item.state == "full":
            item.state = "open"


def has_expired_leases(session: Session, now_ms: int) -> bool:
    """Whether `free_expired` has something to do."""
    return session.scalar(select(AssignmentRow.id).where(*_expired(now_ms)).limit(1)) is not None


def free_expired(session: Session, now_ms: int) -> None:
    """Ends leases that ran out, in a transaction of its own; what others hold locked is theirs to end."""
    rows = session.execute(
        select(AssignmentRow, ItemRow)
        .join(ItemRow, ItemRow.id == AssignmentRow.item_id)
        .where(*_expired(now_ms))
        .order_by(AssignmentRow.id)
        .limit(SWEPT)
        .with_for_update(skip_locked=True, of=(AssignmentRow, ItemRow)),
        execution_options=_FRESH,
    )
    for assignment, item in rows:
        assignment.state = "expired"
        free_place(assignment, item)


_FRESH = {"populate_existing": True}


def _expired(now_ms: int) -> tuple[ColumnElement[bool], ...]:
    return AssignmentRow.state == "leased", AssignmentRow.lease_expires_ms <= now_ms


def lease_next(session: Session, cfg: LabelingStage, user_id: int, now_ms: int) -> Task | None:
    """An unfinished lease of this user, else a repeat that is due, a gold question that is due, or the next item."""
    user = locked_user(session, user_id)
    if user.paused or not user.active:
        return None
    assignment = _unfinished(session, user)
    if assignment is None:
        assignment = _due_repeat(session, user)
        if assignment is None:
            item = None
            if gold_is_due(user.served, cfg.gold.fraction, cfg.seed, user.id):
                item = _next_item(session, user, gold=True)
            item = item or _next_item(session, user, gold=False)
            if item is None:
                return None
            assignment = _assign(session, cfg, user, item, now_ms)
        assignment.state, assignment.shown_ms = "leased", now_ms
    extend(assignment, cfg, now_ms)
    session.flush()
    return task_of(session, assignment)


def extend(assignment: AssignmentRow, cfg: LabelingStage, now_ms: int) -> None:
    """A lease runs for its full time from now on."""
    assignment.lease_expires_ms = now_ms + round(cfg.lease_minutes * 60_000)


def renew_lease(session: Session, cfg: LabelingStage, user_id: int, assignment_id: int, now_ms: int) -> int:
    """Keeps an item before its annotator; one whose lease ran out comes back if its place is still free.

    Raises:
        LabelError: unknown, or judged.
        LeaseError: the place has gone to somebody else.
    """
    locked_user(session, user_id)
    assignment, item = locked_assignment(session, user_id, assignment_id)
    if assignment.state == "expired":
        reclaim(assignment, item)
    elif assignment.state != "leased":
        raise LabelError(f"assignment {assignment_id} is judged", fix="go on with the next item")
    extend(assignment, cfg, now_ms)
    return assignment.lease_expires_ms


def reclaim(assignment: AssignmentRow, item: ItemRow) -> None:
    """Leases the item of a lease that ran out, or was given back, once more.

    Raises:
        LeaseError: the place has gone to somebody else, or the item is held back.
    """
    if not take_place(assignment, item):
        why = "others have judged the item meanwhile" if item.state == "full" else f"the item is {item.state}"
        raise LeaseError(f"assignment {assignment.id} is no longer yours: {why}", fix="go on with the next item")
    assignment.state = "leased"


def task_of(session: Session, assignment: AssignmentRow) -> Task:
    """What the annotator sees of an assignment."""
    item = session.get_one(ItemRow, assignment.item_id)
    undone = aliased(JudgmentRow)
    latest = session.execute(
        select(JudgmentRow, undone)
        .outerjoin(undone, undone.id == JudgmentRow.supersedes_id)
        .where(JudgmentRow.assignment_id == assignment.id)
        .order_by(JudgmentRow.id.desc())
        .limit(1)
    ).first()
    return Task(
        assignment_id=assignment.id,
        item_id=item.id,
        kind=item.kind,
        prompt=item.prompt,
        responses=[item.responses[index]["text"] for index in assignment.side_order],
        lease_expires_ms=assignment.lease_expires_ms,
        previous=None if latest is None else answer_of(latest[1] or latest[0]),
    )


def answer_of(row: JudgmentRow) -> Answer:
    """A stored answer as it was given."""
    return Answer(**{field.name: getattr(row, field.name) for field in dataclasses.fields(Answer)})


def _unfinished(session: Session, user: UserRow) -> AssignmentRow | None:
    """The lease shown last: after an undo the item that came back, not the one it pushed aside."""
    query = select(AssignmentRow).where(AssignmentRow.user_id == user.id, AssignmentRow.state == "leased")
    newest = query.order_by(AssignmentRow.shown_ms.desc(), AssignmentRow.id).limit(1)
    return session.scalar(newest.with_for_update(), execution_options=_FRESH)


def _due_repeat(session: Session, user: UserRow) -> AssignmentRow | None:
    return session.scalar(
        select(AssignmentRow)
        .join(ItemRow, ItemRow.id == AssignmentRow.item_id)
        .where(
            AssignmentRow.user_id == user.id,
            AssignmentRow.state.in_(("planned", "expired")),
            AssignmentRow.presentation == 1,
            AssignmentRow.due <= user.served,
            ItemRow.state.in_(("open", "full")),
        )
        .order_by(AssignmentRow.due, AssignmentRow.id)
        .limit(1)
        .with_for_update(of=AssignmentRow),
        execution_options=_FRESH,
    )


def _next_item(session: Session, user: UserRow, *, gold: bool) -> ItemRow | None:
    """The most urgent open item that this user has not had; one whose lease they let run out may come back."""
    had = select(AssignmentRow.id).where(
        AssignmentRow.item_id == ItemRow.id,
        AssignmentRow.user_id == user.id,
        AssignmentRow.presentation == 0,
        AssignmentRow.state != "expired",
    )
    query = (
        select(ItemRow)
        .where(ItemRow.state == "open", ItemRow.is_gold == gold, ~had.exists())
        .order_by(ItemRow.urgency, ItemRow.id)
        .limit(1)
    )
    passing_over = query.with_for_update(key_share=True, skip_locked=True)
    item = session.scalar(passing_over, execution_options=_FRESH)
    # Nothing free but what others hold locked right now: wait for them, they may leave a place.
    return item or session.scalar(query.with_for_update(key_share=True), execution_options=_FRESH)


def _assign(session: Session, cfg: LabelingStage, user: UserRow, item: ItemRow, now_ms: int) -> AssignmentRow:
    """Takes a place of the item; an assignment that ran out comes back in its order, which a page may still show."""
    first = select(AssignmentRow).where(AssignmentRow.item_id == item.id, AssignmentRow.presentation == 0)
    assignment = session.scalar(
        first.where(AssignmentRow.user_id == user.id).with_for_update(), execution_options=_FRESH
    )
    if assignment is None:
        live = first.where(AssignmentRow.state.in_(("leased", "done"))).join(
            UserRow, UserRow.id == AssignmentRow.user_id
        )
        used = [row.side_order for row in session.scalars(live.where(UserRow.labeler == "person"))]
        order = choose_order(rotations(len(item.responses), cfg.seed, item.key), used, user.side_balance)
        assignment = AssignmentRow(
            item_id=item.id,
            user_id=user.id,
            presentation=0,
            side_order=order,
            lease_expires_ms=now_ms,
            created_ms=now_ms,
        )
        session.add(assignment)
        user.served += 1
        if len(order) == 2:
            user.side_balance += 1 if order == [0, 1] else -1
    take_place(assignment, item)
    return assignment
