"""The tables of a labeling project. Judgments and events are only ever added, never changed.

Times are milliseconds since 1970 (UTC): every database compares them alike.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, LargeBinary, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from reward_model.labeling.records import Choice, Kind, Labeler

NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Names every constraint, so that a migration can speak of it in any database."""

    metadata = MetaData(naming_convention=NAMES)
    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON}


class UserRow(Base):
    """Who labels or looks on. Machines (`labeler` judge or simulated) have no password and cannot log in."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(16))  # admin, annotator, viewer
    labeler: Mapped[Labeler] = mapped_column(String(16), default="person")
    password_hash: Mapped[str | None] = mapped_column(String(256))
    active: Mapped[bool] = mapped_column(default=True)
    paused: Mapped[str] = mapped_column(String(200), default="")  # why no items are served; "" if they are
    served: Mapped[int] = mapped_column(default=0)  # items first shown to them; gold counts, repeats do not
    judged: Mapped[int] = mapped_column(default=0)  # effective judgments that decide
    side_balance: Mapped[int] = mapped_column(default=0)  # pairs shown in the item's order, minus those swapped
    gold_since_ms: Mapped[int] = mapped_column(BigInteger, default=0)  # older gold answers no longer count
    created_ms: Mapped[int] = mapped_column(BigInteger)


class InviteRow(Base):
    """A link that makes one account, or sets the password of `for_user`. Only the hash of its token is kept."""

    __tablename__ = "invites"

    id: Mapped[int] = mapped_column(primary_key=True)
    token_hash: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    role: Mapped[str] = mapped_column(String(16))
    created_by: Mapped[int | None] = mapped_column(ForeignKey("users.id"))
    created_ms: Mapped[int] = mapped_column(BigInteger)
    expires_ms: Mapped[int] = mapped_column(BigInteger)
    used_by: Mapped[int | None] = mapped_column(ForeignKey("users.id"))
    for_user: Mapped[int | None] = mapped_column(ForeignKey("users.id"))


class SessionRow(Base):
    """A login. Only the hash of the cookie is kept."""

    __tablename__ = "sessions"

    token_hash: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"), index=True)
    csrf_token: Mapped[str] = mapped_column(String(64))
    created_ms: Mapped[int] = mapped_column(BigInteger)
    expires_ms: Mapped[int] = mapped_column(BigInteger)


class ItemRow(Base):
    """`records.Item`. `taken` counts the judgments that decide and the leases that run, against `wanted`.

    Judgments by machines and of repeats do not count, and a gold question is never full.
    """

    __tablename__ = "items"
    __table_args__ = (
        Index("ix_items_serving", "state", "is_gold", "urgency", "id"),
        Index("ix_items_counts", "is_gold", "state", "wanted", "taken"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(16), unique=True)
    kind: Mapped[Kind] = mapped_column(String(16))
    prompt: Mapped[Any] = mapped_column(JSON)
    responses: Mapped[list[Any]]
    prompt_id: Mapped[str] = mapped_column(String(64), default="")
    source: Mapped[str] = mapped_column(Text, default="")
    batch: Mapped[str] = mapped_column(String(64), default="", index=True)
    wanted: Mapped[int] = mapped_column(default=1)
    taken: Mapped[int] = mapped_column(default=0)
    urgency: Mapped[float] = mapped_column(default=0.0)  # minus the priority: an index can be read upwards
    is_gold: Mapped[bool] = mapped_column(default=False)
    gold_ranks: Mapped[list[Any] | None]
    state: Mapped[str] = mapped_column(String(16), default="open")  # open, full, flagged, retired
    meta: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created_ms: Mapped[int] = mapped_column(BigInteger)


class AssignmentRow(Base):
    """An item before one annotator, in one order of its responses, which never changes.

    States: `leased`; `expired`, the lease ran out and the place is free; `done`, by an answer that decides; `passed`,
    by skip or flag; `planned`, a repeat that is shown once the annotator has been served `due` items.
    """

    __tablename__ = "assignments"
    __table_args__ = (
        UniqueConstraint("item_id", "user_id", "presentation"),
        Index("ix_assignments_user_state", "user_id", "state"),
        Index("ix_assignments_leases", "state", "lease_expires_ms"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("items.id"))
    user_id: Mapped[int] = mapped_column(ForeignKey("users.id"))
    presentation: Mapped[int] = mapped_column(default=0)
    side_order: Mapped[list[Any]]
    state: Mapped[str] = mapped_column(String(16), default="leased")
    due: Mapped[int | None]
    lease_expires_ms: Mapped[int] = mapped_column(BigInteger)
    shown_ms: Mapped[int | None] = mapped_column(BigInteger)
    created_ms: Mapped[int] = mapped_column(BigInteger)


class JudgmentRow(Base):
    """`records.Judgment`. `submission_id` comes from the browser: the same click sent twice is stored once."""

    __tablename__ = "judgments"

    id: Mapped[int] = mapped_column(primary_key=True)
    assignment_id: Mapped[int] = mapped_column(ForeignKey("assignments.id"), index=True)
    submission_id: Mapped[str] = mapped_column(String(64), unique=True)
    choice: Mapped[Choice] = mapped_column(String(16))
    value: Mapped[int | None]
    ranks: Mapped[list[Any] | None]
    confidence: Mapped[int | None]
    notes: Mapped[str] = mapped_column(Text, default="")
    ms_active: Mapped[int] = mapped_column(default=0)
    supersedes_id: Mapped[int | None] = mapped_column(ForeignKey("judgments.id"), unique=True)
    created_ms: Mapped[int] = mapped_column(BigInteger)


class EventRow(Base):
    """The audit log: who did what, and when."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True)
    created_ms: Mapped[int] = mapped_column(BigInteger, index=True)
    user_id: Mapped[int | None] = mapped_column(ForeignKey("users.id"))
    kind: Mapped[str] = mapped_column(String(32))
    detail: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
