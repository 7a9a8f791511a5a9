"""Users, invite links, passwords and sessions. Everything that happens here goes into the audit log.

Of invites and sessions only SHA-256 hashes are stored: they are 256 random bits each, so that a slow hash would add
nothing. Passwords are hashed by argon2id.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Any

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from reward_model.labeling.schema import EventRow, InviteRow, SessionRow, UserRow
from reward_model.labeling.security import Refused
from reward_model.labeling.store import LabelStore

ROLES = ("admin", "annotator", "viewer")
SESSION_MS = 7 * 24 * 3_600_000
INVITE_MS = 7 * 24 * 3_600_000
MIN_PASSWORD, MAX_PASSWORD = 10, 200

HASHER = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
"""argon2id with 19 MiB and two passes: the first of OWASP's equivalent choices."""

_HASHING = threading.BoundedSemaphore(2)
_HASHING_SECONDS = 10.0
_NAME = re.compile(r"\w[\w .@'-]{0,62}[\w.]|\w")


@dataclass(frozen=True)
class Visitor:
    """Who asks. `csrf_token` must come back with everything that changes something."""

    user_id: int
    name: str
    role: str
    csrf_token: str


@dataclass(frozen=True)
class Invitation:
    """What a link is good for: an account of this role, or a new password for the user of this name."""

    role: str
    name: str


def hash_token(token: str) -> bytes:
    """What is stored of an invite's or a session's token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def log(store: LabelStore, session: Session, user_id: int | None, kind: str, **detail: Any) -> None:
    """An entry of the audit log, in the caller's transaction: what is not logged does not happen."""
    session.add(EventRow(created_ms=store.clock(), user_id=user_id, kind=kind, detail=detail))


# --- invites --------------------------------------------------------------------------------------------------


def has_admin(store: LabelStore) -> bool:
    """Whether somebody can log in as admin."""
    with store.read() as session:
        return session.scalar(select(UserRow.id).where(*_ADMINS).limit(1)) is not None


def create_invite(store: LabelStore, role: str, created_by: int | None) -> str:
    """The token of a new invite; it makes one account of that role within seven days."""
    _check_role(role)
    token, row = _new_invite(store, role, created_by)
    with store.begin() as session:
        session.add(row)
        session.flush()
        log(store, session, created_by, "invite_created", invite=row.id, role=role)
    return token


def create_reset(store: LabelStore, by: int, user_id: int) -> tuple[str, str]:
    """The token of a link by which this user chooses a new password, within seven days; and the user's name.

    Earlier ones of this user end. Until the link is used, the old password works.

    Raises:
        Refused: 404 no such user.
    """
    with store.begin() as session:
        user = _person(session, user_id)
        earlier = (InviteRow.for_user == user_id, InviteRow.used_by.is_(None))
        session.execute(update(InviteRow).where(*earlier).values(expires_ms=store.clock()))
        token, row = _new_invite(store, user.role, by)
        row.for_user = user_id
        session.add(row)
        session.flush()
        log(store, session, by, "password_link_created", invite=row.id, user=user_id, name=user.name)
        return token, user.name


def _new_invite(store: LabelStore, role: str, created_by: int | None) -> tuple[str, InviteRow]:
    token, now = secrets.token_urlsafe(32), store.clock()
    times = {"created_ms": now, "expires_ms": now + INVITE_MS}
    return token, InviteRow(token_hash=hash_token(token), role=role, created_by=created_by, **times)


def first_admin_invite(store: LabelStore) -> str:
    """The token of an admin's invite; the command line's earlier ones end, lest old terminals hold keys."""
    with store.begin() as session:
        earlier = (InviteRow.created_by.is_(None), InviteRow.used_by.is_(None), InviteRow.role == "admin")
        session.execute(update(InviteRow).where(*earlier).values(expires_ms=store.clock()))
    return create_invite(store, "admin", None)


def withdraw_invite(store: LabelStore, by: int, invite_id: int) -> None:
    """The link no longer works.

    Raises:
        Refused: 404, there is no such invite that works.
    """
    with store.begin() as session:
        invite = session.get(InviteRow, invite_id, with_for_update=True)
        if invite is None or invite.used_by is not None:
            raise Refused(404, f"there is no open invite {invite_id}", fix="reload the admin page")
        invite.expires_ms = store.clock()
        log(store, session, by, "invite_withdrawn", invite=invite_id, role=invite.role)


def invitation(store: LabelStore, token: str) -> Invitation:
    """What an invite is good for.

    Raises:
        Refused: 404, it is unknown, used or expired, or its user deactivated; which of them is not said.
    """
    found = select(InviteRow, UserRow).outerjoin(UserRow, UserRow.id == InviteRow.for_user)
    with store.read() as session:
        row = session.execute(found.where(*_usable(store, token))).first()
    if row is None or (row[1] is not None and not row[1].active):
        raise _dead_invite()
    return Invitation(row[0].role, row[1].name if row[1] else "")


def accept_invite(store: LabelStore, token: str, name: str, password: str) -> int:
    """The id of a new account, or of the user whose password the link sets: `name` then plays no part.

    Raises:
        Refused: 404 as `invitation`, 409 the name is taken, 422 name or password will not do.
    """
    known = invitation(store, token).name  # before the password is hashed, which is slow
    name = known or clean_name(name)
    password_hash = new_hash(password)
    with store.begin() as session:
        invite = session.scalar(select(InviteRow).where(*_usable(store, token)).with_for_update())
        if invite is None:
            raise _dead_invite()
        if invite.for_user is not None:
            invite.used_by = invite.for_user
            _set_password(store, session, _person(session, invite.for_user), password_hash, "password_reset")
            return invite.for_user
        if _id_of(session, name) is not None:
            raise _name_taken(name)
        user = UserRow(name=name, role=invite.role, password_hash=password_hash, created_ms=store.clock())
        session.add(user)
        try:
            session.flush()
        except IntegrityError:  # the same name, in the same moment
            raise _name_taken(name) from None
        invite.used_by = user.id
        log(store, session, user.id, "invite_used", invite=invite.id, role=invite.role, name=name)
        return user.id


def clean_name(name: str) -> str:
    """A name as it is stored: one form of every letter, single spaces.

    Raises:
        Refused: 422, empty, too long, or with signs that could pass for another name.
    """
    name = one_form(name)
    if not _NAME.fullmatch(name):
        raise Refused(422, "this name will not do", fix="take 1 to 64 letters, digits, spaces or . @ ' -")
    return name


# --- passwords and sessions -----------------------------------------------------------------------------------


def hash_password(password: str) -> str:
    """argon2id's string.

    Raises:
        Refused: 429, too many at once.
    """
    with _hashing():
        return HASHER.hash(_bytes(password))


def new_hash(password: str) -> str:
    """`hash_password` of a password that somebody chose.

    Raises:
        Refused: 422 too short or too long, 429 too many at once.
    """
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        fix = f"take {MIN_PASSWORD} to {MAX_PASSWORD} characters; some words in a row are good"
        raise Refused(422, f"the password has {len(password)} characters", fix=fix)
    return hash_password(password)


def change_password(store: LabelStore, user_id: int, current: str, new: str) -> None:
    """Another password; all sessions of the user end.

    Raises:
        Refused: 422, the current one is wrong or the new one will not do; 429, too many at once.
    """
    with store.read() as session:
        stored = session.get_one(UserRow, user_id).password_hash
    if not _verify(stored or nobodys_hash(), current):
        raise Refused(422, "the current password is wrong", fix="try again, or ask an admin for a new password link")
    password_hash = new_hash(new)
    with store.begin() as session:
        _set_password(store, session, _person(session, user_id), password_hash, "password_changed")


def _set_password(store: LabelStore, session: Session, user: UserRow, password_hash: str, kind: str) -> None:
    user.password_hash = password_hash
    session.execute(delete(SessionRow).where(SessionRow.user_id == user.id))  # whoever knew the old one is out
    log(store, session, user.id, kind, name=user.name)


def login(store: LabelStore, name: str, password: str, address: str) -> str:
    """A new session; its token, for the cookie.

    A name that is unknown, a machine's or deactivated takes as long as a wrong password: all of them verify a hash.

    Raises:
        Refused: 401, for every reason the same; 429, too many at once.
    """
    with store.read() as session:
        row = session.get(UserRow, _id_of(session, one_form(name)) or 0)
        user_id, stored, active = (row.id, row.password_hash, row.active) if row else (None, None, False)
    right = _verify(stored or nobodys_hash(), password)
    if user_id is None or not (right and stored and active):
        with store.begin() as session:
            # An unknown name is not kept: people type their password there.
            log(store, session, user_id, "login_failed", address=address)
        raise Refused(401, "name or password is wrong", fix="try again, or ask an admin for a new password link")
    return start_session(store, user_id, address)


def start_session(store: LabelStore, user_id: int, address: str) -> str:
    """A session of a user who proved to be that user; the token is always a new one."""
    token = secrets.token_urlsafe(32)
    now = store.clock()
    with store.begin() as session:
        session.execute(delete(SessionRow).where(SessionRow.expires_ms <= now))
        session.add(
            SessionRow(
                token_hash=hash_token(token),
                user_id=user_id,
                csrf_token=secrets.token_urlsafe(32),
                created_ms=now,
                expires_ms=now + SESSION_MS,
            )
        )
        log(store, session, user_id, "login", address=address)
    return token


def visitor_of(store: LabelStore, token: str) -> Visitor | None:
    """Whose session it is, by one query of primary keys; None if it is unknown or over, or the user deactivated.

    Nothing is remembered between requests, so that a changed role counts from the next one on.
    """
    columns = (UserRow.id, UserRow.name, UserRow.role, SessionRow.csrf_token)
    found = (
        select(*columns)
        .join(UserRow, UserRow.id == SessionRow.user_id)
        .where(SessionRow.token_hash == hash_token(token), SessionRow.expires_ms > store.clock(), UserRow.active)
    )
    with store.read() as session:
        row = session.execute(found).first()
    return Visitor(*row) if row else None


def end_session(store: LabelStore, token: str, user_id: int | None) -> None:
    """Log out; unknown tokens are no error. `user_id`: of the audit log, None if a new login replaces the session."""
    with store.begin() as session:
        session.execute(delete(SessionRow).where(SessionRow.token_hash == hash_token(token)))
        if user_id is not None:
            log(store, session, user_id, "logout")


@cache
def nobodys_hash() -> str:
    """What is verified where there is no account, so that an unknown name takes as long as a known one."""
    return HASHER.hash(secrets.token_bytes(16))


def _bytes(password: str) -> bytes:
    return unicodedata.normalize("NFC", password).encode("utf-8", "surrogatepass")


def one_form(name: str) -> str:
    """One form of every letter, single spaces: names that look alike to most programs are one."""
    return " ".join(unicodedata.normalize("NFKC", name[:200]).split())


def _id_of(session: Session, name: str) -> int | None:
    """Upper and lower case are one name. Compared here, since SQLite knows the case of ASCII letters only."""
    names = session.execute(select(UserRow.id, UserRow.name)).all()
    return next((user_id for user_id, known in names if known.casefold() == name.casefold()), None)


def _verify(stored: str, password: str) -> bool:
    with _hashing():
        try:
            return HASHER.verify(stored, _bytes(password[: MAX_PASSWORD + 1]))
        except (VerificationError, InvalidHashError):
            return False


class _hashing:
    """Two hashes at a time: more would fill the memory and starve the annotators of threads and cores."""

    def __enter__(self) -> None:
        if not _HASHING.acquire(timeout=_HASHING_SECONDS):
            raise Refused(429, "too many people log in at once", fix="try again in a minute", retry_after=30)

    def __exit__(self, *_: object) -> None:
        _HASHING.release()


# --- what admins do with users --------------------------------------------------------------------------------

_ADMINS = (UserRow.role == "admin", UserRow.active, UserRow.password_hash.is_not(None))


def set_role(store: LabelStore, by: int, user_id: int, role: str) -> None:
    """Another role, from the user's next request on.

    Raises:
        Refused: 404 no such user, 409 the last admin, 422 no such role.
    """
    _check_role(role)
    with store.begin() as session:
        user = _person(session, user_id)
        before, user.role = user.role, role
        if before == "admin":
            _keep_an_admin(session)
        log(store, session, by, "role_changed", user=user_id, name=user.name, before=before, after=role)


def set_active(store: LabelStore, by: int, user_id: int, active: bool) -> None:
    """Deactivate a user, whose sessions end at once, or activate again.

    Raises:
        Refused: 404 no such user, 409 the last admin.
    """
    with store.begin() as session:
        user = _person(session, user_id)
        user.active = active
        if not active:
            if user.role == "admin":
                _keep_an_admin(session)
            session.execute(delete(SessionRow).where(SessionRow.user_id == user_id))
        log(store, session, by, "user_activated" if active else "user_deactivated", user=user_id, name=user.name)


def unpause(store: LabelStore, by: int, user_id: int) -> None:
    """A user whom failed gold questions stopped gets items again; those answers no longer count against them.

    Raises:
        Refused: 404 no such user.
    """
    with store.begin() as session:
        user = _person(session, user_id)
        log(store, session, by, "user_unpaused", user=user_id, name=user.name, reason=user.paused)
        user.paused, user.gold_since_ms = "", store.clock() + 1


def _person(session: Session, user_id: int) -> UserRow:
    user = session.get(UserRow, user_id, with_for_update=True)
    if user is None or user.labeler != "person":
        raise Refused(404, f"there is no user {user_id}", fix="reload the admin page")
    return user


def _keep_an_admin(session: Session) -> None:
    session.flush()
    if session.scalar(select(UserRow.id).where(*_ADMINS).limit(1)) is None:
        raise Refused(409, "no admin would be left", fix="make another user an admin first")


def _usable(store: LabelStore, token: str) -> tuple[Any, ...]:
    return (
        InviteRow.token_hash == hash_token(token),
        InviteRow.used_by.is_(None),
        InviteRow.expires_ms > store.clock(),
    )


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise Refused(422, f"there is no role {role[:40]!r}", fix=f"take one of {', '.join(ROLES)}")


def _dead_invite() -> Refused:
    return Refused(404, "this invite link does not work: it was used, or is too old", fix="ask an admin for a new one")


def _name_taken(name: str) -> Refused:
    return Refused(409, f"the name {name} is taken", fix="take another name")
