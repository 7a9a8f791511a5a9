"""What admins do with flagged items: give them back to the annotators, or take them out for good."""

from __future__ import annotations

from reward_model.labeling import answers
from reward_model.labeling.accounts import log
from reward_model.labeling.serving import locked_item
from reward_model.labeling.store import LabelStore


def reopen(store: LabelStore, by: int, item_id: int) -> None:
    """Annotators get the item again, where places are left; not those who flagged or judged it. Its flags are settled.

    Raises:
        LabelError: no such item.
    """
    with store.begin() as session:
        item = locked_item(session, item_id)
        before = item.state
        answers.reopen(item)
        log(store, session, by, answers.REOPENED, item=item_id, before=before, after=item.state)


def retire(store: LabelStore, by: int, item_id: int) -> None:
    """Nobody gets the item any more; what was said about it stays.

    Raises:
        LabelError: no such item.
    """
    with store.begin() as session:
        item = locked_item(session, item_id)
        before, item.state = item.state, "retired"
        log(store, session, by, "item_retired", item=item_id, before=before)
