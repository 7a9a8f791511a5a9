"""What the report says of judges with known faults; all figures by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, contests, labels, longer, report, run
from rich.console import Console
from sklearn.metrics import cohen_kappa_score

from reward_model.labeling.judge import Contest
from reward_model.labeling.judge_controls import SPOILED, controls_for, truncated
from reward_model.labeling.judge_report import write_report
from rlhf.config_judge import JudgeControlsConfig
from rlhf.errors import JudgeError

CONTROLS = {"controls": {"per_batch": 3, "on_alarm": "warn"}}


def test_a_judge_that_always_says_first(judge_server: JudgeServer, open_judge: Any) -> None:
    judge_server.judge = lambda first, second: "A"
    judge = open_judge(batch_size=4, **CONTROLS)
    assert labels(run(judge, contests(20))) == [{(0, 1): 0.5}] * 20
    said = report(judge, 20)
    # 20 of 20: Wilson's lower bound is n / (n + z^2); of 40 verdicts for the first slot likewise.
    assert said["flip_rate"] == {"value": 1.0, "low": pytest.approx(20 / (20 + 1.959964**2)), "high": 1.0, "n": 20}
    assert said["first_slot_rate"] == {
        "value": 1.0,
        "low": pytest.approx(40 / (40 + 1.959964**2)),
        "high": 1.0,
        "n": 40,
    }
    assert (said["counts"]["contradictions"], said["counts"]["ties"]) == (20, 0)
    assert said["controls"] | {"kinds": {}} == {
        "asked": 15,
        "answered": 15,
        "failed": 15,
        "kinds": {},
        "alarm": said["controls"]["alarm"],
    }
    assert "in 15 of 15 controls" in said["controls"]["alarm"]
    assert said["length"]["longer_wins"] is None


def test_an_alarm_stops_before_the_batch_is_given_out(judge_server: JudgeServer, open_judge: Any) -> None:
    judge_server.judge = lambda first, second: "A"
    judge = open_judge(batch_size=4, controls={"per_batch": 3})
    with pytest.raises(JudgeError, match="in 3 of 3 controls"):
        run(judge, contests(20))
    assert len(judge_server.asked) == 2 * (4 + 3)
    assert judge.work.judged == []


def test_a_budget_that_ends_within_a_batch_leaves_no_label_uncontrolled(
    judge_server: JudgeServer, open_judge: Any
) -> None:
    judge_server.judge = lambda first, second: "A"
    judge = open_judge(budget={"max_requests": 10}, controls={"per_batch": 3}, endpoint={"parallel": 1})
    with pytest.raises(JudgeError, match="in 3 of 3 controls"):
        run(judge, contests(20))
    assert judge.work.judged == []


def test_a_sound_judge_raises_no_alarm(judge_server: JudgeServer, open_judge: Any) -> None:
    judge = open_judge(batch_size=4, controls={"per_batch": 3})
    assert labels(run(judge, contests(20))) == [{(0, 1): 0.0}] * 20
    said = report(judge, 20)
    assert said["controls"] == {
        "asked": 15,
        "answered": 15,
        "failed": 0,
        "kinds": {kind: {"asked": 5, "answered": 5, "failed": 0} for kind in SPOILED},
        "alarm": "",
    }
    assert said["flip_rate"]["value"] == 0.0
    assert said["first_slot_rate"]["value"] == 0.5
    assert said["counts"]["pairs"] == 20  # controls are not among them


def test_a_control_without_an_answer_is_not_held_against_the_judge(judge_server: JudgeServer, open_judge: Any) -> None:
    judge_server.always = lambda first, second: "refusal" if "" in (first, second) else None
    judge = open_judge(batch_size=4, controls={"per_batch": 3})
    run(judge, contests(12))
    said = report(judge, 12)
    assert (said["controls"]["asked"], said["controls"]["answered"], said["controls"]["failed"]) == (9, 6, 0)
    assert said["failures"] == {"refusal": len([1 for asked in judge_server.asked if "" in asked])}


def test_controls_are_real_responses_spoiled() -> None:
    given = [Contest("p", ("short", "one two three four five six seven eight nine"))]
    controls = controls_for(given, JudgeControlsConfig(per_batch=4), seed="1")
    assert [(c.kind, c.bad) for c in controls] == [
        ("empty", ""),
        ("colon", ":"),
        ("truncated", "one two three"),
        ("empty", ""),
    ]
    assert {c.real for c in controls} == {given[0].responses[1]}
    assert controls == controls_for(given, JudgeControlsConfig(per_batch=4), seed="1")
    assert controls_for([Contest("p", ("short", "also"))], JudgeControlsConfig(), seed="1") == []
    assert truncated("a b c d e f g h") == "a b"


def two_facts() -> list[Contest]:
    """Of 8 contests the second response is longer in 6, and has more words in 4 of these and in the other 2."""
    few, many = "extraordinarily long words " * 4, "a b c d e f g h i j k l m n"
    return [
        *[Contest(f"{i}", ("a b", many)) for i in range(4)],
        *[Contest(f"{i}", (many, few)) for i in range(4, 6)],
        *[Contest(f"{i}", (few, many)) for i in range(6, 8)],
    ]


def test_a_judge_that_loves_length_shows(judge_server: JudgeServer, open_judge: Any) -> None:
    judge_server.judge = longer
    judge = open_judge()
    given = two_facts()
    run(judge, given)
    alone = report(judge, 8)["length"]
    assert (alone["longer_wins"]["value"], alone["longer_wins"]["n"], alone["expected"], alone["excess"]) == (
        1,
        8,
        0.5,
        0.5,
    )
    # People judge by words: the longer one wins in the first four of the eight.
    people = [{(0, 1): float(i in (4, 5))} for i in range(8)]
    beside = report(judge, 8, people)["length"]
    assert (beside["expected"], beside["excess"]) == (0.5, 0.5)
    people = [{(0, 1): 0.0}] * 4 + [{}] * 4
    assert report(judge, 8, people)["length"]["excess"] == 0.0


def test_kappa_against_people(judge_server: JudgeServer, open_judge: Any) -> None:
    """Judge: 6 x second, 2 x first; people: of these 6 five, of these 2 one alike, and one tie."""
    judge = open_judge()
    run(judge, two_facts())
    ours = [-1, -1, -1, -1, 1, 1, -1, -1]
    theirs = [0.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.2, 0.0]
    said = report(judge, 8, [{(0, 1): p} for p in theirs])["people"]
    signs = [(p > 0.5) - (p < 0.5) for p in theirs]
    # Agreement 6/8; by chance: (6 * 5 + 2 * 2 + 0 * 1) / 64.
    chance = 34 / 64
    assert said["agreement"] == 6 / 8
    assert said["kappa"] == pytest.approx((6 / 8 - chance) / (1 - chance))
    assert said["kappa"] == pytest.approx(cohen_kappa_score(ours, signs))


@pytest.mark.parametrize(
    ("people", "note"),
    [
        (None, "undefined (no pair judged by both)"),
        ([{(0, 1): 0.0}] * 3, "undefined (all agree)"),
    ],
)
def test_kappa_is_undefined_aloud(judge_server: JudgeServer, open_judge: Any, people: Any, note: str) -> None:
    judge = open_judge()
    run(judge, contests(3))
    said = report(judge, 3, people)["people"]
    assert (said["kappa"], said["note"]) == (None, note)


@pytest.mark.parametrize("fault", [None, 500, "refusal"])
def test_the_report_is_json_and_a_table(judge_server: JudgeServer, open_judge: Any, tmp_path: Path, fault: Any) -> None:
    judge_server.always = fault
    judge = open_judge(endpoint={"attempts": 1}, budget={"max_requests": 6}, **CONTROLS)
    run(judge, contests(5))
    out = io.StringIO()
    said = report(judge, 5)
    write_report(said, tmp_path, Console(file=out, width=120))
    assert json.loads((tmp_path / "judge_report.json").read_text()) == said
    for part in ("judge:judge-1", "first place preferred", "Raise judge.budget"):
        assert part in out.getvalue()
