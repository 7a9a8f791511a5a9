"""A judge that fails in every way: what it did not say is never a label, nothing is asked twice."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, judging, letters
from rich.console import Console

from reward_model.labeling.judge import Contest, Judge, Judged, open_judge, soft_label
from reward_model.labeling.judge_prompt import Verdict
from reward_model.labeling.judge_report import judge_report
from rlhf.config_judge import JudgeConfig
from rlhf.errors import ConfigError, JudgeError
from rlhf.progress import Progress

WORDS = [f"w{i}" for i in range(14)]


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judging() as judge:
        yield judge


@pytest.fixture
def opened(server: JudgeServer, tmp_path: Path) -> Iterator[Callable[..., Judge]]:
    """`opened(answer="json", endpoint={...}, ...)`: a judge that waits little and tolerates nearly all."""
    judges = []

    def build(folder: str = "run", **changes: Any) -> Judge:
        endpoint = {"url": server.url, "allow_private": True, "timeout_s": 5.0, "wait_s": 0.001, "parallel": 2}
        settings: dict[str, Any] = {"model": "m/judge-1", "max_failures": 0.99, "controls": {"per_batch": 0}}
        settings |= changes | {"endpoint": endpoint | changes.get("endpoint", {})}
        judges.append(open_judge(JudgeConfig.model_validate(settings), str(tmp_path / folder), seed=3))
        return judges[-1]

    yield build
    for judge in judges:
        judge.close()


def contests(n: int = 4, k: int = 2) -> list[Contest]:
    """Response i has i more words than response 0."""
    return [Contest(f"why {c}?", tuple(f"{c} " + " ".join(WORDS[: 9 + i]) for i in range(k))) for c in range(n)]


def run(judge: Judge, given: list[Contest]) -> list[Judged]:
    progress = Progress("label", console=Console(file=io.StringIO()))
    return [one for batch in judge.batches(given, progress) for one in batch]


def labels(judged: list[Judged]) -> list[Any]:
    return [one.labels for one in judged]


def report(judge: Judge, wanted: int, people: Any = None) -> dict[str, Any]:
    return judge_report(judge, wanted=wanted, seconds=0.0, people=people)


# --- what the answers come to ---------------------------------------------------------------------------------


def test_each_pair_is_asked_in_both_orders(server: JudgeServer, opened: Any) -> None:
    given = contests(2)
    assert labels(run(opened(), given)) == [{(0, 1): 0.0}, {(0, 1): 0.0}]
    both = {pair for c in given for pair in (c.responses, c.responses[::-1])}
    assert len(server.asked) == 4
    assert set(server.asked) == both
    assert {(body["path"], body["model"], body["temperature"]) for body in server.bodies} == {
        ("/v1/chat/completions", "m/judge-1", 0)
    }


@pytest.mark.parametrize(
    ("p", "q", "label"),
    [
        (1.0, 0.0, 1.0),  # A, then B: the same response
        (0.0, 1.0, 0.0),
        (1.0, 1.0, 0.5),  # the first place both times
        (0.0, 0.0, 0.5),
        (0.9, 0.3, 0.8),  # (0.9 + 0.7) / 2
        (0.9, 0.6, 0.5),  # on average 0.65, but they name different responses
        (0.5, 0.0, 0.75),  # a tie, and the first one's win
        (0.5, 0.5, 0.5),
    ],
)
def test_soft_labels_by_hand(p: float, q: float, label: float) -> None:
    assert soft_label(Verdict(p, 1), Verdict(q, 1)) == pytest.approx(label)


def test_log_probabilities_make_soft_labels(server: JudgeServer, opened: Any) -> None:
    server.judge = lambda first, second: letters(0.8 if len(first) > len(second) else 0.3)
    (judged,) = run(opened(), contests(1))
    # Of the longer one: 0.8 when it is first, 1 - 0.3 when it is second.
    assert judged.labels == {(0, 1): pytest.approx(1 - (0.8 + 0.7) / 2)}
    assert server.bodies[0]["logprobs"] is True


def test_spellings_of_a_letter_count_together_and_a_missing_one_is_nothing(server: JudgeServer, opened: Any) -> None:
    spelled = {"A": math.log(0.2), " A": math.log(0.4), "B": math.log(0.2), "x": math.log(0.1)}
    server.judge = lambda first, second: spelled if len(first) > len(second) else {"B": -0.1, "C": -3.0}
    (judged,) = run(opened(), contests(1))
    assert judged.labels == {(0, 1): pytest.approx(1 - (0.75 + 1) / 2)}


@pytest.mark.parametrize(
    ("answer", "said", "label"),
    [
        ("json", ('{"verdict": "A"}', '{"verdict": "B"}'), 1.0),
        ("json", ('{"verdict": "tie"}', '{"verdict": "B"}'), 0.75),
        ("strength", ('{"verdict": "A", "strength": 1}', '{"verdict": "B", "strength": 3}'), (2 / 3 + 1) / 2),
        ("strength", ('{"verdict": "tie", "strength": 0}', '{"verdict": "A", "strength": 2}'), (1 / 2 + 1 / 6) / 2),
    ],
)
def test_structured_answers(server: JudgeServer, opened: Any, answer: str, said: Any, label: float) -> None:
    given = contests(1)
    server.judge = lambda first, second: said[first != given[0].responses[0]]
    (judged,) = run(opened(answer=answer), given)
    assert judged.labels == {(0, 1): pytest.approx(label)}
    schema = server.bodies[0]["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["verdict", "strength"][: 1 + (answer == "strength")]


def test_rankings_compare_all_pairs(server: JudgeServer, opened: Any) -> None:
    (judged,) = run(opened(), contests(1, k=4))
    assert len(server.asked) == len(set(server.asked)) == 12
    assert judged.labels == {(i, j): 0.0 for i in range(4) for j in range(i + 1, 4)}


def test_fields_of_the_request_can_be_set_and_left_out(server: JudgeServer, opened: Any) -> None:
    run(opened(endpoint={"request": {"max_tokens": None, "max_completion_tokens": 9, "seed": 1}}), contests(1))
    body = server.bodies[0]
    assert "max_tokens" not in body
    assert (body["max_completion_tokens"], body["seed"]) == (9, 1)


# --- a server that fails --------------------------------------------------------------------------------------

PASSING = [
    ("slow", "unanswered"),
    ("drip", "unanswered"),
    ("close", "unanswered"),
    ("garbage", "malformed"),
    ("html", "malformed"),
    ("deep", "malformed"),
    ("huge", "unanswered"),
    ("empty", "malformed"),
    ("number", "malformed"),
    (429, "overloaded"),
    (500, "server_error"),
    (503, "server_error"),
]


@pytest.mark.parametrize(("fault", "kind"), PASSING)
def test_what_may_pass_is_tried_again(server: JudgeServer, opened: Any, fault: Any, kind: str) -> None:
    server.script = [fault, fault]
    judge = opened(endpoint={"timeout_s": 0.15, "parallel": 1})
    assert labels(run(judge, contests(2))) == [{(0, 1): 0.0}] * 2
    assert len(server.asked) == 6
    assert judge.ledger.spent().requests == 6


@pytest.mark.parametrize(("fault", "kind"), PASSING)
def test_what_does_not_pass_is_no_label(server: JudgeServer, opened: Any, fault: Any, kind: str) -> None:
    given = contests(3)
    bad = given[1].responses[1]
    server.always = lambda first, second: fault if first == bad else None
    judge = opened(endpoint={"timeout_s": 0.15, "attempts": 2})
    assert labels(run(judge, given)) == [{(0, 1): 0.0}, None, {(0, 1): 0.0}]
    said = report(judge, 3)
    assert said["failures"] == {kind: 1}
    assert [said["counts"][f"items_{what}"] for what in ("labeled", "unlabeled", "not_asked")] == [2, 1, 0]
    assert len(server.asked) == 7


VERDICTS = [
    ("letter", "The first one", "no_verdict"),
    ("letter", "A or B", "no_verdict"),
    ("letter", "a", "no_verdict"),
    ("letter", "", "refusal"),
    ("json", "A", "no_verdict"),
    ("json", '{"verdict": "C"}', "no_verdict"),
    ("json", '{"verdict": "A"', "no_verdict"),
    ("json", '{"verdict": "A", "verdict": "B"}', "no_verdict"),
    ("json", '{"verdict": ["A"]}', "no_verdict"),
    ("json", '[{"verdict": "A"}]', "no_verdict"),
    ("strength", '{"verdict": "A"}', "no_verdict"),
    ("strength", '{"verdict": "A", "strength": 4}', "no_verdict"),
    ("strength", '{"verdict": "A", "strength": true}', "no_verdict"),
    ("strength", '{"verdict": "tie", "strength": 1}', "no_verdict"),
    ("strength", '{"verdict": "B", "strength": 0}', "no_verdict"),
]


@pytest.mark.parametrize(("answer", "said", "kind"), VERDICTS)
def test_what_is_no_verdict_is_no_label_and_not_asked_again(
    server: JudgeServer, opened: Any, answer: str, said: str, kind: str
) -> None:
    server.judge = lambda first, second: said
    judge = opened(answer=answer)
    assert labels(run(judge, contests(1))) == [None]
    assert report(judge, 1)["failures"] == {kind: 2}
    judge.close()
    again = opened(answer=answer)
    assert labels(run(again, contests(1))) == [None]
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("refusal", "refusal"), ("filter", "refusal"), ("cut", "cut"), ("null", "refusal"), (400, "refused")],
)
def test_refusals_are_counted_as_such(server: JudgeServer, opened: Any, fault: Any, kind: str) -> None:
    server.always = fault
    judge = opened()
    assert labels(run(judge, contests(2))) == [None, None]
    assert report(judge, 2)["failures"] == {kind: 4}
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    ("status", "said", "fix"),
    [
        (401, "refused us (status 401", "key_env"),
        (403, "refused us (status 403", "key_env"),
        (404, "does not serve 'm/judge-1'", "judge.model"),
        (302, "does not serve", "url"),
    ],
)
def test_what_no_other_question_could_mend_stops_at_once(
    server: JudgeServer, opened: Any, status: int, said: str, fix: str
) -> None:
    server.always = (status, {"Location": "http://127.0.0.1:9/elsewhere"} if status == 302 else {})
    with pytest.raises(ConfigError, match="status") as caught:
        run(opened(endpoint={"parallel": 1}), contests(50))
    assert said in caught.value.message
    assert fix in caught.value.fix
    assert len(server.asked) == 1


def test_the_key_is_sent_and_never_shown(
    server: JudgeServer, opened: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUDGE_TEST_KEY", "sk-hush")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-other")
    server.script = [500]
    server.always = 401
    with pytest.raises(ConfigError) as caught:
        run(opened(endpoint={"key_env": "JUDGE_TEST_KEY"}), contests(1))
    assert server.headers[0]["Authorization"] == "Bearer sk-hush"
    assert not [name for name in server.headers[0] if "openai" in name.lower()]
    assert "hush" not in str(caught.value)
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and b"hush" in f.read_bytes()]


def test_without_a_key_none_is_sent(server: JudgeServer, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    run(opened(), contests(1))
    assert server.headers[0]["Authorization"] is None
    with pytest.raises(ConfigError, match="JUDGE_ABSENT"):
        opened("other", endpoint={"key_env": "JUDGE_ABSENT"})


def test_a_private_address_must_be_allowed(opened: Any) -> None:
    with pytest.raises(ConfigError, match="private"):
        opened(endpoint={"allow_private": False})


def test_the_wait_that_the_server_asks_for_is_kept_by_all(server: JudgeServer, opened: Any) -> None:
    server.script = [(429, {"Retry-After": "0.3"})]
    run(opened(endpoint={"parallel": 1}), contests(3))
    assert len(server.times) == 7
    assert server.times[1] - server.times[0] >= 0.29


def test_a_wait_beyond_reason_is_cut(server: JudgeServer, opened: Any) -> None:
    server.always = (429, {"Retry-After": "Wed, 01 Jan 2200 00:00:00 GMT"})
    began = time.monotonic()
    assert labels(run(opened(endpoint={"max_wait_s": 0.01}), contests(1))) == [None]
    assert time.monotonic() - began < 20


def test_too_many_failures_stop_the_run(server: JudgeServer, opened: Any) -> None:
    server.always = 500
    judge = opened(max_failures=0.2, endpoint={"attempts": 1, "parallel": 1})
    with pytest.raises(JudgeError, match=r"5 of 5 questions.*server_error: status 500"):
        run(judge, contests(50))
    assert len(server.asked) <= 7  # of the first 20, 4 may fail; one more may be on its way
    server.always = None
    judge.close()
    assert labels(run(opened(), contests(50))) == [{(0, 1): 0.0}] * 50


def test_questions_go_out_at_the_same_time_but_not_more_than_allowed(server: JudgeServer, opened: Any) -> None:
    server.delay_s = 0.02
    run(opened(endpoint={"parallel": 3}), contests(12))
    assert server.most_busy == 3
