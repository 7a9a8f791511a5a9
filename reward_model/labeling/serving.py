"""Which item an annotator gets next, in which order, and for how long.

Rows are locked in one sequence everywhere: the user, then the assignment, then the item; who has an item locked
already waits for no other. Two requests of one annotator wait for each other, and two annotators never take an item's
last place: on SQLite there is one writer at a time; on PostgreSQL whoever looks for an item passes over those that
others hold locked.
"""

from __future__ import annotations

import dataclasses

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from reward_model.labeling.design import choose_order, gold_is_due, rotations
from reward_model.labeling.records import Answer, Task
from reward_model.labeling.schema import AssignmentRow, ItemRow, JudgmentRow, UserRow
from rlhf.config_labeling import LabelingStage
from rlhf.errors import LabelError, LeaseError

SWEPT = 200
"""Leases that ran out which one request clears away at most."""


# Statements stand ready at module level: building one takes as long as running it.
_FRESH = {"populate_existing": True}
_USER = select(UserRow).where(UserRow.id == bindparam("id")).with_for_update(key_share=True)
_ASSIGNMENT = select(AssignmentRow).where(AssignmentRow.id == bindparam("id")).with_for_update()
_ITEM = select(ItemRow).where(ItemRow.id == bindparam("id")).with_for_update(key_share=True)


def locked_user(session: Session, user_id: int) -> UserRow:
    """The user's row, locked until the transaction ends.

    Raises:
        LabelError: no such user.
    """
    user = session.scalar(_USER, {"id": user_id}, execution_options=_FRESH)
    if user is None:
        raise LabelError(f"there is no user {user_id}", fix="log in again")
    return user


def locked_assignment(session: Session, user_id: int, assignment_id: int) -> tuple[AssignmentRow, ItemRow]:
    """The assignment of this user and its item, both locked until the transaction ends.

    Raises:
        LabelError: this user has no such assignment, or it is a repeat that was never shown.
    """
    assignment = session.scalar(_ASSIGNMENT, {"id": assignment_id}, execution_options=_FRESH)
    if assignment is None or assignment.user_id != user_id or assignment.state == "planned":
        raise LabelError(f"assignment {assignment_id} is not yours", fix="load the page again")
    return assignment, locked_item(session, assignment.item_id)


def locked_item(session: Session, item_id: int) -> ItemRow:
    """The item's row, locked until the transaction ends.

    Raises:
        LabelError: no such item.
    """
    item = session.scalar(_ITEM, {"id": item_id}, execution_options=_FRESH)
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


_EXPIRED = (AssignmentRow.state == "leased", AssignmentRow.lease_expires_ms <= bindparam("now"))
_ANY_EXPIRED = select(AssignmentRow.id).where(*_EXPIRED).limit(1)
_ALL_EXPIRED = (
    select(AssignmentRow, ItemRow)
    .join(ItemRow, ItemRow.id == AssignmentRow.item_id)
    .where(*_EXPIRED)
    .order_by(AssignmentRow.id)
    .limit(SWEPT)
    .with_for_update(skip_locked=True, of=(AssignmentRow, ItemRow))
)


def has_expired_leases(session: Session, now_ms: int) -> bool:
    """Whether `free_expired` has something to do."""
    return session.scalar(_ANY_EXPIRED, {"now": now_ms}) is not None


def free_expired(session: Session, now_ms: int) -> None:
    """Ends leases that ran out, in a transaction of its own; what others hold locked is theirs to end."""
    for assignment, item in session.execute(_ALL_EXPIRED, {"now": now_ms}, execution_options=_FRESH):
        assignment.state = "expired"
        free_place(assignment, item)


def lease_next(session: Session, cfg: LabelingStage, user_id: int, now_ms: int, *, wait: bool = True) -> Task | None:
    """An unfinished lease of this user, else a repeat that is due, a gold question that is due, or the next item.

    Without `wait` also None if it would have to be waited for another request.
    """
    user = locked_user(session, user_id)
    if user.paused or not user.active:
        return None
    item = None
    assignment = session.scalar(_UNFINISHED, {"user": user.id}, execution_options=_FRESH)
    if assignment is None:
        due = {"user": user.id, "served": user.served}
        assignment = session.scalar(_DUE_REPEAT, due, execution_options=_FRESH)
        if assignment is None:
            if gold_is_due(user.served, cfg.gold.fraction, cfg.seed, user.id):
                item = _next_item(session, user, gold=True, wait=wait)
                if item is None and not wait:
                    return None  # one may be locked: an ordinary item in its place would lower the share
            item = item or _next_item(session, user, gold=False, wait=wait)
            if item is None:
                return None
            assignment = _assign(session, cfg, user, item, now_ms)
        assignment.state, assignment.shown_ms = "leased", now_ms
    extend(assignment, cfg, now_ms)
    session.flush()
    return task_of(session, assignment, item or session.get_one(ItemRow, assignment.item_id))


def extend(assignment: AssignmentRow, cfg: LabelingStage, now_ms: int) -> None:
    """A lease runs for its full time from now on."""
    assignment.lease_expires_ms = now_ms + round(cfg.lease_minutes * 60_000)


def renew_lease(session: Session, cfg: LabelingStage, user_id: int, assignment_id: int, now_ms: int) -> int:
    """Keeps an item before its annotator; one whose lease ran out comes back if its place is still free.

    Raises:
        LabelError: unknown.
        LeaseError: it is judged, in another tab maybe, or the place has gone to somebody else.
    """
    locked_user(session, user_id)
    assignment, item = locked_assignment(session, user_id, assignment_id)
    if assignment.state == "expired":
        reclaim(assignment, item)
    elif assignment.state != "leased":
        raise LeaseError("you have judged this item already", fix="go on with the next item, or undo to change it")
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


_LATEST = (
    select(JudgmentRow)
    .where(JudgmentRow.assignment_id == bindparam("assignment"))
    .order_by(JudgmentRow.id.desc())
    .limit(2)
)


def task_of(session: Session, assignment: AssignmentRow, item: ItemRow) -> Task:
    """What the annotator sees of an assignment. The latest judgment of one that is leased again is an undo."""
    undone = session.scalars(_LATEST, {"assignment": assignment.id}).all()[1:]
    return Task(
        assignment_id=assignment.id,
        item_id=item.id,
        kind=item.kind,
        prompt=item.prompt,
        responses=[item.responses[index]["text"] for index in assignment.side_order],
        lease_expires_ms=assignment.lease_expires_ms,
        previous=answer_of(undone[0]) if undone else None,
    )


def answer_of(row: JudgmentRow) -> Answer:
    """A stored answer as it was given."""
    return Answer(**{name: getattr(row, name) for name in _ANSWER})


_ANSWER = [field.name for field in dataclasses.fields(Answer)]

# The lease shown last: after an undo the item that came back, not the one it pushed aside.
_UNFINISHED = (
    select(AssignmentRow)
    .where(AssignmentRow.user_id == bindparam("user"), AssignmentRow.state == "leased")
    .order_by(AssignmentRow.shown_ms.desc(), AssignmentRow.id)
    .limit(1)
    .with_for_update()
)
_DUE_REPEAT = (
    select(AssignmentRow)
    .join(ItemRow, ItemRow.id == AssignmentRow.item_id)
    .where(
        AssignmentRow.user_id == bindparam("user"),
        AssignmentRow.state.in_(("planned", "expired")),
        AssignmentRow.presentation == 1,
        AssignmentRow.due <= bindparam("served"),
        ItemRow.state.in_(("open", "full")),
    )
    .order_by(AssignmentRow.due, AssignmentRow.id)
    .limit(1)
    .with_for_update(of=AssignmentRow)
)
# The most urgent open item that this user has not had; one whose lease they let run out may come back.
NEXT = (
    select(ItemRow)
    .where(ItemRow.state == "open", ItemRow.is_gold == bindparam("gold"))
    .where(
        ~select(AssignmentRow.id)
        .where(
            AssignmentRow.item_id == ItemRow.id,
            AssignmentRow.user_id == bindparam("user"),
            AssignmentRow.presentation == 0,
            AssignmentRow.state != "expired",
        )
        .exists()
    )
    .order_by(ItemRow.urgency, ItemRow.id)
    .limit(1)
)
_NEXT_UNLOCKED = NEXT.with_for_update(key_share=True, skip_locked=True)
_NEXT_WAITING = NEXT.with_for_update(key_share=True)
_ASSIGNED = (
    select(AssignmentRow, UserRow.labeler)
    .join(UserRow, UserRow.id == AssignmentRow.user_id)
    .where(AssignmentRow.item_id == bindparam("item"), AssignmentRow.presentation == 0)
    .order_by(AssignmentRow.id)
)


def _next_item(session: Session, user: UserRow, *, gold: bool, wait: bool) -> ItemRow | None:
    query = {"user": user.id, "gold": gold}
    item = session.scalar(_NEXT_UNLOCKED, query, execution_options=_FRESH)
    if item is None and wait:
        # Nothing free but what others hold locked right now: wait for them, they may leave a place.
        return session.scalar(_NEXT_WAITING, query, execution_options=_FRESH)
    return item


def _assign(session: Session, cfg: LabelingStage, user: UserRow, item: ItemRow, now_ms: int) -> AssignmentRow:
    """Takes a place of the item; an assignment that ran out comes back in its order, which a page may still show."""
    rows = session.execute(_ASSIGNED, {"item": item.id}, execution_options=_FRESH).all()
    assignment = next((row for row, _ in rows if row.user_id == user.id), None)
    if assignment is None:
        used = [row.side_order for row, labeler in rows if labeler == "person" and row.state in ("leased", "done")]
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
