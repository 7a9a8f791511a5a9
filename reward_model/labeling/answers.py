"""What is stored of an answer, and what it sets off: places freed, repeats planned, annotators paused, undo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import ColumnElement, and_, bindparam, func, or_, select
from sqlalchemy.orm import Session, aliased

from reward_model.labeling.design import gold_is_right, repeat_is_drawn
from reward_model.labeling.records import STRONGEST, Answer, Receipt, Task, canonical_ranks
from reward_model.labeling.schema import AssignmentRow, EventRow, ItemRow, JudgmentRow, UserRow
from reward_model.labeling.serving import (
    answer_of,
    counts,
    extend,
    free_place,
    locked_assignment,
    locked_user,
    reclaim,
    task_of,
)
from rlhf.config_labeling import LabelingStage
from rlhf.errors import LabelError, LeaseError

MAX_NOTES = 2_000
"""Characters."""

MAX_MS = 2**31 - 1
"""Of the time on an item, 24 days: what a column of 32 bits holds."""

DECIDING = ("compare", "rank", "both_bad")

REOPENED = "item_reopened"
"""The kind of the event that an admin gave an item back to the annotators."""


def check_answer(answer: Answer, kind: str, K: int) -> None:
    """An answer to an item of this kind with `K` responses.

    Raises:
        LabelError: it does not fit; names the field.
    """
    choices = {"pair": ("compare", "rank"), "ranking": ("rank",)}[kind] + ("both_bad", "skip", "flag")
    if answer.choice not in choices:
        raise LabelError(f"choice: {answer.choice!r} does not fit a {kind}", fix=f"send one of {', '.join(choices)}")
    if answer.choice == "compare":
        if not _is_integer(answer.value, -STRONGEST, STRONGEST):
            raise LabelError(f"value: {answer.value!r}", fix=f"send a whole number from -{STRONGEST} to {STRONGEST}")
    elif answer.value is not None:
        raise LabelError(f"value: {answer.choice} has none", fix="leave it out")
    if answer.choice == "rank":
        if not _is_dense(answer.ranks, K):
            raise LabelError(f"ranks: {answer.ranks!r}", fix=f"send {K} ranks by place, 1 the best, none left out")
    elif answer.ranks is not None:
        raise LabelError(f"ranks: {answer.choice} has none", fix="leave them out")
    if answer.confidence is not None and not _is_integer(answer.confidence, 1, 5):
        raise LabelError(f"confidence: {answer.confidence!r}", fix="send a whole number from 1 to 5, or nothing")
    if not _is_integer(answer.ms_active, 0, MAX_MS):
        raise LabelError(f"ms_active: {answer.ms_active!r}", fix="send milliseconds from 0 on")
    if not is_storable(answer.notes, MAX_NOTES):
        raise LabelError("notes: too long or not plain text", fix=f"write {MAX_NOTES:,} characters at most")


def _is_integer(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_dense(ranks: object, K: int) -> bool:
    """Whether `ranks` are `K` whole numbers that leave none out between 1 and the largest."""
    if not isinstance(ranks, list) or len(ranks) != K or not all(_is_integer(rank, 1, K) for rank in ranks):
        return False
    return set(ranks) == set(range(1, max(ranks) + 1))


def is_storable(text: object, longest: int) -> bool:
    """Whether every database takes the text: PostgreSQL has no zero characters, and no half surrogate pairs."""
    if not isinstance(text, str) or len(text) > longest or "\0" in text:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in text)


def submit_answer(
    session: Session,
    cfg: LabelingStage,
    user_id: int,
    assignment_id: int,
    answer: Answer,
    submission_id: str,
    now_ms: int,
) -> Receipt:
    """Stores an answer once, whatever is sent twice.

    Raises:
        LabelError: the answer does not fit, or the assignment is unknown.
        LeaseError: it is judged already, in another tab maybe, or the lease ran out and somebody else has the place.
    """
    user = locked_user(session, user_id)
    assignment, item = locked_assignment(session, user_id, assignment_id)
    policies = [item.responses[index]["policy"] for index in assignment.side_order]
    if (known := same_submission(session, submission_id, assignment)) is not None:
        return Receipt(known.id, True, policies, user.paused)
    check_answer(answer, item.kind, len(item.responses))
    decides = answer.choice in DECIDING
    if assignment.state == "expired" and decides:
        reclaim(assignment, item)
    elif assignment.state == "leased" and not decides:
        free_place(assignment, item)
    elif assignment.state not in ("leased", "expired"):
        raise LeaseError("you have judged this item already", fix="go on with the next item, or undo to change it")
    row = store_answer(session, assignment, answer, submission_id, now_ms)
    if answer.choice == "flag" and item.state != "retired":
        item.state = "flagged"
    if decides:
        user.judged += 1
        if item.kind == "pair" and counts(assignment, item):
            _plan_repeat(session, cfg, user, assignment, item, now_ms)
        if item.is_gold and assignment.presentation == 0:
            _pause_if_gold_fails(session, cfg, user, now_ms)
    return Receipt(row.id, False, policies, user.paused)


_SUBMITTED = select(JudgmentRow).where(JudgmentRow.submission_id == bindparam("submission"))
_LATEST = select(func.max(JudgmentRow.id)).where(JudgmentRow.assignment_id == bindparam("assignment"))


def same_submission(session: Session, submission_id: str, assignment: AssignmentRow) -> JudgmentRow | None:
    """What this submission stored before, if it was sent before.

    Raises:
        LabelError: it was another assignment's, or is no identifier.
    """
    if not is_storable(submission_id, 64) or not submission_id:
        raise LabelError("submission_id: empty, too long or not plain text", fix="send 1 to 64 characters")
    known = session.scalar(_SUBMITTED, {"submission": submission_id})
    if known is not None and known.assignment_id != assignment.id:
        raise LabelError("submission_id: another judgment has it", fix="make a new one for every judgment")
    return known


def store_answer(
    session: Session, assignment: AssignmentRow, answer: Answer, submission_id: str, now_ms: int
) -> JudgmentRow:
    """Adds the row of an answer, which supersedes the assignment's latest one."""
    assignment.state = "done" if answer.choice in DECIDING else "leased" if answer.choice == "undo" else "passed"
    row = JudgmentRow(
        **vars(answer),
        assignment_id=assignment.id,
        submission_id=submission_id,
        supersedes_id=session.scalar(_LATEST, {"assignment": assignment.id}),
        created_ms=now_ms,
    )
    session.add(row)
    session.flush()
    return row


def undo_last(session: Session, cfg: LabelingStage, user_id: int, now_ms: int) -> Task | None:
    """Withdraws the user's last judgment that stands, by a row, and leases its item again; None: there is none.

    A skip or a flag gave the item's place away. Where it cannot be had again, it stands for good, and the judgment
    before it is withdrawn; `Task.passed_over` counts those.

    Raises:
        LabelError: the annotator is paused.
        LeaseError: nothing is left but such skips and flags, or the place went to somebody else just now.
    """
    user = locked_user(session, user_id)
    if user.paused:
        raise LabelError(f"nothing can be undone now: {user.paused}", fix="ask an admin")
    last = session.scalar(_LAST_TO_UNDO, {"user": user_id})
    passed_over = session.scalar(_STANDING_SINCE, {"user": user_id, "id": last.id if last else 0}) or 0
    if last is None:
        if passed_over:
            raise LeaseError(
                "what you skipped or flagged last cannot come back: others have judged it meanwhile, or an admin has "
                "taken it out",
                fix="go on with the next item",
            )
        return None
    assignment, item = locked_assignment(session, user_id, last.assignment_id)
    if last.choice in DECIDING:
        user.judged -= 1
        _forget_repeat(session, assignment)
    else:
        if last.choice == "flag" and item.state == "flagged" and not _others_flagged(session, last, item):
            reopen(item)
        reclaim(assignment, item)
    store_answer(session, assignment, Answer("undo"), f"undo-{last.id}", now_ms)
    assignment.shown_ms = now_ms
    extend(assignment, cfg, now_ms)
    return replace(task_of(session, assignment, item), passed_over=passed_over)


def stands() -> tuple[ColumnElement[bool], ...]:
    """Conditions of the judgments that stand: no undo rows, and none that a later row supersedes."""
    later = aliased(JudgmentRow)
    superseded = select(later.id).where(later.supersedes_id == JudgmentRow.id).exists()
    return JudgmentRow.choice != "undo", ~superseded


# Judgments of this user that stand, and were not recorded by a program. One that decides holds its place; a skip or a
# flag can be taken back as long as `serving.take_place` would find one.
_OWN = (*stands(), AssignmentRow.user_id == bindparam("user"), AssignmentRow.shown_ms.is_not(None))
_HAS_PLACE = and_(
    ItemRow.state != "retired", or_(AssignmentRow.presentation != 0, ItemRow.is_gold, ItemRow.taken < ItemRow.wanted)
)
_LAST_TO_UNDO = (
    select(JudgmentRow)
    .join(AssignmentRow, AssignmentRow.id == JudgmentRow.assignment_id)
    .join(ItemRow, ItemRow.id == AssignmentRow.item_id)
    .where(*_OWN, or_(JudgmentRow.choice.in_(DECIDING), _HAS_PLACE))
    .order_by(JudgmentRow.id.desc())
    .limit(1)
)
_STANDING_SINCE = (
    select(func.count())
    .select_from(JudgmentRow)
    .join(AssignmentRow, AssignmentRow.id == JudgmentRow.assignment_id)
    .where(*_OWN, JudgmentRow.id > bindparam("id"))
)


def reopen(item: ItemRow) -> None:
    """Ends a flag, or a retirement."""
    item.state = "full" if item.taken >= item.wanted and not item.is_gold else "open"


def settled_ms(session: Session, item_ids: Sequence[int]) -> dict[int, int]:
    """By item, when an admin last gave it back to the annotators: flags up to then are settled."""
    # Picked out here: other kinds of events have texts in that place, which PostgreSQL must not read as numbers.
    found = select(EventRow.detail, EventRow.created_ms).where(EventRow.kind == REOPENED).order_by(EventRow.id)
    latest = {detail["item"]: created_ms for detail, created_ms in session.execute(found)}
    return {item_id: latest[item_id] for item_id in item_ids if item_id in latest}


def _others_flagged(session: Session, flag: JudgmentRow, item: ItemRow) -> bool:
    flags = select(JudgmentRow.id).join(AssignmentRow, AssignmentRow.id == JudgmentRow.assignment_id)
    others = flags.where(*stands(), AssignmentRow.item_id == item.id)
    others = others.where(JudgmentRow.choice == "flag", JudgmentRow.id != flag.id)
    others = others.where(JudgmentRow.created_ms > settled_ms(session, [item.id]).get(item.id, 0))
    return session.scalar(others.limit(1)) is not None


def _plan_repeat(
    session: Session, cfg: LabelingStage, user: UserRow, assignment: AssignmentRow, item: ItemRow, now_ms: int
) -> None:
    if not repeat_is_drawn(cfg.repeat_fraction, cfg.seed, user.id, item.key):
        return
    if _repeat_of(session, assignment) is None:
        session.add(
            AssignmentRow(
                item_id=item.id,
                user_id=user.id,
                presentation=1,
                side_order=assignment.side_order[::-1],
                state="planned",
                due=user.served + cfg.repeat_after,
                lease_expires_ms=0,
                created_ms=now_ms,
            )
        )


def _forget_repeat(session: Session, assignment: AssignmentRow) -> None:
    """A repeat that was not shown yet is planned anew with the new answer, if that decides."""
    repeat = _repeat_of(session, assignment)
    if assignment.presentation == 0 and repeat is not None and repeat.state == "planned":
        session.delete(repeat)


def _repeat_of(session: Session, assignment: AssignmentRow) -> AssignmentRow | None:
    same = select(AssignmentRow).where(AssignmentRow.item_id == assignment.item_id)
    return session.scalar(same.where(AssignmentRow.user_id == assignment.user_id, AssignmentRow.presentation == 1))


def _pause_if_gold_fails(session: Session, cfg: LabelingStage, user: UserRow, now_ms: int) -> None:
    """Judges the last `gold.after` gold answers of this annotator since an admin last let them go on."""
    query = (
        select(JudgmentRow, AssignmentRow.side_order, ItemRow.gold_ranks)
        .join(AssignmentRow, AssignmentRow.id == JudgmentRow.assignment_id)
        .join(ItemRow, ItemRow.id == AssignmentRow.item_id)
        .where(*stands(), AssignmentRow.user_id == user.id, AssignmentRow.presentation == 0, ItemRow.is_gold)
        .where(JudgmentRow.choice.in_(DECIDING), JudgmentRow.created_ms >= user.gold_since_ms)
        .order_by(JudgmentRow.id.desc())
        .limit(cfg.gold.after)
    )
    found = session.execute(query)
    right = [gold_is_right(canonical_ranks(answer_of(row), order), gold or []) for row, order, gold in found]
    if len(right) == cfg.gold.after and sum(right) < cfg.gold.pause_below * len(right):
        user.paused = f"{sum(right)} of your last {len(right)} answers to control questions were right"
        detail = {"right": sum(right), "of": len(right)}
        session.add(EventRow(created_ms=now_ms, user_id=user.id, kind="paused", detail=detail))
