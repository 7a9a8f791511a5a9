"""Which item comes next, before whom, and for how long; by hand, on both databases."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from sqlalchemy import text

from reward_model.labeling import accounts, moderation, serving
from reward_model.labeling.records import Answer
from rlhf.errors import LabelError, LeaseError

LEFT = Answer("compare", value=-1)


def people(store: Any, n: int) -> list[int]:
    return [store.ensure_user(f"person {number}", role="annotator") for number in range(n)]


def admin(store: Any) -> int:
    return store.ensure_user("admin", role="admin")


def prompts(project: Any, store: Any, user: int, n: int) -> list[Any]:
    return [project.judge(store, user)[0].prompt for _ in range(n)]


def test_a_task_holds_texts_alone(project: Any, make_items: Any) -> None:
    store = project.open(lease_minutes=3)
    store.add_items(make_items(1))
    (user,) = people(store, 1)
    task = store.next_task(user)
    assert (task.kind, task.prompt, task.previous) == ("pair", "p0", None)
    assert sorted(task.responses) == ["p0/0", "p0/1"]
    assert task.lease_expires_ms == project.clock.ms + 3 * 60_000
    assert set(vars(task)) == {
        "assignment_id", "item_id", "kind", "prompt", "responses", "lease_expires_ms", "previous", "passed_over",
    }  # fmt: skip


def test_the_most_urgent_item_comes_first_then_the_oldest(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(2))
    store.add_items(make_items(2, start=2, priority=5.0))
    store.add_items(make_items(1, start=4, priority=-1.0))
    store.add_items(make_items(1, start=5))
    (user,) = people(store, 1)
    assert prompts(project, store, user, 6) == ["p2", "p3", "p0", "p1", "p5", "p4"]
    assert store.next_task(user) is None


def test_an_item_goes_to_as_many_people_as_it_asks_for(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(2, wanted=2))
    a, b, c = people(store, 3)
    first = [store.next_task(user).prompt for user in (a, b, c)]
    assert first == ["p0", "p0", "p1"]  # two leases fill p0
    assert project.judge(store, a)[0].prompt == "p0"
    assert project.judge(store, a)[0].prompt == "p1"
    assert store.next_task(a) is None
    assert project.judge(store, b)[0].prompt == "p0"
    assert store.next_task(b) is None
    assert project.judge(store, c)[0].prompt == "p1"
    assert store.next_task(c) is None
    assert [*Counter(j.item_key for j in store.judgments()).values()] == [2, 2]


def test_asking_again_shows_the_same_and_starts_the_lease_anew(project: Any, make_items: Any) -> None:
    store = project.open(lease_minutes=20)
    store.add_items(make_items(3))
    (user,) = people(store, 1)
    task = store.next_task(user)
    project.clock.minutes(15)
    again = store.next_task(user)
    assert again.assignment_id == task.assignment_id
    assert again.responses == task.responses
    assert again.lease_expires_ms == task.lease_expires_ms + 15 * 60_000


def test_a_lease_that_ran_out_frees_the_place(project: Any, make_items: Any) -> None:
    store = project.open(lease_minutes=20)
    store.add_items(make_items(1))
    a, b = people(store, 2)
    late = store.next_task(a)
    project.clock.minutes(19.99)
    assert store.next_task(b) is None
    project.clock.minutes(0.01)
    task = store.next_task(b)
    assert task.prompt == "p0"
    with pytest.raises(LeaseError, match="no longer yours: others have judged"):
        store.submit(a, late.assignment_id, LEFT, "late")
    with pytest.raises(LeaseError):
        store.renew(a, late.assignment_id)
    store.submit(b, task.assignment_id, LEFT, "in time")
    assert [j.annotator for j in store.judgments()] == ["person 1"]
    assert store.next_task(a) is None


def test_a_late_answer_is_taken_while_the_place_is_free(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open(lease_minutes=20)
    store.add_items(make_items(1, wanted=2))
    a, b, c = people(store, 3)
    late = store.next_task(a)
    project.clock.minutes(30)
    assert store.next_task(b).prompt == "p0"  # a's lease is ended by this, and one place is left
    store.submit(a, late.assignment_id, LEFT, "late")
    assert store.next_task(c) is None
    assert len(standing(store)) == 1


def test_a_lease_that_ran_out_unnoticed_is_still_held(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open()
    store.add_items(make_items(1))
    (user,) = people(store, 1)
    task = store.next_task(user)
    project.clock.minutes(600)
    store.submit(user, task.assignment_id, LEFT, "next day")
    assert len(standing(store)) == 1


def test_who_let_a_lease_run_out_gets_the_item_in_the_same_order(project: Any, make_items: Any) -> None:
    store = project.open(lease_minutes=20)
    store.add_items(make_items(1))
    (user,) = people(store, 1)
    before = store.next_task(user)
    project.clock.minutes(60)
    after = store.next_task(user)
    assert (after.assignment_id, after.responses) == (before.assignment_id, before.responses)
    assert after.lease_expires_ms == project.clock.ms + 20 * 60_000


def test_a_sign_of_life_keeps_the_item(project: Any, make_items: Any) -> None:
    store = project.open(lease_minutes=20)
    store.add_items(make_items(1))
    a, b = people(store, 2)
    task = store.next_task(a)
    project.clock.minutes(15)
    assert store.renew(a, task.assignment_id) == project.clock.ms + 20 * 60_000
    project.clock.minutes(15)
    assert store.next_task(b) is None
    store.submit(a, task.assignment_id, LEFT, "x")
    with pytest.raises(LabelError, match="judged this item"):
        store.renew(a, task.assignment_id)


def test_a_sign_of_life_takes_a_free_place_back(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open(lease_minutes=20)
    store.add_items(make_items(2))
    a, b = people(store, 2)
    task = store.next_task(a)
    assert store.next_task(b).prompt == "p1"
    project.clock.minutes(30)
    assert store.next_task(b).prompt == "p0"  # both ran out; b gets the first one
    with pytest.raises(LeaseError):
        store.renew(a, task.assignment_id)
    project.judge(store, b, Answer("skip"))
    store.renew(a, task.assignment_id)
    assert store.next_task(a).prompt == "p0"
    standing(store)


def test_sides_of_an_item_alternate_over_its_annotators(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(10, wanted=4))
    for user in people(store, 4):
        prompts(project, store, user, 10)
    orders = Counter((j.item_key, *j.order) for j in store.judgments())
    assert set(orders.values()) == {2}
    assert len(orders) == 20


def test_an_annotators_sides_even_out_on_fresh_items(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(41))
    for user, n in zip(people(store, 2), (20, 21), strict=True):
        prompts(project, store, user, n)
    for name, n in (("person 0", 20), ("person 1", 21)):
        swapped = [j.order == [1, 0] for j in store.judgments() if j.annotator == name]
        assert abs(2 * sum(swapped) - n) <= 1
        assert all(sum(swapped[:k]) - k / 2 in (-0.5, 0, 0.5) for k in range(n))


def test_a_skipped_order_does_not_count(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(1, wanted=2))
    a, b, c = people(store, 3)
    skipped, _ = project.judge(store, a, Answer("skip"))
    first, _ = project.judge(store, b)
    second, _ = project.judge(store, c)
    assert first.responses == second.responses[::-1]
    assert skipped.responses == first.responses  # the item's first order is free again


def test_a_ranking_shows_every_response_at_every_place(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(1, K=4, wanted=4))
    shown = []
    for user in people(store, 4):
        shown.append(project.judge(store, user, Answer("rank", ranks=[1, 2, 3, 3]))[0].responses)
    for place in range(4):
        assert sorted(responses[place] for responses in shown) == ["p0/0", "p0/1", "p0/2", "p0/3"]


def test_skip_and_flag_free_the_place_and_the_item_does_not_come_back(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(3))
    a, b = people(store, 2)
    assert project.judge(store, a, Answer("skip"))[0].prompt == "p0"
    assert project.judge(store, a, Answer("flag"))[0].prompt == "p1"
    assert store.next_task(a).prompt == "p2"
    assert project.judge(store, b)[0].prompt == "p0"
    assert store.next_task(b) is None  # p1 is held back, p2 is before a
    assert list(store.item_states().values()) == ["full", "flagged", "full"]


def test_an_admin_reopens_or_retires_a_flagged_item(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open()
    store.add_items(make_items(2))
    a, b = people(store, 2)
    first, _ = project.judge(store, a, Answer("flag"))
    second, _ = project.judge(store, a, Answer("flag"))
    assert store.next_task(b) is None
    moderation.reopen(store, admin(store), first.item_id)
    moderation.retire(store, admin(store), second.item_id)
    assert store.next_task(a) is None
    assert project.judge(store, b)[0].prompt == "p0"
    assert store.next_task(b) is None
    assert list(store.item_states().values()) == ["full", "retired"]
    moderation.reopen(store, admin(store), first.item_id)
    assert list(store.item_states().values()) == ["full", "retired"]  # nothing left to give
    standing(store)
    with pytest.raises(LabelError, match="no item 99"):
        moderation.reopen(store, admin(store), 99)


def test_work_on_an_item_that_is_flagged_meanwhile_is_kept(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open(lease_minutes=20)
    store.add_items(make_items(1, wanted=3))
    a, b, c = people(store, 3)
    held, late = store.next_task(a), store.next_task(b)
    project.clock.minutes(10)
    store.renew(a, held.assignment_id)
    project.clock.minutes(10)
    project.judge(store, c, Answer("flag"))
    store.submit(a, held.assignment_id, LEFT, "held")
    store.submit(b, late.assignment_id, LEFT, "late")
    assert list(store.item_states().values()) == ["flagged"]
    assert sum(j.decides for j in standing(store)) == 2


def test_late_work_on_a_retired_item_is_refused(project: Any, make_items: Any) -> None:
    store = project.open(lease_minutes=20)
    store.add_items(make_items(1))
    a, b = people(store, 2)
    late = store.next_task(a)
    project.clock.minutes(30)
    moderation.retire(store, admin(store), late.item_id)
    assert store.next_task(b) is None
    with pytest.raises(LeaseError, match="the item is retired"):
        store.submit(a, late.assignment_id, LEFT, "late")


def test_gold_questions_come_by_their_share_to_everybody(project: Any, make_items: Any) -> None:
    store = project.open(gold={"fraction": 0.25, "after": 100})
    store.add_items(make_items(60, wanted=3))
    store.add_items(make_items(10, start=60, gold_ranks=[1, 2]))
    golden = {item.key for item in store.items() if item.gold_ranks}
    for user in people(store, 3):
        prompts(project, store, user, 20)
        own = [j.item_key in golden for j in store.judgments() if j.annotator == f"person {user - 1}"]
        assert [sum(own[start : start + 4]) for start in range(0, 20, 4)] == [1] * 5
    assert max(Counter(j.item_key for j in store.judgments()).values()) == 3
    assert {store.item_states()[key] for key in golden} == {"open"}


def test_gold_questions_alone_are_not_served_when_used_up(project: Any, make_items: Any) -> None:
    store = project.open(gold={"fraction": 0.5, "after": 100})
    store.add_items(make_items(6))
    store.add_items(make_items(1, start=6, gold_ranks=[1, 2]))
    (user,) = people(store, 1)
    assert sorted(prompts(project, store, user, 7)) == ["p0", "p1", "p2", "p3", "p4", "p5", "p6"]
    assert store.next_task(user) is None


def repeats_of(store: Any) -> dict[str, tuple[int, int]]:
    """By item: at which places of the series it came."""
    places: dict[str, list[int]] = {}
    for place, judgment in enumerate(store.judgments()):
        places.setdefault(judgment.item_key, []).append(place)
    return {key: (found[0], found[1]) for key, found in places.items() if len(found) == 2}


def test_repeats_come_back_swapped_and_take_no_place(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open(repeat_fraction=0.3, repeat_after=5)
    store.add_items(make_items(60))
    (user,) = people(store, 1)
    while store.next_task(user):
        project.judge(store, user)
    judgments = standing(store)
    repeated = repeats_of(store)
    assert 8 <= len(repeated) <= 28
    for first, second in repeated.values():
        assert judgments[first].presentation == 0
        assert judgments[second].presentation == 1
        assert judgments[second].order == judgments[first].order[::-1]
        assert sum(j.presentation == 0 for j in judgments[first + 1 : second]) >= 5
        assert second - first <= 5 + 15
    assert store.progress().done == store.progress().wanted == 60
    assert store.progress(user).judged == 60 + len(repeated)


def test_every_pair_is_repeated_where_the_share_is_one(project: Any, make_items: Any) -> None:
    store = project.open(repeat_fraction=1, repeat_after=2)
    store.add_items(make_items(5))
    (user,) = people(store, 1)
    series = []
    while store.next_task(user):
        series.append(project.judge(store, user)[0].prompt)
    assert series == ["p0", "p1", "p2", "p0", "p3", "p1", "p4", "p2"]  # p3 and p4 have too few items after them


def test_only_pairs_that_were_decided_are_repeated(project: Any, make_items: Any) -> None:
    store = project.open(repeat_fraction=1, repeat_after=1, gold={"fraction": 0.5, "after": 100})
    store.add_items(make_items(2))
    store.add_items(make_items(2, start=2, K=3))
    store.add_items(make_items(4, start=4, gold_ranks=[1, 2]))
    (user,) = people(store, 1)
    for _ in range(8):
        task = store.next_task(user)
        if task is not None:
            answer = Answer("rank", ranks=[1, 2, 3]) if task.kind == "ranking" else LEFT
            project.judge(store, user, Answer("skip") if task.prompt == "p0" else answer)
    assert [j.presentation for j in store.judgments() if j.presentation] == [1]
    (again,) = (j for j in store.judgments() if j.presentation)
    assert again.item_key == store.items()[1].key


def test_a_repeat_whose_item_is_flagged_does_not_come(project: Any, make_items: Any) -> None:
    store = project.open(repeat_fraction=1, repeat_after=1)
    store.add_items(make_items(2, wanted=2))
    a, b = people(store, 2)
    project.judge(store, a)
    project.judge(store, b, Answer("flag"))
    assert prompts(project, store, a, 1) == ["p1"]
    assert store.next_task(a) is None


def test_a_repeat_that_was_left_comes_back(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open(repeat_fraction=1, repeat_after=1, lease_minutes=20)
    store.add_items(make_items(2))
    (user,) = people(store, 1)
    assert prompts(project, store, user, 2) == ["p0", "p1"]
    task = store.next_task(user)
    assert task.prompt == "p0"
    project.clock.minutes(30)
    assert store.next_task(user) == type(task)(**{**vars(task), "lease_expires_ms": project.clock.ms + 1_200_000})
    project.judge(store, user)
    assert [j.presentation for j in standing(store)] == [0, 0, 1]


def test_who_is_paused_or_switched_off_gets_nothing(project: Any, make_items: Any) -> None:
    from reward_model.labeling.schema import UserRow

    store = project.open()
    store.add_items(make_items(1))
    a, b = people(store, 2)
    with store.begin() as session:
        session.get_one(UserRow, a).paused = "because"
        session.get_one(UserRow, b).active = False
    assert store.next_task(a) is None
    assert store.next_task(b) is None
    accounts.unpause(store, admin(store), a)
    assert store.next_task(a).prompt == "p0"


def test_unknown_users_and_assignments(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(1))
    a, b = people(store, 2)
    task = store.next_task(a)
    for call in (
        lambda: store.next_task(99),
        lambda: store.submit(99, task.assignment_id, LEFT, "x"),
        lambda: store.undo(99),
        lambda: store.renew(99, task.assignment_id),
        lambda: store.progress(99),
    ):
        with pytest.raises(LabelError, match="no user 99"):
            call()
    for call in (
        lambda: store.submit(b, task.assignment_id, LEFT, "x"),
        lambda: store.renew(b, task.assignment_id),
        lambda: store.submit(a, 99, LEFT, "x"),
    ):
        with pytest.raises(LabelError, match="is not yours"):
            call()


def test_the_next_item_is_found_by_an_index(project: Any, make_items: Any) -> None:
    """Not by a look at all items, and not by sorting them."""
    store = project.open()
    store.add_items(make_items(2000, wanted=3))
    user = people(store, 1)[0]
    prompts(project, store, user, 3)
    query = serving.NEXT.params(user=user, gold=False).compile(store.engine, compile_kwargs={"literal_binds": True})
    sqlite = store.engine.dialect.name == "sqlite"
    with store.begin() as session:
        session.execute(text("ANALYZE"))
        plan = "\n".join(str(row) for row in session.execute(text(f"EXPLAIN {'QUERY PLAN' if sqlite else ''} {query}")))
    assert "ix_items_serving" in plan, plan
    for slow in ("SCAN", "TEMP B-TREE", "Seq Scan on items", "Sort"):
        assert slow not in plan, plan


def test_an_answer_with_the_next_item_is_an_answer_and_then_the_next_item(
    project: Any, make_items: Any, standing: Any
) -> None:
    """Through repeats, gold questions, a lease that ran out, clicks sent twice, to the end."""
    keys = {
        "gold": {"fraction": 0.3, "pause_below": 0.0},
        "repeat_fraction": 0.5,
        "repeat_after": 2,
        "lease_minutes": 1,
    }
    store = project.open(**keys)
    store.add_items(make_items(6))
    store.add_items(make_items(2, start=6, gold_ranks=[1, 2]))
    user, away = people(store, 2)
    left = store.next_task(away).prompt
    task, seen = store.next_task(user), []
    while task is not None:
        seen.append(task.prompt)
        project.clock.minutes(0.2)  # after five of them, what was left lying comes free
        click = (user, task.assignment_id, LEFT, f"click{len(seen)}")
        receipt, task = store.submit_and_next(*click)
        assert task == store.next_task(user)
        again, same = store.submit_and_next(*click)
        assert (again.judgment_id, again.repeated, same) == (receipt.judgment_id, True, task)
    assert left in seen
    assert len(standing(store)) == len(seen) > len(set(seen)) >= 6


def test_a_refused_answer_brings_no_item(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(2))
    (user,) = people(store, 1)
    task, _ = project.judge(store, user)
    with pytest.raises(LeaseError, match="judged this item already"):
        store.submit_and_next(user, task.assignment_id, LEFT, "another")
    with store.read() as session:
        assert session.scalar(text("SELECT count(*) FROM assignments")) == 1


def test_who_fails_a_gold_question_gets_no_item_with_the_answer(project: Any, make_items: Any) -> None:
    store = project.open(gold={"fraction": 1.0, "after": 1, "pause_below": 1.0})
    store.add_items(make_items(2, gold_ranks=[1, 2]))
    (user,) = people(store, 1)
    task = store.next_task(user)
    wrong = Answer("compare", value=1 if task.responses[0] == f"{task.prompt}/0" else -1)
    receipt, following = store.submit_and_next(user, task.assignment_id, wrong, "wrong")
    assert receipt.paused
    assert following is None
