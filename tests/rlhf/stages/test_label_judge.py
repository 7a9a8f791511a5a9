"""`rlhf label CONFIG` with a judge model: rankings as from any other labeler, and every file says who judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_server import serving
from judge_server import JudgeServer

from rlhf import config
from rlhf.config_schema import DatasetConfig, LabelStage
from rlhf.data.records import read_rankings
from rlhf.errors import ConfigError, JudgeError
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.runs import learned_fingerprint, named_models
from rlhf.stages.label import main
from rlhf.types import Rollout, StopReason

WORDS = [f"w{i}" for i in range(12)]


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with serving(JudgeServer()) as judge:
        yield judge


@pytest.fixture
def stage(server: JudgeServer, tmp_path: Path) -> Callable[..., LabelStage]:
    """10 prompts with 3 responses, the later the better."""
    rollouts = [
        Rollout(
            f"why {p}?",
            " ".join([f"p{p}", *WORDS[: 8 + i]]),
            [p, i],
            [False, True],
            [0.0, -1.0],
            StopReason.EOS,
            f"id{p}",
        )
        for p in range(10)
        for i in range(3)
    ]
    RolloutBuffer(rollouts).to_parquet(tmp_path / "samples.parquet")

    def build(**changes: Any) -> LabelStage:
        endpoint = {"url": server.url, "allow_private": True, "wait_s": 0.001, "attempts": 1}
        judge = {"model": "some/judge", "endpoint": endpoint, "controls": {"per_batch": 0}} | changes
        given = {"run_dir": str(tmp_path / "label"), "rollouts": str(tmp_path / "samples.parquet"), "labeler": "ai"}
        return LabelStage.model_validate(given | {"judge": judge})

    return build


def rankings(cfg: LabelStage, part: str) -> list[Any]:
    return list(read_rankings(DatasetConfig(path=f"{cfg.run_dir}/rankings.{part}.jsonl", format="ranking")))


def test_wins_and_ranks_come_out_as_from_any_labeler(server: JudgeServer, stage: Any) -> None:
    cfg = stage()
    result = main(cfg)
    train, heldout = rankings(cfg, "train"), rankings(cfg, "heldout")
    assert (len(train), len(heldout)) == (8, 2)
    for ranking in [*train, *heldout]:
        assert ranking.ranks == [3, 2, 1]
        assert ranking.wins == [[0.5, 0.0, 0.0], [1.0, 0.5, 0.0], [1.0, 1.0, 0.5]]
        assert ranking.meta["labels"] == "judge"
        assert "some/judge" in ranking.meta["labeler"]
    assert {*result.outputs} == {"train", "heldout"}
    for name in ("rankings.train.jsonl", "judgments.jsonl", "labels_report.json", "judge_report.json", "README.txt"):
        text = (Path(cfg.run_dir) / name).read_text()
        assert "judge" in text.lower()
        assert "some/judge" in text
    lines = [json.loads(line) for line in (Path(cfg.run_dir) / "judgments.jsonl").read_text().splitlines()]
    assert len(lines) == 60
    assert lines[1] == {"judge": "some/judge", "prompt_id": "id0", "first": 1, "second": 0, "p_first": 1.0}


def test_a_prompt_with_a_failure_is_left_out_whole(server: JudgeServer, stage: Any) -> None:
    server.always = lambda first, second: "refusal" if first.startswith("p4 ") and "w9" in second else None
    cfg = stage()
    result = main(cfg)
    assert len(rankings(cfg, "train") + rankings(cfg, "heldout")) == 9
    assert (result.summary["items_unlabeled"], result.summary["prompts"]) == (1, 9)
    assert '"failure": "refusal"' in (Path(cfg.run_dir) / "judgments.jsonl").read_text()


def test_without_any_label_there_are_no_files_to_train_on(server: JudgeServer, stage: Any) -> None:
    server.always = lambda first, second: "refusal" if "w9" in first and "w8" not in second else None
    with pytest.raises(JudgeError, match="none of 10 prompts"):
        main(stage(max_failures=0.5))
    assert not list(Path(stage().run_dir).glob("rankings*"))


def test_a_budget_leaves_what_is_labeled_and_says_that_it_is_not_all(server: JudgeServer, stage: Any) -> None:
    one_by_one = stage().judge.endpoint.model_dump() | {"parallel": 1}
    cfg = stage(budget={"max_requests": 30}, batch_size=2, endpoint=one_by_one)
    with pytest.raises(JudgeError, match="with 5 of 10 prompts to go"):
        main(cfg)
    assert len(rankings(cfg, "train") + rankings(cfg, "heldout")) == 5
    main(stage())
    assert len(server.asked) == 60
    assert len(rankings(cfg, "train") + rankings(cfg, "heldout")) == 10


def test_what_a_judge_may_cost_changes_nothing_that_is_learned(stage: Any) -> None:
    base = learned_fingerprint(stage())
    endpoint = stage().judge.endpoint.model_dump()
    for free in ({"budget": {"max_requests": 5}}, {"endpoint": endpoint | {"url": "http://b/v1", "timeout_s": 1.0}}):
        assert learned_fingerprint(stage(**free)) == base
    for learned in ({"criteria": "x"}, {"answer": "json"}, {"endpoint": endpoint | {"logprobs": False}}):
        assert learned_fingerprint(stage(**learned)) != base
    assert learned_fingerprint(stage(endpoint=None)) != base
    assert (named_models(stage()), named_models(stage(endpoint=None))) == (set(), {"some/judge"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"labeler": "ai"}, "labeler: ai and judge go together"),
        ({"judge": {"model": "m"}, "annotators": [{"name": "a"}]}, "labeler: ai and judge go together"),
        ({}, "labeler: simulated needs annotators"),
        ({"labeler": "ai", "judge": {"model": "m", "answer": "json"}}, "a local model answers by a letter"),
        ({"labeler": "ai", "judge": {"model": "m", "budget": {"max_cost": 1}}}, "max_cost needs prices"),
        (
            {"labeler": "ai", "judge": {"model": "m", "endpoint": {"url": "http://h/v1", "request": {"stream": True}}}},
            "stream cannot be set here",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.validate({"run_dir": "x", "rollouts": "y", **keys}, "label", source="test")
