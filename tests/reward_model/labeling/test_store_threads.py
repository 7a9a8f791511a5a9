"""Fifty annotators at once: no item is over-assigned, nothing is lost, nothing is stored twice."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select

from reward_model.labeling.records import Answer
from reward_model.labeling.schema import ItemRow
from reward_model.labeling.store import LabelStore
from rlhf.errors import LeaseError


def work(stores: list[LabelStore], number: int, start: threading.Barrier) -> dict[str, tuple[str, int]]:
    """Labels until nothing is left; what was clicked, by submission. Some clicks are sent twice.

    Half of them take the next item with the answer, as the page does, half ask for it.
    """
    rng = random.Random(number)
    store = stores[number % len(stores)]
    user = store.ensure_user(f"annotator {number}", role="annotator")
    clicked: dict[str, tuple[str, int]] = {}
    start.wait()
    task = store.next_task(user)
    while task is not None:
        value = rng.randint(1, 3)
        submission = f"{number}/{len(clicked)}"
        click = (user, task.assignment_id, Answer("compare", value=value), submission)
        receipts = [store.submit(*click)] if rng.random() < 0.2 else []
        clicked[submission] = (str(task.prompt), value)
        if number % 4 < 2:
            receipt, task = store.submit_and_next(*click)
        else:
            receipt, task = store.submit(*click), store.next_task(user)
        assert {one.judgment_id for one in receipts} <= {receipt.judgment_id}
    return clicked


def run(stores: list[LabelStore], annotators: int) -> dict[str, tuple[str, int]]:
    start = threading.Barrier(annotators)
    with ThreadPoolExecutor(annotators) as pool:
        parts = list(pool.map(lambda number: work(stores, number, start), range(annotators)))
    return {submission: click for part in parts for submission, click in part.items()}


@pytest.mark.parametrize(("items", "wanted"), [(30, 3), (3, 20)])
def test_fifty_annotators_at_once(project: Any, make_items: Any, standing: Any, items: int, wanted: int) -> None:
    """Two stores on one database, as two server processes have them, 25 threads on each."""
    stores = [project.open(lease_minutes=600), project.open(lease_minutes=600)]
    stores[0].add_items(make_items(items, wanted=wanted))
    prompts = {item.key: item.prompt for item in stores[0].items()}
    clicked = run(stores, 50)
    judgments = standing(stores[0])
    assert Counter(j.item_key for j in judgments) == dict.fromkeys(prompts, wanted)
    assert len({(j.item_key, j.annotator) for j in judgments}) == len(judgments) == len(clicked) == items * wanted
    assert len(stores[0].judgments(effective=False)) == len(judgments)
    assert Counter((prompts[j.item_key], j.answer.value) for j in judgments) == Counter(clicked.values())
    orders = Counter((j.item_key, j.order[0]) for j in judgments)
    assert all(abs(orders[key, 0] - orders[key, 1]) <= 1 for key in prompts)


def test_a_last_place_goes_to_one_of_fifty(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(1))
    users = [store.ensure_user(f"a{number}", role="annotator") for number in range(50)]
    with ThreadPoolExecutor(50) as pool:
        tasks = [task for task in pool.map(store.next_task, users) if task is not None]
    assert len(tasks) == 1


def test_a_gold_question_that_is_locked_just_now_is_waited_for(project: Any, make_items: Any) -> None:
    store = project.open(gold={"fraction": 1.0, "pause_below": 0.0})
    store.add_items([*make_items(1), *make_items(2, start=1, gold_ranks=[1, 2])])
    user = store.ensure_user("a", role="annotator")
    first = store.next_task(user)
    with store.read() as session:
        gold = session.scalars(select(ItemRow.id).where(ItemRow.is_gold)).all()
    (other,) = {*gold} - {first.item_id}
    with ThreadPoolExecutor(1) as pool:
        with store.begin() as session:
            session.execute(select(ItemRow).where(ItemRow.id == other).with_for_update())
            click = (user, first.assignment_id, Answer("compare", value=1), "click")
            following = pool.submit(store.submit_and_next, *click)
            time.sleep(0.5)
        assert following.result()[1].item_id == other


def test_late_answers_for_one_free_place(project: Any, make_items: Any, standing: Any) -> None:
    """Twenty leases of one item ran out; of twenty late answers at once, as many are taken as were asked for."""
    store = project.open(lease_minutes=20)
    store.add_items(make_items(1, wanted=20))
    users = [store.ensure_user(f"a{number}", role="annotator") for number in range(20)]
    tasks = [store.next_task(user) for user in users]
    project.clock.minutes(30)
    other = store.ensure_user("other", role="annotator")
    assert store.next_task(other) is not None  # sweeps the twenty
    with store.begin() as session:
        session.scalars(select(ItemRow)).one().wanted = 5

    def late(number: int) -> bool:
        try:
            store.submit(users[number], tasks[number].assignment_id, Answer("compare", value=1), f"late {number}")
        except LeaseError:
            return False
        return True

    with ThreadPoolExecutor(20) as pool:
        assert sum(pool.map(late, range(20))) == 4
    assert len(standing(store)) == 4


def test_two_windows_of_one_annotator_see_one_task(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(20))
    user = store.ensure_user("a", role="annotator")
    with ThreadPoolExecutor(10) as pool:
        tasks = list(pool.map(lambda _: store.next_task(user), range(10)))
    assert len({task.assignment_id for task in tasks}) == 1


def test_one_click_from_many_sides_is_stored_once(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open()
    store.add_items(make_items(1))
    user = store.ensure_user("a", role="annotator")
    task = store.next_task(user)
    answer = Answer("compare", value=1)
    with ThreadPoolExecutor(10) as pool:
        receipts = list(pool.map(lambda _: store.submit(user, task.assignment_id, answer, "click"), range(10)))
    assert sorted(receipt.repeated for receipt in receipts) == [False] + [True] * 9
    assert len(standing(store)) == 1


def test_items_that_two_bring_at_once_are_added_once(project: Any, make_items: Any) -> None:
    stores = [project.open() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        added = list(pool.map(lambda store: store.add_items(make_items(50)), stores))
    assert sum(one.new for one in added) == 50
    assert len(stores[0].items()) == 50


def test_a_database_that_many_open_at_once_is_made_once(project: Any) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: project.open(), range(8)))
    ids = {store.ensure_user("a", role="annotator") for store in stores}
    assert len(ids) == 1


def test_a_name_that_many_take_at_once_is_one_user(project: Any) -> None:
    stores = [project.open() for _ in range(4)]
    with ThreadPoolExecutor(16) as pool:
        ids = set(pool.map(lambda k: stores[k % 4].ensure_user("a", role="annotator"), range(16)))
    assert len(ids) == 1
