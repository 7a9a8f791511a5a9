"""Cache, budget and resume: nothing is asked twice, no limit is passed, a killed run ends as the unharmed one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from faulty_server import running
from judge_server import JudgeServer, contests, labels, report, run

from reward_model.labeling.judge import Judge
from reward_model.labeling.judge import open_judge as open_judge_of
from reward_model.labeling.judge_ledger import FILE, Ledger, Size, Spent
from rlhf.config_judge import JudgeBudgetConfig, JudgeConfig
from rlhf.errors import JudgeError

ALL_LATER = [{(0, 1): 0.0}]


def test_the_second_run_asks_nothing(judge_server: JudgeServer, open_judge: Any) -> None:
    for k in (2, 3):
        judge = open_judge()
        assert len(labels(run(judge, contests(3, k)))) == 3
        judge.close()
    assert len(judge_server.asked) == len(set(judge_server.asked)) == 3 * 6  # the pairs of k=2 are among those of k=3


def test_equal_questions_are_asked_once(judge_server: JudgeServer, open_judge: Any) -> None:
    given = contests(1)
    assert labels(run(open_judge(), given * 5)) == ALL_LATER * 5
    assert len(judge_server.asked) == 2


@pytest.mark.parametrize(
    "change",
    [{"model": "other"}, {"criteria": "Shorter is better."}, {"answer": "json"}, {"endpoint": {"request": {"x": 1}}}],
)
def test_what_changes_an_answer_is_asked_anew(judge_server: JudgeServer, open_judge: Any, change: Any) -> None:
    first = open_judge()
    run(first, contests(1))
    first.close()
    judge_server.judge = lambda a, b: '{"verdict": "A"}' if change.get("answer") else "A"
    run(open_judge(**change), contests(1))
    assert len(judge_server.asked) == 4


def test_what_changes_no_answer_is_not_asked_anew(judge_server: JudgeServer, open_judge: Any) -> None:
    first = open_judge()
    run(first, contests(1))
    first.close()
    run(open_judge(name="ann", batch_size=1, budget={"max_requests": 9}, endpoint={"parallel": 1}), contests(1))
    assert len(judge_server.asked) == 2


def test_one_process_at_a_time(open_judge: Any) -> None:
    open_judge()
    with pytest.raises(JudgeError, match="in use"):
        open_judge()


def test_a_damaged_cache_is_named(open_judge: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(JudgeError, match="damaged"):
        open_judge()


# --- budget ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [1, 8])
@pytest.mark.parametrize(
    ("budget", "requests"),
    [
        ({"max_requests": 7}, 7),
        # A question is taken to cost its bytes and 256 for the template, more than 1,000 in all, until it cost 101.
        ({"max_tokens": 4_000}, None),
        ({"max_cost": 1.0, "input_price": 100.0, "output_price": 5000.0}, None),
    ],
)
def test_no_limit_is_passed_and_what_is_left_is_said(
    judge_server: JudgeServer, open_judge: Any, parallel: int, budget: Any, requests: int | None
) -> None:
    judge = open_judge(budget=budget, endpoint={"parallel": parallel, "max_answer_tokens": 1}, batch_size=4)
    judged = run(judge, contests(60))
    said = report(judge, 60)
    asked, used = len(judge_server.asked), said["usage"]
    assert asked == used["requests"]
    assert (used["tokens_in"], used["tokens_out"]) == (100 * asked, asked)
    assert requests is None or asked == requests
    assert 100 * asked + asked <= budget.get("max_tokens", 1e9)
    assert asked * (100 * 100 + 5000) / 1e6 <= budget.get("max_cost", 1e9)
    assert all(left >= 0 for left in said["budget_left"].values())
    assert said["budget_used_up"]
    whole = sum(one.labels is not None for one in judged)
    assert 0 < whole == said["counts"]["items_labeled"]
    assert said["counts"]["items_not_asked"] == 60 - whole
    assert said["failures"] == {}


def test_a_budget_holds_over_runs_and_can_be_raised(judge_server: JudgeServer, open_judge: Any) -> None:
    for limit, asked in ((3, 3), (3, 3), (5, 5), (100, 8)):
        judge = open_judge(budget={"max_requests": limit}, endpoint={"parallel": 1})
        judged = run(judge, contests(4))
        judge.close()
        assert len(judge_server.asked) == asked
    assert labels(judged) == ALL_LATER * 4


def test_attempts_count_and_what_may_have_been_answered_is_paid(judge_server: JudgeServer, open_judge: Any) -> None:
    judge_server.script = [500, "garbage"]
    judge = open_judge(endpoint={"parallel": 1})
    run(judge, contests(1))
    spent = judge.ledger.spent()
    assert spent.requests == 4
    assert spent.tokens_in > 200 + 1000  # the most of the one whose answer broke
    assert spent.tokens_out == 1 + 1 + 32


def test_without_a_count_the_most_is_taken(judge_server: JudgeServer, open_judge: Any) -> None:
    judge_server.usage = {"prompt_tokens": -5, "completion_tokens": "x"}
    judge = open_judge(endpoint={"request": {"max_completion_tokens": 7, "max_tokens": None}})
    run(judge, contests(1))
    texts = sum(len(turn["content"].encode()) for body in judge_server.bodies for turn in body["messages"])
    assert judge.ledger.spent() == Spent(2, texts + 2 * 256, 14, 0.0)


def test_a_reservation_waits_for_what_is_in_flight(tmp_path: Path) -> None:
    """10 tokens: 6 are out, 6 more do not fit; when the first cost 2 only, they do."""
    ledger = Ledger(tmp_path, JudgeBudgetConfig(max_tokens=10))
    (first,) = ledger.reserve(["a"], [Size(5, 1)])
    got: list[list[int]] = []
    thread = threading.Thread(target=lambda: got.append(ledger.reserve(["b", "c"], [Size(5, 1), Size(5, 1)])))
    thread.start()
    time.sleep(0.05)
    assert not got
    ledger.settle(first, Size(1, 1), {"x": 1})
    thread.join(timeout=5)
    assert len(got[0]) == 1
    assert ledger.spent() == Spent(2, 6, 2, 0.0)
    ledger.settle(got[0][0], None)
    assert ledger.reserve(["d"], [Size(3, 0)]) == []
    assert ledger.exhausted
    assert (ledger.answer("a"), ledger.answer("b")) == ({"x": 1}, None)
    ledger.close()


# --- SIGKILL --------------------------------------------------------------------------------------------------


def judge_until_killed(server: JudgeServer, build: Callable[[], Judge], kill_after: int) -> None:
    """Judge 20 contests in a process of its own; SIGKILL when the server has had so many more requests.

    The process is forked while the server has no thread yet; its requests wait meanwhile.
    """
    until = len(server.asked) + kill_after
    pid = os.fork()
    if pid == 0:
        try:
            run(build(), contests(20))
        finally:
            os._exit(0)
    with running(server):
        while len(server.asked) < until:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while server.busy:
            time.sleep(0.001)


@pytest.mark.parametrize("kills", [[13], [1, 2, 3, 5, 7, 4, 6]], ids=["once", "often"])
def test_a_killed_run_goes_on(judge_settings: Any, tmp_path: Path, kills: list[int]) -> None:
    def build(folder: str) -> Judge:
        settings = judge_settings(endpoint={"url": server.url, "parallel": 3}, batch_size=4)
        return open_judge_of(JudgeConfig.model_validate(settings), str(tmp_path / folder), seed=3)

    with JudgeServer() as server:
        server.delay_s = 0.01
        for kill in kills:
            judge_until_killed(server, lambda: build("killed"), kill)
        with running(server):
            results = []
            for folder in ("killed", "unharmed"):
                with closing(build(folder)) as judge:
                    results.append((labels(run(judge, contests(20))), report(judge, 20)))
                if folder == "killed":
                    asked = len(server.asked)
    (killed, said), (unharmed, expected) = results
    assert 40 <= asked <= 40 + 3 * len(kills)  # three were in flight, at most
    assert said["usage"]["requests"] >= asked
    assert killed == unharmed == ALL_LATER * 20
    assert {**said, "usage": 0} == {**expected, "usage": 0}
