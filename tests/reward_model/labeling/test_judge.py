"""A judge that fails in every way: what it did not say is never a label, nothing is asked twice."""

from __future__ import annotations

import json
import math
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from judge_server import JudgeServer, contests, labels, letters, report, run

from reward_model.labeling.judge import soft_label
from reward_model.labeling.judge_prompt import Verdict
from rlhf.errors import ConfigError, JudgeError

# --- what the answers come to ---------------------------------------------------------------------------------


def test_each_pair_is_asked_in_both_orders(judge_server: JudgeServer, open_judge: Any) -> None:
    given = contests(2)
    assert labels(run(open_judge(), given)) == [{(0, 1): 0.0}, {(0, 1): 0.0}]
    both = {pair for c in given for pair in (c.responses, c.responses[::-1])}
    assert len(judge_server.asked) == 4
    assert set(judge_server.asked) == both
    assert {(body["path"], body["model"], body["temperature"]) for body in judge_server.bodies} == {
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


def test_log_probabilities_make_soft_labels(judge_server: JudgeServer, open_judge: Any) -> None:
    judge_server.judge = lambda first, second: letters(0.8 if len(first) > len(second) else 0.3)
    (judged,) = run(open_judge(), contests(1))
    # Of the longer one: 0.8 when it is first, 1 - 0.3 when it is second.
    assert judged.labels == {(0, 1): pytest.approx(1 - (0.8 + 0.7) / 2)}
    assert judge_server.bodies[0]["logprobs"] is True


def test_spellings_of_a_letter_count_together(judge_server: JudgeServer, open_judge: Any) -> None:
    spelled = {"A": math.log(0.2), " A": math.log(0.4), "B": math.log(0.2), "x": math.log(0.1)}
    judge_server.judge = lambda first, second: spelled if len(first) > len(second) else {"B": -0.1, "C": -3.0}
    (judged,) = run(open_judge(), contests(1))
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
def test_structured_answers(judge_server: JudgeServer, open_judge: Any, answer: str, said: Any, label: float) -> None:
    given = contests(1)
    judge_server.judge = lambda first, second: said[first != given[0].responses[0]]
    (judged,) = run(open_judge(answer=answer), given)
    assert judged.labels == {(0, 1): pytest.approx(label)}
    schema = judge_server.bodies[0]["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["verdict", "strength"][: 1 + (answer == "strength")]


def test_rankings_compare_all_pairs(judge_server: JudgeServer, open_judge: Any) -> None:
    (judged,) = run(open_judge(), contests(1, k=4))
    assert len(judge_server.asked) == len(set(judge_server.asked)) == 12
    assert judged.labels == {(i, j): 0.0 for i in range(4) for j in range(i + 1, 4)}


def test_fields_of_the_request_can_be_set_and_left_out(judge_server: JudgeServer, open_judge: Any) -> None:
    run(open_judge(endpoint={"request": {"max_tokens": None, "max_completion_tokens": 9, "seed": 1}}), contests(1))
    body = judge_server.bodies[0]
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
    ("message", "malformed"),
    (429, "overloaded"),
    (500, "server_error"),
    (503, "server_error"),
]


@pytest.mark.parametrize(("fault", "kind"), PASSING)
def test_what_may_pass_is_tried_again(judge_server: JudgeServer, open_judge: Any, fault: Any, kind: str) -> None:
    judge_server.script = [fault, fault]
    judge = open_judge(endpoint={"timeout_s": 0.15, "parallel": 1})
    assert labels(run(judge, contests(2))) == [{(0, 1): 0.0}] * 2
    assert len(judge_server.asked) == 6
    assert judge.ledger.spent().requests == 6


@pytest.mark.parametrize(("fault", "kind"), PASSING)
def test_what_does_not_pass_is_no_label(judge_server: JudgeServer, open_judge: Any, fault: Any, kind: str) -> None:
    given = contests(3)
    bad = given[1].responses[1]
    judge_server.always = lambda first, second: fault if first == bad else None
    judge = open_judge(endpoint={"timeout_s": 0.15, "attempts": 2})
    assert labels(run(judge, given)) == [{(0, 1): 0.0}, None, {(0, 1): 0.0}]
    said = report(judge, 3)
    assert said["failures"] == {kind: 1}
    assert [said["counts"][f"items_{what}"] for what in ("labeled", "unlabeled", "not_asked")] == [2, 1, 0]
    assert len(judge_server.asked) == 7


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
    judge_server: JudgeServer, open_judge: Any, answer: str, said: str, kind: str
) -> None:
    judge_server.judge = lambda first, second: said
    judge = open_judge(answer=answer)
    assert labels(run(judge, contests(1))) == [None]
    assert report(judge, 1)["failures"] == {kind: 2}
    assert said[:9] in json.dumps(report(judge, 1)["failure_examples"][kind]).replace("\\", "")
    judge.close()
    again = open_judge(answer=answer)
    assert labels(run(again, contests(1))) == [None]
    assert len(judge_server.asked) == 2


def test_a_judge_that_was_mended_after_too_many_failures_goes_on(judge_server: JudgeServer, open_judge: Any) -> None:
    """Its answers without a verdict would stop the same command for ever."""
    good, judge_server.judge = judge_server.judge, lambda first, second: "The first one is better."
    strict: dict[str, Any] = {"max_failures": 0.2, "endpoint": {"parallel": 1}}
    judge = open_judge(**strict)
    with pytest.raises(JudgeError, match="5 of 5"):
        run(judge, contests(30))
    judge.close()
    stored = len(judge_server.asked)
    for _ in range(2):  # not mended: a few are asked anew each time, no more than before
        again = open_judge(**strict)
        with pytest.raises(JudgeError, match="5 of 5"):
            run(again, contests(30))
        again.close()
    assert len(judge_server.asked) <= 3 * (stored + 1)
    judge_server.judge = good
    mended = open_judge(**strict)
    assert labels(run(mended, contests(30))) == [{(0, 1): 0.0}] * 30
    mended.close()
    asked = len(judge_server.asked)
    assert labels(run(open_judge(**strict), contests(30))) == [{(0, 1): 0.0}] * 30
    assert len(judge_server.asked) == asked


def test_what_was_not_sent_costs_no_tokens(open_judge: Any) -> None:
    """Nobody listens on that port: the budget of a judge that was not there is not used up."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        judge = open_judge(endpoint={"url": f"http://127.0.0.1:{held.getsockname()[1]}/v1", "attempts": 2})
        assert labels(run(judge, contests(1))) == [None]
    spent = judge.ledger.spent()
    assert (spent.tokens_in, spent.tokens_out) == (0, 0)
    assert report(judge, 1)["failures"] == {"unanswered": 2}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("refusal", "refusal"), ("filter", "refusal"), ("cut", "cut"), ("null", "refusal"), (400, "refused")],
)
def test_refusals_are_counted_as_such(judge_server: JudgeServer, open_judge: Any, fault: Any, kind: str) -> None:
    judge_server.always = fault
    judge = open_judge()
    assert labels(run(judge, contests(2))) == [None, None]
    assert report(judge, 2)["failures"] == {kind: 4}
    assert len(judge_server.asked) == 4


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
    judge_server: JudgeServer, open_judge: Any, status: int, said: str, fix: str
) -> None:
    judge_server.always = (status, {"Location": "http://127.0.0.1:9/elsewhere"} if status == 302 else {})
    with pytest.raises(ConfigError, match="status") as caught:
        run(open_judge(endpoint={"parallel": 1}), contests(50))
    assert said in caught.value.message
    assert fix in caught.value.fix
    assert len(judge_server.asked) == 1


@pytest.mark.parametrize(
    ("message", "stops"),
    [
        ("response_format is not supported by this model", True),
        ("Unsupported parameter: 'max_tokens'", True),
        ("max_tokens is too large: this model's maximum context length is 4096 tokens", False),
        ("content policy", False),
    ],
)
def test_a_field_that_the_server_does_not_know_is_named(
    judge_server: JudgeServer, open_judge: Any, message: str, stops: bool
) -> None:
    judge_server.message = message
    judge_server.script = [400]
    judge = open_judge(endpoint={"parallel": 1})
    if stops:
        with pytest.raises(ConfigError, match=r"does not know a field.*400") as caught:
            run(judge, contests(2))
        assert "judge.endpoint.logprobs" in caught.value.fix
    else:
        assert labels(run(judge, contests(2))) == [None, {(0, 1): 0.0}]


def test_the_key_is_sent_and_never_shown(
    judge_server: JudgeServer, open_judge: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JUDGE_TEST_KEY", "sk-hush")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-other")
    judge_server.script = [500]
    judge_server.always = 401
    with pytest.raises(ConfigError) as caught:
        run(open_judge(endpoint={"key_env": "JUDGE_TEST_KEY"}), contests(1))
    assert judge_server.headers[0]["Authorization"] == "Bearer sk-hush"
    assert not [name for name in judge_server.headers[0] if "openai" in name.lower()]
    assert "hush" not in str(caught.value)
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and b"hush" in f.read_bytes()]


def test_without_a_key_none_is_sent(
    judge_server: JudgeServer, open_judge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    run(open_judge(), contests(1))
    assert judge_server.headers[0]["Authorization"] is None
    with pytest.raises(ConfigError, match="JUDGE_ABSENT"):
        open_judge("other", endpoint={"key_env": "JUDGE_ABSENT"})


def test_a_private_address_must_be_allowed(open_judge: Any) -> None:
    with pytest.raises(ConfigError, match="private"):
        open_judge(endpoint={"allow_private": False})


def test_the_wait_that_the_server_asks_for_is_kept_by_all(judge_server: JudgeServer, open_judge: Any) -> None:
    judge_server.script = [(429, {"Retry-After": "0.3"})]
    run(open_judge(endpoint={"parallel": 1}), contests(3))
    assert len(judge_server.times) == 7
    assert judge_server.times[1] - judge_server.times[0] >= 0.29


def test_a_wait_beyond_reason_is_cut(judge_server: JudgeServer, open_judge: Any) -> None:
    judge_server.always = (429, {"Retry-After": "Wed, 01 Jan 2200 00:00:00 GMT"})
    began = time.monotonic()
    assert labels(run(open_judge(endpoint={"max_wait_s": 0.01}), contests(1))) == [None]
    assert time.monotonic() - began < 20


def test_too_many_failures_stop_the_run(judge_server: JudgeServer, open_judge: Any) -> None:
    judge_server.always = 500
    judge = open_judge(max_failures=0.2, endpoint={"attempts": 1, "parallel": 1})
    with pytest.raises(JudgeError, match=r"5 of 5 questions.*server_error: status 500"):
        run(judge, contests(50))
    assert len(judge_server.asked) <= 7  # of the first 20, 4 may fail; one more may be on its way
    judge_server.always = None
    judge.close()
    assert labels(run(open_judge(), contests(50))) == [{(0, 1): 0.0}] * 50


def test_questions_go_out_together_but_not_more_than_allowed(judge_server: JudgeServer, open_judge: Any) -> None:
    judge_server.delay_s = 0.02
    run(open_judge(endpoint={"parallel": 3}), contests(12))
    assert judge_server.most_busy == 3
