"""What is stored of a click, what is refused, and what undo and gold questions do; by hand, on both databases."""

from __future__ import annotations

from typing import Any

import pytest

from reward_model.labeling import accounts, figures, moderation
from reward_model.labeling.answers import check_answer
from reward_model.labeling.records import Answer
from rlhf.errors import LabelError, LeaseError

LEFT = Answer("compare", value=-1)


def fails(field: str, answer: Answer, kind: str = "pair", K: int = 2) -> None:
    with pytest.raises(LabelError, match=f"^{field}: ") as caught:
        check_answer(answer, kind, K)
    assert caught.value.fix


@pytest.mark.parametrize("value", [-3, -1, 0, 3])
def test_a_pair_takes_strengths(value: int) -> None:
    check_answer(Answer("compare", value=value, confidence=5, notes="x" * 2000, ms_active=2**31 - 1), "pair", 2)


@pytest.mark.parametrize("value", [-4, 4, None, 1.0, "1", True])
def test_other_strengths_are_refused(value: Any) -> None:
    fails("value", Answer("compare", value=value))


def test_a_pair_may_be_ranked_where_no_strength_is_known() -> None:
    check_answer(Answer("rank", ranks=[2, 1]), "pair", 2)


@pytest.mark.parametrize("ranks", [[1, 2, 3], [3, 1, 2], [1, 1, 1], [1, 2, 2], [2, 1, 1]])
def test_a_ranking_takes_dense_ranks(ranks: list[int]) -> None:
    check_answer(Answer("rank", ranks=ranks), "ranking", 3)


@pytest.mark.parametrize(
    "ranks",
    [None, [], [1, 2], [1, 2, 3, 4], [0, 1, 2], [1, 3, 3], [2, 2, 2], [1, 2, True], [1.0, 2, 3], "123"],
)
def test_other_ranks_are_refused(ranks: Any) -> None:
    fails("ranks", Answer("rank", ranks=ranks), "ranking", 3)


def test_what_does_not_belong_to_a_choice_is_refused() -> None:
    fails("ranks", Answer("rank", ranks=[1, 2, 3]))
    fails("choice", Answer("compare", value=1), "ranking", 3)
    fails("choice", Answer("undo"))
    fails("choice", Answer("both"))  # type: ignore[arg-type]
    fails("ranks", Answer("compare", value=1, ranks=[1, 2]))
    fails("value", Answer("skip", value=1))
    fails("value", Answer("rank", value=1, ranks=[1, 2, 3]), "ranking", 3)
    fails("ranks", Answer("flag", ranks=[1, 2]))


@pytest.mark.parametrize("confidence", [0, 6, 2.5, True, "3"])
def test_confidence_is_one_to_five(confidence: Any) -> None:
    fails("confidence", Answer("compare", value=1, confidence=confidence))


@pytest.mark.parametrize("ms", [-1, 2**31, 1.5, None, True])
def test_time_is_a_whole_number_of_milliseconds(ms: Any) -> None:
    fails("ms_active", Answer("compare", value=1, ms_active=ms))


@pytest.mark.parametrize("notes", ["x" * 2001, "a\0b", "\ud800", None, 3])
def test_notes_are_plain_text_of_bounded_length(notes: Any) -> None:
    fails("notes", Answer("compare", value=1, notes=notes))


def person(store: Any, name: str = "ann") -> int:
    return store.ensure_user(name, role="annotator")


def admin(store: Any) -> int:
    return store.ensure_user("admin", role="admin")


def test_every_field_is_stored_as_clicked(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items([*make_items(3), *make_items(1, start=3, K=3)])
    user = person(store)
    answers = [
        Answer("compare", value=-3, confidence=4, notes="Grüße, 世界 \U0001f600 </script>\n'; --", ms_active=12_345),
        Answer("both_bad", notes="no"),
        Answer("compare", value=0),
        Answer("rank", ranks=[2, 1, 2], confidence=1),
    ]
    for answer in answers:
        project.judge(store, user, answer)
    stored = store.judgments()
    assert [j.answer for j in stored] == answers
    assert [(j.annotator, j.labeler, j.presentation, j.supersedes) for j in stored] == [("ann", "person", 0, None)] * 4
    assert [j.created_ms for j in stored] == [project.clock.ms - 3 + k for k in range(4)]


def test_canonical_values_follow_the_order_shown(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(2, wanted=2))
    for name in ("ann", "bob"):
        for _ in range(2):
            task = store.next_task(person(store, name))
            # Everybody finds "…/1" two points better, wherever it stands.
            value = 2 if task.responses[1].endswith("/1") else -2
            project.judge(store, person(store, name), Answer("compare", value=value))
    assert [j.value for j in store.judgments()] == [2] * 4
    assert [j.ranks for j in store.judgments()] == [[2, 1]] * 4
    assert sorted(j.answer.value for j in store.judgments()) == [-2, -2, 2, 2]


def test_policies_are_told_after_the_judgment_by_place(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(1, K=5))
    user = person(store)
    task = store.next_task(user)
    receipt = store.submit(user, task.assignment_id, Answer("skip"), "x")
    assert receipt.policies == ["ABCDE"[int(text[-1])] for text in task.responses]
    assert not receipt.repeated
    assert receipt.paused == ""


def test_the_same_click_sent_twice_is_stored_once(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open()
    store.add_items(make_items(2, wanted=2))
    a, b = person(store, "a"), person(store, "b")
    task = store.next_task(a)
    first = store.submit(a, task.assignment_id, LEFT, "click")
    again = store.submit(a, task.assignment_id, Answer("compare", value=3), "click")
    assert again.judgment_id == first.judgment_id
    assert again.repeated
    assert again.policies == first.policies
    assert [j.answer for j in standing(store)] == [LEFT]
    with pytest.raises(LeaseError, match="judged this item already"):
        store.submit(a, task.assignment_id, LEFT, "another click")
    other = store.next_task(b)
    with pytest.raises(LabelError, match="submission_id: another judgment has it"):
        store.submit(b, other.assignment_id, LEFT, "click")
    for wrong in ("", "x" * 65, "a\0"):
        with pytest.raises(LabelError, match="submission_id: empty"):
            store.submit(b, other.assignment_id, LEFT, wrong)
    assert len(standing(store)) == 1


def test_an_answer_that_does_not_fit_leaves_the_item_before_its_annotator(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(1, K=3))
    user = person(store)
    task = store.next_task(user)
    with pytest.raises(LabelError, match="choice"):
        store.submit(user, task.assignment_id, LEFT, "x")
    assert store.judgments() == []
    assert store.next_task(user) == task
    assert store.progress(user).judged == 0


def test_undo_withdraws_by_a_row_and_brings_the_item_back(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open()
    store.add_items(make_items(3))
    user = person(store)
    task, first = project.judge(store, user, Answer("compare", value=2, notes="hm"))
    pushed_aside = store.next_task(user)
    project.clock.ms += 1
    back = store.undo(user)
    assert (back.assignment_id, back.responses) == (task.assignment_id, task.responses)
    assert back.previous == Answer("compare", value=2, notes="hm")
    assert standing(store) == []
    assert store.next_task(user) == back
    project.clock.ms += 1
    second = store.submit(user, task.assignment_id, LEFT, "second").judgment_id
    rows = store.judgments(effective=False)
    assert [(j.id, j.answer.choice, j.supersedes) for j in rows] == [
        (first, "compare", None),
        (rows[1].id, "undo", first),
        (second, "compare", rows[1].id),
    ]
    assert [j.answer for j in standing(store)] == [LEFT]
    assert store.next_task(user).assignment_id == pushed_aside.assignment_id
    assert store.progress(user).judged == 1


def test_undo_goes_back_one_judgment_after_the_other(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open()
    store.add_items(make_items(4))
    user = person(store)
    for _ in range(3):
        project.judge(store, user)
    series = []
    for _ in range(3):
        project.clock.ms += 1
        series.append(store.undo(user).prompt)
    assert series == ["p2", "p1", "p0"]
    assert store.undo(user) is None
    assert standing(store) == []
    assert [project.judge(store, user)[0].prompt for _ in range(4)] == ["p0", "p1", "p2", "p3"]
    assert [j.item_key for j in standing(store)] == [item.key for item in store.items()]


def test_undo_knows_one_annotator_alone(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(1, wanted=2))
    a, b = person(store, "a"), person(store, "b")
    project.judge(store, a)
    assert store.undo(b) is None
    project.judge(store, b)
    assert store.undo(a).prompt == "p0"
    assert [j.annotator for j in store.judgments()] == ["b"]


def test_an_item_that_came_back_by_undo_keeps_its_place(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open(lease_minutes=20)
    store.add_items(make_items(1))
    a, b = person(store, "a"), person(store, "b")
    project.judge(store, a)
    store.undo(a)
    assert store.next_task(b) is None
    project.clock.minutes(30)
    assert store.next_task(b).prompt == "p0"  # a left without a new answer
    assert store.next_task(a) is None
    standing(store)


def test_undo_of_a_skip_needs_a_free_place(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open()
    store.add_items(make_items(2))
    a, b = person(store, "a"), person(store, "b")
    project.judge(store, a, Answer("skip"))
    assert store.undo(a).prompt == "p0"
    project.judge(store, a, Answer("skip"))
    assert store.next_task(b).prompt == "p0"
    with pytest.raises(LeaseError, match="cannot come back: others have judged it") as caught:
        store.undo(a)
    assert caught.value.fix == "go on with the next item"
    assert [j.answer.choice for j in standing(store)] == ["skip"]


def test_undo_passes_over_a_skip_whose_item_others_have(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open()
    store.add_items(make_items(4))
    a, b = person(store, "a"), person(store, "b")
    project.judge(store, a, Answer("compare", value=2))
    for choice in ("skip", "flag"):
        project.judge(store, a, Answer(choice))
    task, _ = project.judge(store, b)
    assert task.prompt == "p1"
    moderation.retire(store, admin(store), task.item_id + 1)
    back = store.undo(a)
    assert (back.prompt, back.previous, back.passed_over) == ("p0", Answer("compare", value=2), 2)
    assert [j.answer.choice for j in standing(store) if j.annotator == "a"] == ["skip", "flag"]
    assert store.next_task(a).passed_over == 0, "said once"
    store.submit(a, back.assignment_id, Answer("compare", value=-2), "again")
    assert store.undo(a).passed_over == 0, "what was judged since comes first"
    standing(store)


def test_undo_of_a_flag_takes_the_flag_back(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open()
    store.add_items(make_items(1, wanted=3))
    a, b, c = (person(store, name) for name in "abc")
    project.judge(store, a, Answer("flag"))
    assert store.undo(a).prompt == "p0"
    assert list(store.item_states().values()) == ["open"]
    store.next_task(b)
    project.judge(store, a, Answer("flag"))
    project.judge(store, b, Answer("flag"))
    store.undo(a)
    assert list(store.item_states().values()) == ["flagged"]  # b's stands
    assert store.next_task(c) is None
    standing(store)


def test_undo_of_a_flag_does_not_undo_an_admins_decision(project: Any, make_items: Any) -> None:
    store = project.open()
    store.add_items(make_items(1))
    user = person(store)
    task, _ = project.judge(store, user, Answer("flag"))
    moderation.retire(store, admin(store), task.item_id)
    with pytest.raises(LeaseError, match="an admin has taken it out"):
        store.undo(user)
    assert list(store.item_states().values()) == ["retired"]


def test_a_flag_that_an_admin_settled_no_longer_counts(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open()
    store.add_items(make_items(1, wanted=3))
    a, b = person(store, "a"), person(store, "b")
    task, _ = project.judge(store, a, Answer("flag", notes="settled"))
    moderation.reopen(store, admin(store), task.item_id)
    project.judge(store, b, Answer("flag", notes="open"))
    with store.read() as session:
        (item,) = figures.flagged_items(session)
    assert item.notes == [("b", "open")]
    assert store.undo(b).prompt == "p0"
    assert list(store.item_states().values()) == ["open"], "a's flag was settled"
    standing(store)


def test_an_undone_pair_is_not_repeated(project: Any, make_items: Any) -> None:
    store = project.open(repeat_fraction=1, repeat_after=1)
    store.add_items(make_items(3))
    user = person(store)
    project.judge(store, user)
    store.undo(user)
    project.judge(store, user, Answer("skip"))
    assert [project.judge(store, user)[0].prompt for _ in range(2)] == ["p1", "p2"]
    assert project.judge(store, user)[0].prompt == "p1"
    assert store.next_task(user) is None


def test_a_repeat_can_be_undone(project: Any, make_items: Any, standing: Any) -> None:
    store = project.open(repeat_fraction=1, repeat_after=1)
    store.add_items(make_items(2))
    user = person(store)
    for _ in range(3):
        project.judge(store, user)
    assert [j.presentation for j in standing(store)] == [0, 0, 1]
    task = store.undo(user)
    assert task.prompt == "p0"
    project.judge(store, user, Answer("skip"))
    assert [(j.presentation, j.answer.choice) for j in standing(store)] == [
        (0, "compare"), (0, "compare"), (1, "skip"),
    ]  # fmt: skip
    assert store.progress().done == 2


def right(task: Any) -> Answer:
    return Answer("compare", value=-1 if task.responses[0].endswith("/0") else 1)


def wrong(task: Any) -> Answer:
    return Answer("compare", value=-right(task).value)


@pytest.fixture
def gold_project(project: Any, make_items: Any) -> Any:
    """Every item is a gold question; 60% of the last five must be right."""
    store = project.open(gold={"fraction": 1.0, "after": 5, "pause_below": 0.6})
    store.add_items(make_items(30, gold_ranks=[1, 2]))
    return store


def answer_gold(project: Any, store: Any, user: int, series: str) -> str:
    """Right (r), wrong (w), tie (t) and skip (s), until paused; what the last receipt says."""
    paused = ""
    for letter in series:
        task = store.next_task(user)
        answer = {"r": right, "w": wrong, "t": lambda _: Answer("compare", value=0), "s": lambda _: Answer("skip")}
        project.clock.ms += 1
        receipt = store.submit(user, task.assignment_id, answer[letter](task), f"{user}-{task.assignment_id}-{letter}")
        paused = receipt.paused
    return paused


@pytest.mark.parametrize(
    ("series", "right_ones"), [("wwrrr", None), ("wwwrr", 2), ("wwww", None), ("rrrrrrwwr", None), ("rrrrrrwww", 2)]
)
def test_who_fails_gold_questions_is_paused(project: Any, gold_project: Any, series: str, right_ones: Any) -> None:
    user = person(gold_project)
    paused = answer_gold(project, gold_project, user, series)
    if right_ones is None:
        assert paused == gold_project.progress(user).paused == ""
        assert gold_project.next_task(user) is not None
    else:
        assert paused == f"{right_ones} of your last 5 answers to control questions were right"
        assert gold_project.progress(user).paused == paused
        assert gold_project.next_task(user) is None
        with pytest.raises(LabelError, match="nothing can be undone"):
            gold_project.undo(user)


def test_a_tie_is_wrong_and_a_skip_is_no_answer(project: Any, gold_project: Any) -> None:
    assert answer_gold(project, gold_project, person(gold_project, "a"), "sswwsrr") == ""
    assert answer_gold(project, gold_project, person(gold_project, "b"), "ttrtr").startswith("2 of")


def test_an_undone_gold_answer_does_not_count(project: Any, gold_project: Any) -> None:
    user = person(gold_project)
    assert answer_gold(project, gold_project, user, "wwrr") == ""
    project.clock.ms += 1
    gold_project.undo(user)
    project.clock.ms += 1
    assert answer_gold(project, gold_project, user, "w") == ""  # four answers
    assert answer_gold(project, gold_project, user, "r").startswith("2 of")


def test_an_admin_lets_a_paused_annotator_start_afresh(project: Any, gold_project: Any) -> None:
    a, b = person(gold_project, "a"), person(gold_project, "b")
    assert answer_gold(project, gold_project, a, "wwwww")
    accounts.unpause(gold_project, admin(gold_project), a)
    project.clock.ms += 5
    assert answer_gold(project, gold_project, a, "wwrr") == ""
    assert answer_gold(project, gold_project, a, "w").startswith("2 of")
    assert answer_gold(project, gold_project, b, "rrrrr") == ""


def test_a_pause_is_in_the_log(project: Any, gold_project: Any) -> None:
    from sqlalchemy import select

    from reward_model.labeling.schema import EventRow

    user = person(gold_project)
    answer_gold(project, gold_project, user, "wwwww")
    gold_project.log_event(None, "started", {"port": 1})
    with gold_project.read() as session:
        events = [(e.user_id, e.kind, e.detail) for e in session.scalars(select(EventRow).order_by(EventRow.id))]
    assert events == [(user, "paused", {"right": 0, "of": 5}), (None, "started", {"port": 1})]
