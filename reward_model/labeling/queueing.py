"""Items on their way into the database and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import insert, select, text
from sqlalchemy.orm import Session

from reward_model.labeling.answers import is_storable
from reward_model.labeling.records import Added, Candidate, Item
from reward_model.labeling.schema import ItemRow
from rlhf.errors import LabelError

T = TypeVar("T")

_CHUNK = 500
_QUEUE_LOCK = 7_305_021_467
"""Key of the advisory lock under which items are added: two that bring the same item wait for each other."""


def add_items(session: Session, items: Iterable[Item], now_ms: int) -> Added:
    """Adds the items whose key is new.

    Raises:
        LabelError: an item cannot be judged or stored; names it.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _QUEUE_LOCK})
    new = known = 0
    for chunk in _chunks(items, _CHUNK):
        rows = {item.key: item_row(item, now_ms) for item in chunk}
        old = set(session.scalars(select(ItemRow.key).where(ItemRow.key.in_(rows))))
        if fresh := [row for key, row in rows.items() if key not in old]:
            session.execute(insert(ItemRow), fresh)
        new += len(fresh)
        known += len(chunk) - len(fresh)
    return Added(new, known)


def _chunks(things: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(things)
    while chunk := list(islice(iterator, size)):
        yield chunk


def item_row(item: Item, now_ms: int) -> dict[str, Any]:
    """The columns of an item.

    Raises:
        LabelError: it cannot be judged or stored; names the field.
    """
    K = len(item.responses)

    def refuse(what: str, fix: str) -> LabelError:
        return LabelError(f"item {item.key} (prompt_id {item.prompt_id!r}): {what}", fix=fix)

    if item.kind not in ("pair", "ranking") or K < 2 or (item.kind == "pair" and K != 2):
        raise refuse(f"a {item.kind} of {K} responses", "a pair has two responses, a ranking two or more")
    if item.wanted < 1:
        raise refuse(f"wanted is {item.wanted}", "ask for one judgment at least")
    if item.gold_ranks is not None and (len(item.gold_ranks) != K or len(set(item.gold_ranks)) < 2):
        raise refuse(f"gold_ranks {item.gold_ranks}", f"give {K} ranks that keep at least two responses apart")
    for name, longest in (("prompt_id", 64), ("batch", 64), ("source", 10_000)):
        if not is_storable(getattr(item, name), longest):
            raise refuse(f"{name} is too long or not plain text", f"use {longest:,} characters at most")
    responses = [dataclasses.asdict(response) for response in item.responses]
    try:
        json.dumps([item.prompt, responses, item.meta, item.priority], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise refuse(f"it is not JSON: {error}", "keep to text, finite numbers, lists and objects") from None
    return {
        "key": item.key,
        "kind": item.kind,
        "prompt": item.prompt,
        "responses": responses,
        "prompt_id": item.prompt_id,
        "source": item.source,
        "batch": item.batch,
        "wanted": item.wanted,
        "urgency": -item.priority,
        "is_gold": item.gold_ranks is not None,
        "gold_ranks": item.gold_ranks,
        "meta": item.meta,
        "created_ms": now_ms,
    }


def all_items(session: Session) -> list[Item]:
    """All items, in the order in which they were queued."""
    return [
        Item(
            prompt=row.prompt,
            responses=[Candidate(**response) for response in row.responses],
            kind=row.kind,
            prompt_id=row.prompt_id,
            source=row.source,
            batch=row.batch,
            wanted=row.wanted,
            priority=0.0 - row.urgency,  # not -0.0
            gold_ranks=row.gold_ranks,
            meta=row.meta,
        )
        for row in session.scalars(select(ItemRow).order_by(ItemRow.id))
    ]


def item_states(session: Session) -> dict[str, str]:
    """State by key."""
    return {row.key: row.state for row in session.execute(select(ItemRow.key, ItemRow.state).order_by(ItemRow.id))}
