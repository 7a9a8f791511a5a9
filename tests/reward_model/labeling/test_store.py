"""Items in and judgments out; machines' answers, counts and users; on both databases."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from reward_model.labeling import moderation
from reward_model.labeling.records import Answer, Candidate, Item
from reward_model.labeling.store import Added, Progress
from rlhf.errors import LabelError

LEFT = Answer("compare", value=-1)


def test_items_come_back_as_they_were_queued(project: Any) -> None:
    store = project.open()
    items = [
        Item(
            [{"role": "user", "content": "Grüße \U0001f600 \ud800 \0"}],
            [Candidate("a\0", "sft", [1, 2], 0.25), Candidate("b")],
            prompt_id="7",
            source="rollouts.parquet",
            batch="round-2",
            wanted=3,
            priority=1.5,
            gold_ranks=[2, 1],
            meta={"x": [1, {"y": None}]},
        ),
        Item("plain", [Candidate(str(k)) for k in range(5)], kind="ranking"),
    ]
    assert store.add_items(items) == Added(new=2, known=0)
    assert store.items() == items
    assert [item.key for item in store.items()] == [item.key for item in items]


def test_queueing_again_adds_nothing(project: Any, make_items: Any) -> None:
    store = project.open()
    assert store.add_items(make_items(600)) == Added(600, 0)
    assert store.add_items(make_items(602, start=599, wanted=9)) == Added(601, 1)
    assert store.add_items([*make_items(1, start=5000)] * 3) == Added(1, 2)
    assert store.add_items([]) == Added(0, 0)
    assert len(store.items()) == 1202
    assert store.items()[599].wanted == 1


def admin(store: Any) -> int:
    return store.ensure_user("admin", role="admin")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"responses": [Candidate("a")]}, "a pair of 1 responses"),
        ({"responses": [Candidate("a")] * 3}, "a pair of 3 responses"),
        ({"kind": "ranking", "responses": [Candidate("a")]}, "a ranking of 1 responses"),
        ({"kind": "triple"}, "a triple of 2"),
        ({"wanted": 0}, "wanted is 0"),
        ({"gold_ranks": [1, 1]}, "gold_ranks"),
        ({"gold_ranks": [1, 2, 3]}, "gold_ranks"),
        ({"batch": "x" * 65}, "batch is too long"),
        ({"prompt_id": "a\0"}, "prompt_id is too long or not plain"),
        ({"meta": {"x": float("nan")}}, "not JSON"),
        ({"meta": {"x": {1}}}, "not JSON"),
        ({"priority": float("inf")}, "not JSON"),
    ],
)
def test_an_item_that_cannot_be_judged_is_named_and_nothing_is_added(
    project: Any, make_items: Any, wrong: dict[str, Any], message: str
) -> None:
    store = project.open()
    item = dataclasses.replace(make_items(1, start=7)[0], **wrong)
    with pytest.raises(LabelError, match=message) as caught:
        store.add_items([*make_items(3), item])
    assert item.key in caught.value.message
    assert store.items() == []


def test_a_machines_answers_take_no_place(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open()
    store.add_items(make_items(2))
    keys = [item.key for item in store.items()]
    first = store.record(
        "judge-1", "judge", keys[0], [1, 0], Answer("compare", value=3), presentation=0, submission_id="a"
    )
    store.record("judge-1", "judge", keys[0], [0, 1], Answer("compare", value=1), presentation=1, submission_id="b")
    store.record("sim", "simulated", keys[1], [0, 1], Answer("skip"), presentation=0, submission_id="c")
    judgments = standing(store)
    assert [(j.id, j.annotator, j.labeler, j.order, j.presentation, j.value) for j in judgments] == [
        (first, "judge-1", "judge", [1, 0], 0, -3),
        (judgments[1].id, "judge-1", "judge", [0, 1], 1, 1),
        (judgments[2].id, "sim", "simulated", [0, 1], 0, None),
    ]
    assert store.progress() == Progress(judged=0, paused="", wanted=2, done=0, open=2, flagged=0)
    user = store.ensure_user("ann", role="annotator")
    assert [project.judge(store, user)[0].prompt for _ in range(2)] == ["p0", "p1"]


def test_a_machine_may_change_its_mind(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open()
    store.add_items(make_items(1))
    (item,) = store.items()

    def record(answer: Answer, submission: str, order: tuple[int, ...] = (0, 1)) -> int:
        return store.record("j", "judge", item.key, [*order], answer, presentation=0, submission_id=submission)

    first = record(LEFT, "a")
    assert record(Answer("compare", value=2), "a") == first
    second = record(Answer("compare", value=2), "b")
    assert [(j.id, j.supersedes, j.value) for j in standing(store)] == [(second, first, 2)]
    assert len(store.judgments(effective=False)) == 2
    judge = store.ensure_user("j", role="annotator", labeler="judge")
    assert store.progress(judge).judged == 1
    record(Answer("skip"), "c")
    assert store.progress(judge).judged == 0
    with pytest.raises(LabelError, match=r"judged by j in order \[0, 1\], not \[1, 0\]"):
        record(LEFT, "d", (1, 0))
    with pytest.raises(LabelError, match="order"):
        record(LEFT, "d", (0, 0))
    with pytest.raises(LabelError, match="ranks"):
        record(Answer("rank", ranks=[1, 2, 3]), "d")
    with pytest.raises(LabelError, match="no item nothing"):
        store.record("j", "judge", "nothing", [0, 1], LEFT, presentation=0, submission_id="d")
    assert len(store.judgments(effective=False)) == 3


def test_what_is_recorded_is_not_the_apps(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open()
    store.add_items(make_items(2))
    first, second = (item.key for item in store.items())
    store.record("ann", "person", first, [0, 1], LEFT, presentation=0, submission_id="a")
    user = store.ensure_user("ann", role="annotator")
    assert store.undo(user) is None
    assert store.next_task(user).prompt == "p1"  # who said something in a file has had the item
    with pytest.raises(LabelError, match="in the app"):
        store.record("ann", "person", second, [0, 1], LEFT, presentation=0, submission_id="b")
    assert [j.item_key for j in store.judgments()] == [first]


def test_progress_by_hand(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(5, wanted=2))
    store.add_items(make_items(1, start=5, gold_ranks=[1, 2]))
    a, b = (store.ensure_user(name, role="annotator") for name in "ab")
    assert store.progress() == Progress(judged=0, paused="", wanted=10, done=0, open=10, flagged=0)
    project.judge(store, a)
    project.judge(store, b)
    project.judge(store, a)
    project.judge(store, a, Answer("flag"))  # p2
    project.judge(store, b, Answer("skip"))  # p1
    store.next_task(b)  # p3
    assert store.progress() == Progress(judged=3, paused="", wanted=10, done=3, open=1 + 1 + 2, flagged=1)
    assert store.progress(b).judged == 1
    with store.read() as session:
        from sqlalchemy import select

        from reward_model.labeling.schema import ItemRow

        ids = list(session.scalars(select(ItemRow.id).order_by(ItemRow.id)))
    moderation.retire(store, admin(store), ids[2])
    moderation.retire(store, admin(store), ids[0])
    assert store.progress() == Progress(judged=3, paused="", wanted=6, done=1, open=4, flagged=0)


def test_a_users_progress_has_totals_of_a_second_ago_at_most(
    project: Any, make_items: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reward_model.labeling import store as module

    store = project.open()
    user = store.ensure_user("a", role="annotator")
    assert store.progress(user).wanted == 0
    store.add_items(make_items(2))
    assert store.progress().wanted == 2
    monkeypatch.setattr(module, "TOTALS_MS", 0)
    assert store.progress(user).wanted == 2


def test_a_user_is_made_once(project: Any) -> None:
    store, other = project.open(), project.open()
    ann = store.ensure_user("ann", role="annotator")
    assert other.ensure_user("ann", role="admin") == ann
    assert store.ensure_user("Ann", role="annotator") != ann
    with pytest.raises(LabelError, match="taken by a person"):
        store.ensure_user("ann", role="annotator", labeler="judge")
    for name in ("", "x" * 65, "a\0"):
        with pytest.raises(LabelError, match="user name"):
            store.ensure_user(name, role="annotator")


def test_an_error_rolls_a_transaction_back(project: Any) -> None:
    from reward_model.labeling.schema import EventRow

    store = project.open()

    def fail() -> None:
        with store.begin() as session:
            session.add(EventRow(created_ms=1, user_id=None, kind="x", detail={}))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with store.read() as session:
        assert session.query(EventRow).count() == 0
    store.log_event(None, "after", {})
