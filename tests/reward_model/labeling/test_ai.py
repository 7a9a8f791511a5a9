"""`rlhf label ai`: what a judge says is stored as its judgments, in the orders that were shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, letters

from reward_model.labeling import ai, history, moderation
from reward_model.labeling.ai import noted, people_on
from reward_model.labeling.export import main as export
from reward_model.labeling.judge_votes import judge_wins, soft_wins
from reward_model.labeling.records import Answer, Candidate, Item, Judgment
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import LabelingStage
from rlhf.errors import ConfigError, DataError, JudgeError

TEXTS = ["a b c d e f g h", "a b c d e f g h i", "a b c d e f g h i j", "a b c d e f g h i j k"]


@pytest.fixture
def stage(judge_settings: Any, tmp_path: Path) -> Callable[..., LabelingStage]:
    """`stage(**judge)`: a project in SQLite with 5 pairs, the second response the better, and one ranking of 4."""

    def build(**changes: Any) -> LabelingStage:
        cfg = LabelingStage.model_validate({"run_dir": str(tmp_path / "project"), "judge": judge_settings(**changes)})
        pairs = [Item(f"p{i}", [Candidate(f"{i} {TEXTS[0]}"), Candidate(f"{i} {TEXTS[1]}")]) for i in range(5)]
        with LabelStore.open(cfg) as store:
            store.add_items([*pairs, Item("r", [Candidate(text) for text in TEXTS], kind="ranking")])
        return cfg

    return build


def judgments(cfg: LabelingStage, *, effective: bool = True) -> list[Judgment]:
    with LabelStore.open(cfg) as store:
        return store.judgments(effective=effective)


def saved_report(cfg: LabelingStage) -> dict[str, Any]:
    return json.loads((Path(cfg.run_dir) / "judge_report.json").read_text())


def test_both_orders_are_stored_as_they_were_shown(judge_server: JudgeServer, stage: Any) -> None:
    cfg = stage()
    ai.main(cfg)
    stored = judgments(cfg)
    assert {(j.annotator, j.labeler) for j in stored} == {("judge:judge-1", "judge")}
    assert [(j.presentation, j.order, j.answer.value, j.value) for j in stored[:2]] == [
        (0, [0, 1], 2, 2),
        (1, [1, 0], -2, 2),
    ]
    assert [(j.order, j.answer.ranks, j.ranks) for j in stored[10:]] == [
        ([0, 1, 2, 3], [4, 3, 2, 1], [4, 3, 2, 1]),
        ([3, 2, 1, 0], [1, 2, 3, 4], [4, 3, 2, 1]),
    ]
    assert saved_report(cfg)["counts"]["items_labeled"] == 6
    assert len(judge_server.asked) == 2 * 5 + 12


def test_probabilities_come_back_in_canonical_order(judge_server: JudgeServer, stage: Any) -> None:
    judge_server.judge = lambda first, second: letters(0.9 if len(first) > len(second) else 0.4)
    cfg = stage()
    ai.main(cfg)
    first, second = judgments(cfg)[:2]
    # Response 1 is the longer one: second at 0.4 for the first, then first at 0.9.
    assert [1 - (judge_wins(j) or {})[0, 1] for j in (first, second)] == pytest.approx([0.6, 0.9])
    assert [j.value for j in (first, second)] == [1, 2]  # 0.1 and 0.4 from one half, in sixths: 0.6 and 2.4


def test_the_same_command_again_stores_and_asks_nothing(judge_server: JudgeServer, stage: Any) -> None:
    cfg = stage()
    ai.main(cfg)
    before, asked = judgments(cfg, effective=False), len(judge_server.asked)
    ai.main(cfg)
    assert judgments(cfg, effective=False) == before
    assert len(judge_server.asked) == asked
    said = saved_report(cfg)
    assert (said["usage"]["requests"], said["usage"]["requests_this_run"]) == (asked, 0)


def test_other_criteria_supersede_and_may_come_back(judge_server: JudgeServer, stage: Any) -> None:
    cfg = stage()
    ai.main(cfg)
    was = [j.ranks for j in judgments(cfg)]
    judge_server.judge = lambda first, second: "A" if len(first) < len(second) else "B"
    other = stage(criteria="Shorter is better.")
    ai.main(other)
    now = judgments(other)
    assert len(now) == len(was)
    assert all(a != b for a, b in zip(was, [j.ranks for j in now], strict=True))
    ai.main(cfg)
    assert [j.ranks for j in judgments(cfg)] == was


def test_a_failure_leaves_an_item_without_any_judgment(judge_server: JudgeServer, stage: Any) -> None:
    judge_server.always = lambda first, second: "refusal" if first == f"2 {TEXTS[1]}" else None
    cfg = stage()
    ai.main(cfg)
    stored = judgments(cfg)
    assert len(stored) == 2 * 5
    with LabelStore.open(cfg) as store:
        assert store.items()[2].key not in {j.item_key for j in stored}
        assert store.progress().done == 0  # a machine takes no place of people
    assert saved_report(cfg)["failures"] == {"refusal": 1}


def test_where_a_judge_fails_its_answer_by_other_criteria_does_not_stand(judge_server: JudgeServer, stage: Any) -> None:
    cfg = stage()
    ai.main(cfg)
    was = [(j.item_key, j.ranks) for j in judgments(cfg)]
    judge_server.always = lambda first, second: "refusal" if first == f"2 {TEXTS[1]}" else None
    other = stage(criteria="Shorter is better.")
    for _ in range(2):  # the second time, nothing is new
        ai.main(other)
        assert [j.item_key for j in judgments(cfg) if j.decides] == [was[n][0] for n in (0, 2, 6, 8, 10) for _ in "ab"]
        assert len(judgments(cfg, effective=False)) == 14
    ai.main(cfg)
    assert sorted((j.item_key, j.ranks) for j in judgments(cfg)) == sorted(was)


def test_an_item_that_breaks_off_between_its_orders_has_none(
    judge_server: JudgeServer, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One order alone would be exported as a label that follows the place."""
    record = history.record_answer

    def killed(session: Any, user_id: int, shown: history.Shown, *rest: Any) -> int:
        if shown.presentation:
            raise KeyboardInterrupt
        return record(session, user_id, shown, *rest)

    monkeypatch.setattr(ai, "record_answer", killed)
    cfg = stage()
    with pytest.raises(KeyboardInterrupt):
        ai.main(cfg)
    assert judgments(cfg) == []
    monkeypatch.undo()
    ai.main(cfg)
    assert len(judgments(cfg)) == 12


def test_a_retired_item_is_not_judged(judge_server: JudgeServer, stage: Any) -> None:
    cfg = stage()
    with LabelStore.open(cfg) as store:
        moderation.retire(store, store.ensure_user("ada", role="admin"), 2)
    ai.main(cfg)
    assert len(judge_server.asked) == 2 * 4 + 12
    assert saved_report(cfg)["counts"]["items"] == 5


def test_one_comparison_without_an_answer_leaves_a_ranking_unlabeled(judge_server: JudgeServer, stage: Any) -> None:
    judge_server.always = lambda first, second: 400 if (first, second) == (TEXTS[2], TEXTS[0]) else None
    cfg = stage()
    ai.main(cfg)
    assert {j.kind for j in judgments(cfg)} == {"pair"}


def test_labels_of_batches_before_an_alarm_are_kept(judge_server: JudgeServer, stage: Any) -> None:
    def lazy_from_3_on(first: str, second: str) -> str:
        longer = max(first, second, key=len)
        return "A" if longer == first or longer[0] not in "012" else "B"

    judge_server.judge = lazy_from_3_on
    cfg = stage(batch_size=3, controls={"per_batch": 6})
    with pytest.raises(JudgeError, match="controls"):
        ai.main(cfg)
    assert len(judgments(cfg)) == 2 * 3
    said = saved_report(cfg)
    assert said["controls"]["alarm"]
    assert said["counts"]["items_not_asked"] == 3


def test_people_are_compared_with_where_both_judged(judge_server: JudgeServer, stage: Any) -> None:
    cfg = stage()
    with LabelStore.open(cfg) as store:
        ann = store.ensure_user("ann", role="annotator")
        for number in range(5):
            task = store.next_task(ann)
            assert task is not None
            better = 0 if len(task.responses[0]) > len(task.responses[1]) else 1
            value = 1 if better else -1
            store.submit(ann, task.assignment_id, Answer("compare", value=value if number else -value), f"s{number}")
    ai.main(cfg)
    said = saved_report(cfg)["people"]
    assert (said["pairs"], said["agreement"]) == (5, 0.8)
    assert said["kappa"] == 0.0  # the judge says the same of all: chance agrees as often


def test_shares_of_people() -> None:
    item = Item("p", [Candidate("a"), Candidate("b")])
    answers = [
        (-1, "person", 0),
        (2, "person", 0),
        (0, "person", 0),
        (-1, "person", 0),
        (3, "person", 1),
        (3, "judge", 0),
    ]
    given = [
        Judgment(i, item.key, "pair", "x", labeler, [0, 1], Answer("compare", value=value), presentation)  # type: ignore[arg-type]
        for i, (value, labeler, presentation) in enumerate(answers)
    ]
    assert people_on(given, [item]) == [{(0, 1): 2.5 / 4}]


@pytest.mark.parametrize("first_slot", [False, True])
def test_the_export_has_the_soft_label_of_both_orders(judge_server: JudgeServer, stage: Any, first_slot: bool) -> None:
    """Response 1 at 0.6 and 0.9 is 0.75; a judge that follows the place says nothing."""
    judge_server.judge = lambda first, second: letters(0.9 if first_slot or len(first) > len(second) else 0.4)
    cfg = stage()
    ai.main(cfg)
    cfg.export.ties = "keep"
    cfg.export.resamples = 1
    export(cfg)
    files = [*Path(cfg.run_dir).glob("export/pairs.*.jsonl")]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    expected = 0.5 if first_slot else 0.75
    assert [line["wins"][1][0] for line in lines] == pytest.approx([expected] * 5)


def exported(cfg: LabelingStage, name: str) -> list[dict[str, Any]]:
    """The lines of the files `name` of an export of both splits."""
    cfg.export.resamples = 1
    export(cfg)
    files = sorted(Path(cfg.run_dir).glob(f"export/{name}"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_probability_is_exported_without_a_margin(judge_server: JudgeServer, stage: Any) -> None:
    """A soft label of 0.75 beside a margin of 1.5 is learned as 0.9: its own strength is counted twice."""
    judge_server.judge = lambda first, second: letters(0.9 if len(first) > len(second) else 0.4)
    cfg = stage()
    ai.main(cfg)
    pairs, preferences = exported(cfg, "pairs.*.jsonl"), exported(cfg, "preferences.*.jsonl")
    assert [line["probability"] for line in preferences] == [0.75] * 5
    assert not any("margin" in line for line in [*pairs, *preferences])


def test_the_export_of_a_ranking_has_the_soft_label_of_every_pair(judge_server: JudgeServer, stage: Any) -> None:
    """By number of words: the longer one at 0.9 in the first place, at 0.7 in the second; 8 beside 10 by the place."""

    def judge(first: str, second: str) -> Any:
        one, other = len(first.split()), len(second.split())
        if {one, other} == {8, 10}:
            return letters(0.8)
        return letters(0.9 if one > other else 0.3)

    judge_server.judge = judge
    cfg = stage()
    ai.main(cfg)
    (line,) = exported(cfg, "rankings.*.jsonl")
    words = [len(text.split()) for text in line["responses"]]
    for i, a in enumerate(words):
        for j, b in enumerate(words):
            soft = 0.5 if a == b or {a, b} == {8, 10} else 0.8 if a > b else 0.2
            assert line["wins"][i][j] == pytest.approx(soft)
    # Sums of wins of 8 to 11 words: 0.2 + 0.5 + 0.2, 0.8 + 0.2 + 0.2, 0.5 + 0.8 + 0.2, 3 * 0.8.
    assert [line["ranks"][words.index(n)] for n in (8, 9, 10, 11)] == [4, 3, 2, 1]


def test_raw_judgments_say_what_each_order_said_of_every_pair(judge_server: JudgeServer, stage: Any) -> None:
    judge_server.judge = lambda first, second: letters(0.9 if len(first) > len(second) else 0.3)
    cfg = stage()
    ai.main(cfg)
    lines = exported(cfg, "judgments.jsonl")
    pairs = [line["canonical"]["wins"] for line in lines if line["kind"] == "pair"]
    assert pairs == 5 * [
        [[0.5, pytest.approx(0.3)], [pytest.approx(0.7), 0.5]],
        [[0.5, pytest.approx(0.1)], [0.9, 0.5]],
    ]
    shown, swapped = (line["canonical"]["wins"] for line in lines if line["kind"] == "ranking")
    for i in range(4):
        for j in range(i + 1, 4):  # the later response is the longer one
            assert (shown[i][j], swapped[i][j]) == (pytest.approx(0.3), pytest.approx(0.1))


def test_rankings_of_before_get_their_probabilities_without_a_question(judge_server: JudgeServer, stage: Any) -> None:
    """Judged when orders alone were kept: the same command again supersedes them out of the cache."""
    judge_server.judge = lambda first, second: letters(0.9 if len(first) > len(second) else 0.3)
    cfg = stage()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ai, "noted", lambda p_first: "")
        ai.main(cfg)
    asked = len(judge_server.asked)
    assert {p for row in exported(cfg, "rankings.*.jsonl")[0]["wins"] for p in row} == {0.0, 0.5, 1.0}
    ai.main(cfg)
    assert len(judge_server.asked) == asked
    assert {round(p, 6) for row in exported(cfg, "rankings.*.jsonl")[0]["wins"] for p in row} == {0.2, 0.5, 0.8}


def test_probabilities_are_kept_where_they_fit() -> None:
    """A note is no longer than 2,000 characters: the 210 pairs of 21 responses, not the 231 of 22."""
    assert json.loads(noted([1 / 3] * 210))["p_first"] == [0.333333] * 210
    assert len(noted([1 / 3] * 210)) <= 2_000
    assert noted([1 / 3] * 231) == ""


@pytest.mark.parametrize(
    "notes",
    [
        *("", "[]", "3", '{"p_first": "A"}', '{"p_first": [0.5, 0.5]}', '{"p_first": 1.5}', '{"p_first": NaN}', "{"),
        *("[" * 2000, f'{{"p_first": {"9" * 400}}}'),
    ],
    ids=lambda notes: notes[:20],
)
def test_notes_that_hold_no_probabilities_are_no_votes(notes: str) -> None:
    """Predictions of other tools have notes of their own."""
    answer = Answer("rank", ranks=[1, 2, 3], notes=notes)
    assert judge_wins(Judgment(1, "k", "ranking", "judge:a", "judge", [0, 1, 2], answer)) is None
    answer = Answer("compare", value=1, notes=notes)
    assert judge_wins(Judgment(1, "k", "pair", "judge:a", "judge", [0, 1], answer)) is None


def test_each_judge_has_one_voice() -> None:
    def said(judge: str, order: list[int], p_first: float, labeler: Any = "judge") -> Judgment:
        answer = Answer("compare", value=1, notes=json.dumps({"p_first": p_first}))
        return Judgment(1, "k", "pair", judge, labeler, order, answer)

    sure = [said("a", [0, 1], 0.2), said("a", [1, 0], 0.6)]  # 0.8 and 0.6 for response 1
    torn = [said("b", [0, 1], 0.9), said("b", [1, 0], 0.9)]
    assert soft_wins(sure) == {(0, 1): pytest.approx(0.3)}
    assert soft_wins(torn) == {(0, 1): 0.5}
    assert soft_wins([*sure, *torn]) == {(0, 1): pytest.approx(0.4)}
    assert soft_wins([*sure, said("ann", [0, 1], 0.2, "person")]) is None
    assert soft_wins([]) is None


def test_a_project_without_a_judge_or_items_says_so(tmp_path: Path, judge_settings: Any) -> None:
    with pytest.raises(ConfigError, match="no judge"):
        ai.main(LabelingStage(run_dir=str(tmp_path)))
    with pytest.raises(DataError, match="no items"):
        ai.main(LabelingStage.model_validate({"run_dir": str(tmp_path), "judge": judge_settings()}))
