"""What was said so far: judgments as records, counts, and answers that no person was served."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from reward_model.labeling.answers import DECIDING, check_answer, same_submission, stands, store_answer
from reward_model.labeling.records import Answer, Judgment, Progress
from reward_model.labeling.schema import AssignmentRow, ItemRow, JudgmentRow, UserRow
from reward_model.labeling.serving import answer_of, locked_user
from rlhf.errors import LabelError


@dataclass(frozen=True)
class Shown:
    """Which item was judged, and how it stood there."""

    item_key: str
    order: list[int]
    presentation: int


@dataclass(frozen=True)
class Totals:
    """The part of `Progress` that is the same for everybody."""

    wanted: int = 0
    done: int = 0
    open: int = 0
    flagged: int = 0


def all_judgments(session: Session, *, effective: bool) -> list[Judgment]:
    """Judgments by id; `effective`: only those that stand."""
    query = (
        select(JudgmentRow, AssignmentRow, ItemRow.key, ItemRow.kind, UserRow.name, UserRow.labeler)
        .join(AssignmentRow, AssignmentRow.id == JudgmentRow.assignment_id)
        .join(ItemRow, ItemRow.id == AssignmentRow.item_id)
        .join(UserRow, UserRow.id == AssignmentRow.user_id)
        .order_by(JudgmentRow.id)
    )
    return [
        Judgment(
            id=row.id,
            item_key=key,
            kind=kind,
            annotator=name,
            labeler=labeler,
            order=assignment.side_order,
            answer=answer_of(row),
            presentation=assignment.presentation,
            supersedes=row.supersedes_id,
            created_ms=row.created_ms,
        )
        for row, assignment, key, kind, name, labeler in session.execute(query.where(*stands()) if effective else query)
    ]


def totals(session: Session) -> Totals:
    """Counts over all items, from an index that holds them."""
    query = select(ItemRow.is_gold, ItemRow.state, func.count(), func.sum(ItemRow.wanted), func.sum(ItemRow.taken))
    rows = session.execute(query.group_by(ItemRow.is_gold, ItemRow.state)).all()
    asked = [(state, wanted, taken) for is_gold, state, _, wanted, taken in rows if not is_gold and state != "retired"]
    leased = (
        select(func.count())
        .select_from(AssignmentRow)
        .join(ItemRow, ItemRow.id == AssignmentRow.item_id)
        .where(AssignmentRow.state == "leased", AssignmentRow.presentation == 0)
        .where(~ItemRow.is_gold, ItemRow.state != "retired")
    )
    return Totals(
        wanted=sum(wanted for _, wanted, _ in asked),
        done=sum(taken for *_, taken in asked) - (session.scalar(leased) or 0),
        open=sum(wanted - taken for state, wanted, taken in asked if state == "open"),
        flagged=sum(number for _, state, number, *_ in rows if state == "flagged"),
    )


def progress(session: Session, totals: Totals, user_id: int | None) -> Progress:
    """The totals, and one user's part; None: that of all people.

    Raises:
        LabelError: no such user.
    """
    if user_id is None:
        judged = session.scalar(select(func.sum(UserRow.judged)).where(UserRow.labeler == "person")) or 0
        return Progress(judged=judged, paused="", **vars(totals))
    user = session.get(UserRow, user_id)
    if user is None:
        raise LabelError(f"there is no user {user_id}", fix="log in again")
    return Progress(judged=user.judged, paused=user.paused, **vars(totals))


@dataclass(frozen=True)
class Left:
    """Who may label an item and has not had it yet, by name; `item_id` is what the admin page calls it."""

    item_id: int
    people: list[str]


def left_to(session: Session) -> dict[str, Left]:
    """By key of every item that is no gold question, whom it still waits for.

    People who may label are active annotators and admins with a password, or who have been served without one; those of
    an imported file are not among them.
    """
    may = (UserRow.labeler == "person", UserRow.active, UserRow.role.in_(("annotator", "admin")))
    able = or_(UserRow.password_hash.is_not(None), UserRow.served > 0)
    names = dict(session.execute(select(UserRow.id, UserRow.name).where(*may, able)).tuples().all())
    had = (AssignmentRow.presentation == 0, AssignmentRow.state.in_(("done", "passed")))
    answered: dict[int, set[int]] = defaultdict(set)
    for item_id, user_id in session.execute(select(AssignmentRow.item_id, AssignmentRow.user_id).where(*had)):
        answered[item_id].add(user_id)
    items = session.execute(select(ItemRow.id, ItemRow.key).where(~ItemRow.is_gold))
    return {key: Left(id, [name for user, name in names.items() if user not in answered[id]]) for id, key in items}


def record_answer(session: Session, user_id: int, shown: Shown, answer: Answer, submission_id: str, now_ms: int) -> int:
    """Stores an answer that takes no place; the judgment's id.

    Raises:
        LabelError: the item is unknown, before this annotator in the app, or the order is not that of before, or the
            answer does not fit.
    """
    user = locked_user(session, user_id)
    item = session.scalar(select(ItemRow).where(ItemRow.key == shown.item_key))
    if item is None:
        raise LabelError(f"there is no item {shown.item_key}", fix="queue it first")
    K = len(item.responses)
    if sorted(shown.order) != list(range(K)) or shown.presentation < 0:
        raise LabelError(f"order {shown.order} of {K} responses", fix=f"give every index below {K} once")
    assignment = session.scalar(
        select(AssignmentRow).where(
            AssignmentRow.item_id == item.id,
            AssignmentRow.user_id == user_id,
            AssignmentRow.presentation == shown.presentation,
        )
    )
    if assignment is None:
        assignment = AssignmentRow(
            item_id=item.id,
            user_id=user_id,
            presentation=shown.presentation,
            side_order=shown.order,
            state="passed",
            lease_expires_ms=now_ms,
            created_ms=now_ms,
        )
        session.add(assignment)
        session.flush()
    if (known := same_submission(session, submission_id, assignment)) is not None:
        return known.id
    if assignment.shown_ms is not None or assignment.state == "planned":
        raise LabelError(f"{user.name} judges item {item.key} in the app", fix="record under another name")
    if assignment.side_order != shown.order:
        raise LabelError(
            f"item {item.key} was judged by {user.name} in order {assignment.side_order}, not {shown.order}",
            fix="give the other order another presentation",
        )
    check_answer(answer, item.kind, K)
    user.judged += (answer.choice in DECIDING) - (assignment.state == "done")
    return store_answer(session, assignment, answer, submission_id, now_ms).id
