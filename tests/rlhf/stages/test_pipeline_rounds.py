"""A pipeline in rounds: which file feeds which, what runs again when, and that nothing leaks; once on a tiny model."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from reward_model.labeling.records import Answer
from reward_model.labeling.store import LabelStore
from rlhf import config
from rlhf.data.records import read_rankings
from rlhf.dry_run import describe
from rlhf.errors import ConfigError
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.runs import RunOptions, learned_fingerprint
from rlhf.stages import pipeline

SECOND = ["round_2/sample", "round_2/label", "round_2/reward", "round_2/ppo"]


def load(file: Path, *overrides: str) -> Any:
    return config.load(file, "pipeline", list(overrides))


def run(file: Path, *overrides: str) -> None:
    pipeline.main(load(file, *overrides), RunOptions())


def to_run(file: Path, *overrides: str) -> list[str]:
    return [planned.name for planned in pipeline.plan(load(file, *overrides)) if not planned.done]


@pytest.fixture
def plain(pipeline_file: Any, tmp_path: Path) -> Path:
    """A YAML of three rounds that nothing has run."""
    return pipeline_file(tmp_path, rounds=3)


# --- the plan ---------------------------------------------------------------------------------------------------


def test_which_file_feeds_which(plain: Path) -> None:
    root = str(plain.parent / "run")
    checked = pipeline.check(load(plain))
    assert list(checked) == [
        *("sft", "sample", "label", "reward", "ppo"),
        *SECOND,
        *("round_3/sample", "round_3/label", "round_3/reward", "round_3/ppo"),
        *("evaluate", "report"),
    ]
    third = {stage: checked[f"round_3/{stage}"] for stage in ("sample", "label", "reward", "ppo")}
    assert third["sample"].model == f"{root}/round_2/ppo/final"
    assert third["label"].rollouts == f"{root}/round_3/sample/rollouts/samples.parquet"
    assert third["label"].earlier == f"{root}/round_2/label"
    assert third["reward"].model == f"{root}/sft/final"
    assert third["reward"].dataset.path == f"{root}/round_3/label/rankings.train.jsonl"
    assert third["reward"].eval_dataset.path == f"{root}/round_3/label/rankings.heldout.jsonl"
    assert third["ppo"].model == f"{root}/round_2/ppo/final"
    assert third["ppo"].critic == f"{root}/round_2/ppo/critic"
    assert third["ppo"].reference == f"{root}/sft/final"
    assert third["ppo"].reward_model == f"{root}/round_3/reward/final"
    second = {stage: checked[f"round_2/{stage}"] for stage in ("label", "ppo")}
    assert second["label"].earlier == f"{root}/label"
    assert (second["ppo"].model, second["ppo"].critic) == (f"{root}/ppo/final", f"{root}/ppo/critic")
    assert checked["evaluate"].policies == {
        "base": checked["sft"].model,
        "sft": f"{root}/sft/final",
        "round 1": f"{root}/ppo/final",
        "round 2": f"{root}/round_2/ppo/final",
        "ppo": f"{root}/round_3/ppo/final",
    }
    assert checked["evaluate"].reward_model == f"{root}/round_3/reward/final"
    assert checked["report"].ppo_dir == f"{root}/round_3/ppo"
    assert checked["report"].round_dirs == [root, f"{root}/round_2", f"{root}/round_3"]


def test_rounds_draw_with_seeds_of_their_own_but_keep_the_sides_of_prompts(plain: Path) -> None:
    checked = pipeline.check(load(plain, "seed=4294967295"))
    seeds = [checked[name].seed for name in ("ppo", "round_2/ppo", "round_3/ppo")]
    assert len(set(seeds)) == 3
    assert checked["label"].seed == checked["ppo"].seed == 4294967295


@pytest.mark.parametrize(
    ("overrides", "models"),
    [
        (["sample.completions_per_prompt=4"], ["ppo/final", "sft/final"]),
        (["sample.completions_per_prompt=3"], ["ppo/final"]),
        (["later_rounds.sample.completions_per_prompt=2"], ["ppo/final", "sft/final"]),
        (["later_rounds.sample={further_models: [x, y]}"], ["ppo/final", "x", "y"]),
        (["sample.further_models=[x, y]", "later_rounds.sample.completions_per_prompt=2"], ["ppo/final", "sft/final"]),
    ],
)
def test_half_of_the_answers_come_from_the_policy_before(plain: Path, overrides: list[str], models: list[str]) -> None:
    sample = pipeline.check(load(plain, *overrides))["round_2/sample"]
    prefix = str(plain.parent / "run") + "/"
    assert [name.removeprefix(prefix) for name in [sample.model, *sample.further_models]] == models


def test_later_rounds_change_single_keys_of_a_block(plain: Path) -> None:
    checked = pipeline.check(load(plain, "later_rounds.ppo.sampling.temperature=0.5", "later_rounds.ppo.steps=1"))
    first, later = checked["ppo"], checked["round_3/ppo"]
    assert (first.steps, later.steps, first.sampling.temperature, later.sampling.temperature) == (2, 1, 1.0, 0.5)
    assert later.sampling.max_new_tokens == first.sampling.max_new_tokens == 8, "beside it the block's keys stay"


@pytest.mark.parametrize("key", ["sample.model", "label.rollouts", "ppo.model", "ppo.reward_model", "ppo.critic"])
def test_what_leads_from_round_to_round_is_the_pipelines(plain: Path, key: str) -> None:
    block, _, name = key.partition(".")
    with pytest.raises(ConfigError, match=f"block '{block}' of the pipeline: {name} leads from round to round"):
        pipeline.check(load(plain, f"{key}=x"))
    assert pipeline.check(load(plain, f"{key}=x", "rounds=1"))


def test_an_error_is_said_once_and_one_of_later_rounds_with_its_round(plain: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        pipeline.check(load(plain, "ppo.stepz=1", "later_rounds.reward.epochz=1"))
    assert caught.value.message.count("stepz") == caught.value.message.count("epochz") == 1
    assert "block 'reward' of the pipeline, round_2" in caught.value.message
    with pytest.raises(ConfigError, match=r"later_rounds\.sft"):
        load(plain, "later_rounds.sft.epochs=2")


def test_a_dry_run_shows_all_rounds(plain: Path, capsys: Any) -> None:
    describe("pipeline", load(plain))
    out = capsys.readouterr().out.replace("\n", "")
    for name in ("round_2/sample", "round_3/ppo"):
        assert f"{name} -> {plain.parent}/run/{name}: to run" in out
    assert "earlier: " in out
    assert not (plain.parent / "run").exists()


OLD_KEYS = {
    "label": "b5132a9a4b1744f0aae26f8f60f2776b525c7eedd102392529909efea540f68a",
    "reward": "181dd18547ab3a58727bb60487b6b65e22e6967800d31ca71b53e9c4f288e199",
    "ppo": "2cbf53cd86383e4e1b8618349fc25baf0f23fe052c821ea257cb1f8bcc791113",
    "report": "523fc4e0a6a32db4f3b1157ac5a1073b5b694ae74e44a96412d2dc2aa97de15a",
}
"""`learned_fingerprint` of the configurations below, by the version before there were rounds."""


def test_keys_of_runs_from_before_there_were_rounds_are_the_same() -> None:
    blocks: dict[str, dict[str, Any]] = {
        "label": {"rollouts": "r.parquet", "annotators": [{"name": "ada"}]},
        "reward": {"model": "m", "dataset": {"path": "d.jsonl"}},
        "ppo": {"model": "m", "reward_model": "r", "prompts": {"path": "p.jsonl"}},
        "report": {"evaluate_dir": "e"},
    }
    for stage, block in blocks.items():
        cfg = config.validate({"run_dir": "x", **block}, stage, source="test")
        assert learned_fingerprint(cfg) == OLD_KEYS[stage], stage
    critic = {"run_dir": "x", **blocks["ppo"], "critic": "c"}
    assert learned_fingerprint(config.validate(critic, "ppo", source="test")) != OLD_KEYS["ppo"]


# --- a run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(pipeline_file: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML of two rounds; the first test on it runs them, with an end in the middle."""
    return pipeline_file(tmp_path_factory.mktemp("rounds"), rounds=2)


@pytest.fixture
def finished(started: Path, request: pytest.FixtureRequest) -> Path:
    """The same, run to its end: here, where that test was not chosen."""
    if not (started.parent / "run" / "report.html").exists():
        request.getfixturevalue("stages_run")
        run(started)
    return started


class Killed(BaseException):
    pass


def test_one_round_then_two_killed_between_stages_and_gone_on(
    started: Path, stages_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(started, "rounds=1")
    assert stages_run == list(pipeline.ORDER)
    stages_run.clear()
    assert to_run(started) == [*SECOND, "evaluate", "report"], "the first round is done already"
    inner = pipeline.subprocess.run

    def killed_at_reward(command: list[str], **options: Any) -> Any:
        if command[3] == "reward":
            raise Killed
        return inner(command, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "subprocess", SimpleNamespace(run=killed_at_reward))
        with pytest.raises(Killed):
            run(started)
    assert to_run(started) == [*SECOND[2:], "evaluate", "report"]
    stages_run.clear()
    run(started)
    assert stages_run == ["reward", "ppo", "evaluate", "report"]
    stages_run.clear()
    run(started)
    assert stages_run == []


def test_labels_add_up_and_no_prompt_changes_its_side(finished: Path) -> None:
    folder = finished.parent / "run"

    def rankings(name: str) -> list[Any]:
        return list(read_rankings(config.validate(dataset(folder / name), "reward", source="test").dataset))

    first, both = rankings("label/rankings.train.jsonl"), rankings("round_2/label/rankings.train.jsonl")
    held, both_held = rankings("label/rankings.heldout.jsonl"), rankings("round_2/label/rankings.heldout.jsonl")
    assert both[: len(first)] == first
    assert both_held[: len(held)] == held
    assert len(both) > len(first)
    assert len(both_held) > len(held)
    ids = [{ranking.prompt_id for ranking in part} for part in (first, both, held, both_held)]
    assert ids[0] == ids[1]
    assert ids[2] == ids[3]
    assert not ids[1] & ids[3]
    trained = json.loads((folder / "round_2" / "reward" / "result.json").read_text())["summary"]["train_items"]
    assert trained == len(both), "a prompt's rankings of two rounds are two items"


def dataset(path: Path) -> dict[str, Any]:
    return {"run_dir": "x", "model": "m", "dataset": {"path": str(path)}}


def test_the_second_round_samples_and_trains_the_policy_of_the_first(finished: Path, metrics_of: Any) -> None:
    folder = finished.parent / "run"
    answers = RolloutBuffer.from_parquet(folder / "round_2" / "sample" / "rollouts" / "samples.parquet").rollouts
    assert {answer.policy for answer in answers} == {f"{folder}/ppo/final"}
    first, second = metrics_of(folder / "ppo"), metrics_of(folder / "round_2" / "ppo")
    assert first[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert second[0]["objective/kl"] > 0.01, "against the SFT policy, not against the one that it starts from"


def test_the_report_has_every_round(finished: Path) -> None:
    folder = finished.parent / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"base", "sft", "round 1", "ppo"} <= summary["policy"].keys()
    assert [row["name"] for row in summary["rounds"]] == ["SFT", "Round 1", "Round 2"]
    assert summary["rounds"][1]["kl"] == summary["policy"]["round 1"]["kl"]
    assert summary["rounds"][2]["gold_score"] == summary["policy"]["ppo"]["gold_score"]
    labels = [json.loads((folder / d / "label" / "result.json").read_text())["summary"] for d in (".", "round_2")]
    assert [row["judgments"] for row in summary["rounds"][1:]] == [part["judgments"] for part in labels]
    results = [file for file in folder.rglob("*/result.json") if ".old-" not in str(file)]
    walls = [json.loads(file.read_text())["wall_s"] for file in results]
    assert len(walls) == 10
    assert summary["wall_s"] == pytest.approx(sum(walls), abs=0.05), "of all rounds"
    page = (folder / "report.html").read_text()
    assert "Round by round" in page
    assert "ppo 1" in page


def test_labels_of_the_first_round_edited_by_hand_reach_all_later_stages(finished: Path, tmp_path: Path) -> None:
    rankings = finished.parent / "run" / "label" / "rankings.train.jsonl"
    shutil.copy(rankings, tmp_path / "kept")
    try:
        rows = [json.loads(line) for line in rankings.read_text().splitlines()]
        rows[0]["ranks"] = rows[0]["ranks"][::-1]
        rankings.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert to_run(finished)[0] == "reward"
        cfg = load(finished)
        stage = pipeline.check(cfg)["round_2/label"]
        edited = pipeline.identify("round_2/label", stage, cfg, upstream="", upstream_done=True).key
    finally:
        shutil.copy(tmp_path / "kept", rankings)
    assert edited != pipeline.identify("round_2/label", stage, cfg, upstream="", upstream_done=True).key
    assert to_run(finished) == []


def test_a_change_of_later_rounds_leaves_the_first_one_alone(finished: Path) -> None:
    assert to_run(finished, "later_rounds.ppo.gamma=0.9") == ["round_2/ppo", "evaluate", "report"]
    assert to_run(finished, "ppo.gamma=0.9") == ["ppo", *SECOND, "evaluate", "report"]
    assert to_run(finished, "rounds=3")[0] == "round_3/sample"


def test_a_failing_stage_of_a_later_round_is_named_with_it(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    with pytest.raises(Exception, match="stage round_3/sample ended with exit code 3"):
        run(finished, "rounds=3")


def annotate(project: str, most: int) -> int:
    """A scripted annotator who likes short answers; how many items were served."""
    with LabelStore.open(config.load(project, "labeling", [])) as store:
        user = store.ensure_user("ann", role="annotator")
        for count in range(most):
            task = store.next_task(user)
            if task is None:
                return count
            left, right = map(len, task.responses)
            answer = Answer("compare", value=(right < left) - (right > left))
            store.submit(user, task.assignment_id, answer, f"s{task.assignment_id}")
    return most


def test_people_label_every_round_and_the_pipeline_waits_for_them(
    pipeline_file: Any, stages_run: list[str], tmp_path: Path, capsys: Any
) -> None:
    project = str(tmp_path / "project.yaml")
    Path(project).write_text(yaml.safe_dump({"run_dir": str(tmp_path / "project"), "repeat_fraction": 0}))
    label = {"labeler": "people", "project": project, "heldout_fraction": 0.25, "aggregate": "majority"}
    file = pipeline_file(tmp_path, rounds=2, label=label)
    for expected, most in ((["sft", "sample", "label"], 5), (["label"], 100)):
        with pytest.raises(SystemExit) as ended:
            run(file)
        assert ended.value.code == 75
        assert stages_run == expected
        assert to_run(file)[0] == "label"
        stages_run.clear()
        annotate(project, most)
    with pytest.raises(SystemExit):
        run(file)
    assert stages_run == ["label", "reward", "ppo", "sample", "label"], "the second round has answers of its own"
    assert annotate(project, 100) > 5
    stages_run.clear()
    run(file)
    assert stages_run == ["label", "reward", "ppo", "evaluate", "report"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["labels"] == "people"
    first, both = (
        (tmp_path / "run" / folder / "rankings.train.jsonl").read_text() for folder in ("label", "round_2/label")
    )
    assert both.startswith(first)
    assert len(both) > len(first)
