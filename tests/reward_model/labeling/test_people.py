"""The label stage with people: answers into the project, a calm end until they are labeled, then rankings."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from reward_model.labeling import accounts, people
from reward_model.labeling.records import Answer, Task
from reward_model.labeling.store import LabelStore
from rlhf import config
from rlhf.cli import app
from rlhf.errors import ConfigError, LabelsPending
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.types import Rollout, StopReason

ANSWERS = ("one word", "two short words", "three quite long words", "four")
"""The scripted annotator prefers long answers: 2, 1, 0, 3."""


def rollout(prompt: int, text: str) -> Rollout:
    n = len(text.split())
    return Rollout(
        prompt=f"prompt {prompt}",
        response=text,
        tokens=[7, *range(n)],
        action_mask=[False] + [True] * n,
        logprobs=[0.0] * (n + 1),
        stop=StopReason.EOS,
        prompt_id=f"id{prompt}",
        policy="sft",
    )


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., Any]:
    """`stage(kind="pair", ...)`: a label stage on six prompts and its project; further keywords are the project's."""

    def build(
        answers: tuple[str, ...] = ANSWERS, prompts: range = range(6), name: str = "label", **changes: Any
    ) -> Any:
        RolloutBuffer([rollout(p, text) for p in prompts for text in answers]).to_parquet(tmp_path / f"{name}.parquet")
        project = {"run_dir": str(tmp_path / "project"), "repeat_fraction": 0, **changes}
        (tmp_path / "project.yaml").write_text(yaml.safe_dump(project))
        block = {"run_dir": str(tmp_path / name), "rollouts": str(tmp_path / f"{name}.parquet")}
        block |= {"labeler": "people", "project": str(tmp_path / "project.yaml"), "heldout_fraction": 0.34}
        block |= {"aggregate": "majority"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(block))
        return config.validate(block, "label", source="test")

    return build


def by_length(task: Task) -> Answer:
    lengths = [len(text) for text in task.responses]
    if task.kind == "pair":
        return Answer("compare", value=(lengths[1] > lengths[0]) - (lengths[1] < lengths[0]))
    return Answer("rank", ranks=[1 + sum(other > own for other in lengths) for own in lengths])


def annotate(cfg: Any, name: str, *, most: int = 1000, answer: Callable[[Task], Answer] = by_length) -> int:
    """A scripted annotator works through what the project serves; how many items it labeled."""
    project = config.load(cfg.project, "labeling", [])
    with LabelStore.open(project) as store:
        user = store.ensure_user(name, role="annotator")
        for count in range(most):
            task = store.next_task(user)
            if task is None:
                return count
            store.submit(user, task.assignment_id, answer(task), f"{name}-{task.assignment_id}")
    return most


def label(cfg: Any) -> Any:
    rollouts = RolloutBuffer.from_parquet(cfg.rollouts).rollouts
    return people.people_rollouts(rollouts, cfg)


def test_what_is_missing_is_said_and_said_again_until_all_is_labeled(stage: Any) -> None:
    cfg = stage(queue={"kind": "ranking"}, judgments_per_item=2)
    for expected, (name, most) in {"0 of 6": ("ann", 4), "0 of 6 ": ("bob", 3), "3 of 6": ("ann", 9)}.items():
        with pytest.raises(LabelsPending, match=f"^{expected.strip()} items are labeled; the others") as caught:
            label(cfg)
        assert f"rlhf label serve {cfg.project}" in caught.value.fix
        annotate(cfg, name, most=most)
    annotate(cfg, "bob")
    result = label(cfg)
    assert len(result.train) + len(result.heldout) == 6
    assert result.report["counts"]["judgments"] == 12
    assert result.report["counts"]["annotators"] == 2
    assert not {r.prompt_id for r in result.train} & {r.prompt_id for r in result.heldout}


def test_rankings_say_what_was_clicked_and_keep_the_sampled_tokens(stage: Any) -> None:
    cfg = stage(queue={"kind": "ranking"})
    with pytest.raises(LabelsPending):
        label(cfg)
    annotate(cfg, "ann")
    result = label(cfg)
    for ranking in [*result.train, *result.heldout]:
        order = [ANSWERS.index(text) for text in ranking.responses]
        assert sorted(order) == [0, 1, 2, 3]
        assert ranking.ranks == [(3, 2, 1, 4)[i] for i in order]
        assert ranking.wins is not None
        assert ranking.wins[order.index(2)] == [0.5 if i == 2 else 1.0 for i in order]
        assert ranking.tokens == [[7, *range(len(text.split()))] for text in ranking.responses]
        assert ranking.meta["labels"] == "people"


def test_pairs_are_chosen_once_and_for_all(stage: Any) -> None:
    cfg = stage(queue={"kind": "pair", "pairs_per_prompt": 2})
    for _ in range(2):
        with pytest.raises(LabelsPending, match=r"^0 of 12 items"):
            label(cfg)
    annotate(cfg, "ann")
    result = label(cfg)
    rankings = [*result.train, *result.heldout]
    assert len(rankings) == 12
    assert len({(r.prompt_id, *r.responses) for r in rankings}) == 12
    for ranking in rankings:
        first, second = map(len, ranking.responses)
        assert ranking.ranks == ([1, 2] if first > second else [2, 1])
    assert len({tuple(r.responses) for r in rankings}) > 2, "not the same pairs of every prompt"


def test_an_item_wants_as_many_judgments_as_when_it_was_queued(stage: Any) -> None:
    """The store serves no more of it, so waiting for more would have no end."""
    first = stage(queue={"kind": "ranking"})
    with pytest.raises(LabelsPending):
        label(first)
    annotate(first, "ann")
    more = stage(queue={"kind": "ranking"}, judgments_per_item=2)
    assert label(more).report["counts"]["judgments"] == 6


def assert_one_of_six_is_left_out(cfg: Any) -> None:
    """Once the others are labeled."""
    annotate(cfg, "ann")
    result = label(cfg)
    assert len(result.train) + len(result.heldout) == 5
    assert result.report["counts"]["items_left_out"] == 1


def test_flagged_items_do_not_hold_the_pipeline_up(stage: Any) -> None:
    cfg = stage(queue={"kind": "ranking"})
    with pytest.raises(LabelsPending):
        label(cfg)
    annotate(cfg, "ann", most=1, answer=lambda _: Answer("flag", notes="broken"))
    with pytest.raises(LabelsPending, match="0 of 6 items are labeled, 1 are flagged or retired"):
        label(cfg)
    assert_one_of_six_is_left_out(cfg)


def skip(task: Task) -> Answer:
    return Answer("skip")


def test_an_item_that_everybody_skipped_is_done_without_a_label(stage: Any) -> None:
    """Admins may label, too: the item is before them before it is given up."""
    cfg = stage(queue={"kind": "ranking"})
    with pytest.raises(LabelsPending):
        label(cfg)
    annotate(cfg, "ann", most=2, answer=skip)
    annotate(cfg, "ann", most=3)
    annotate(cfg, "bob", most=1, answer=skip)
    with LabelStore.open(config.load(cfg.project, "labeling", [])) as store:
        accounts.accept_invite(store, accounts.create_invite(store, "admin", None), "root", "long password")
        first, second = store.items()[:2]
        elsewhere = {"presentation": 0, "submission_id": "imported-1"}  # who comes with a file is nobody to wait for
        store.record("imported", "person", second.key, [0, 1, 2, 3], Answer("skip"), **elsewhere)
    with pytest.raises(LabelsPending, match="3 of 6 items are labeled; the others wait for people") as caught:
        label(cfg)
    assert "not yet seen by root: item 1." in caught.value.message
    assert "not yet seen by bob, root: item 2." in caught.value.message
    annotate(cfg, "root", answer=skip)
    annotate(cfg, "bob")
    result = label(cfg)
    counts = result.report["counts"]
    assert len(result.train) + len(result.heldout) == 5
    assert (counts["items_left_out"], counts["items_skipped_by_all"]) == (1, 1)
    assert first.key not in {line["item"] for line in result.judgments}


def test_who_labels_alone_skips_for_everybody(stage: Any) -> None:
    cfg = stage(queue={"kind": "ranking"})
    with pytest.raises(LabelsPending):
        label(cfg)
    annotate(cfg, "local", most=6, answer=skip)
    with pytest.raises(LabelsPending, match="0 of 6 items are labeled, 6 were skipped by everybody; no item") as caught:
        label(cfg)
    assert f"rlhf label invite {cfg.project}" in caught.value.fix
    annotate(cfg, "another", most=6)
    assert label(cfg).report["counts"]["items_skipped_by_all"] == 0


def test_items_that_nobody_is_left_to_judge_once_more_are_named(stage: Any) -> None:
    cfg = stage(queue={"kind": "ranking"}, judgments_per_item=2)
    with pytest.raises(LabelsPending):
        label(cfg)
    annotate(cfg, "ann")
    with pytest.raises(LabelsPending) as caught:
        label(cfg)
    assert caught.value.message == (
        "0 of 6 items are labeled; the others wait for people. "
        "Answered by everybody, with fewer judgments than asked for: items 1, 2, 3, 4, 5, 6."
    )
    assert f"invite another annotator with `rlhf label invite {cfg.project}`" in caught.value.fix


def test_an_item_that_is_a_gold_question_already_is_left_out(stage: Any) -> None:
    """Its answer came by `rlhf label import --gold`. Gold questions are not served here: nobody could end the wait."""
    cfg = stage(queue={"kind": "ranking"}, gold={"fraction": 0})
    project = config.load(cfg.project, "labeling", [])
    with LabelStore.open(project) as store:
        store.add_items([replace(people.items_of(cfg, project)[0], gold_ranks=[1, 2, 3, 4])])
    with pytest.raises(LabelsPending, match="0 of 6 items are labeled, 1 are gold questions; the others wait"):
        label(cfg)
    assert_one_of_six_is_left_out(cfg)


def test_judges_and_repeats_do_not_count(stage: Any) -> None:
    cfg = stage(queue={"kind": "pair"}, repeat_fraction=1.0, repeat_after=1)
    with pytest.raises(LabelsPending):
        label(cfg)
    with LabelStore.open(config.load(cfg.project, "labeling", [])) as store:
        for number, item in enumerate(store.items()):
            answer = Answer("compare", value=1)
            store.record("judge", "judge", item.key, [0, 1], answer, presentation=0, submission_id=f"j{number}")
    with pytest.raises(LabelsPending, match=r"^0 of 6"):
        label(cfg)
    assert annotate(cfg, "ann") > 6, "repeats among them"
    assert label(cfg).report["counts"]["judgments"] == 6


def test_two_rounds_share_a_project_and_what_both_have_is_asked_once(stage: Any) -> None:
    first = stage(queue={"kind": "ranking"})
    with pytest.raises(LabelsPending):
        label(first)
    annotate(first, "ann")
    label(first)
    second = stage(prompts=range(4, 9), name="again", queue={"kind": "ranking"})
    with pytest.raises(LabelsPending, match=r"^2 of 5"):
        label(second)
    annotate(second, "ann")
    result = label(second)
    assert {r.prompt_id for r in [*result.train, *result.heldout]} == {f"id{n}" for n in range(4, 9)}


def test_a_held_out_prompt_stays_so_where_its_item_was_there_under_another_name(stage: Any, tmp_path: Path) -> None:
    """As an import names its prompts by their text: trained on, it would be what the reward model is tested on."""
    held = stage(prompts=range(6, 8), name="held")
    cfg = stage(queue={"kind": "ranking"}).model_copy(update={"heldout_rollouts": held.rollouts})
    with LabelStore.open(config.load(cfg.project, "labeling", [])) as store:
        known = people.items_of(cfg, config.load(cfg.project, "labeling", []))
        store.add_items(replace(item, prompt_id=f"other {item.prompt_id}") for item in known)
    heldout = RolloutBuffer.from_parquet(held.rollouts).rollouts
    annotate(cfg, "ann")
    result = people.people_rollouts(RolloutBuffer.from_parquet(cfg.rollouts).rollouts, cfg, heldout)
    assert {ranking.prompt_id for ranking in result.heldout} == {"id6", "id7"}
    assert {ranking.prompt_id for ranking in result.train} == {f"id{n}" for n in range(6)}


def test_the_command_ends_calmly_with_a_code_of_its_own_and_then_writes_rankings(stage: Any, tmp_path: Path) -> None:
    cfg = stage(queue={"kind": "ranking"})
    file = str(tmp_path / "label.yaml")
    dry = CliRunner().invoke(app, ["label", file, "--dry-run"])
    assert f"project: {cfg.project}" in dry.output.replace("\n", "")
    assert not (tmp_path / "project").exists()
    waiting = CliRunner().invoke(app, ["label", file])
    assert waiting.exit_code == 75
    assert "0 of 6 items are labeled" in waiting.output
    assert f"rlhf label serve {cfg.project}" in waiting.output
    assert not (tmp_path / "label" / "result.json").exists()
    annotate(cfg, "ann")
    done = CliRunner().invoke(app, ["label", file])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "label" / "rankings.train.jsonl").read_text().splitlines()]
    assert all(row["ranks"] == [(3, 2, 1, 4)[ANSWERS.index(text)] for text in row["responses"]] for row in rows)
    assert "given by people" in (tmp_path / "label" / "README.txt").read_text()
    lines = [json.loads(line) for line in (tmp_path / "label" / "judgments.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert all(sorted(line["ranks_by_response"]) == [1, 2, 3, 4] and line["annotator"] == "ann" for line in lines)
    said = {line["prompt_id"]: line["ranks_by_response"] for line in lines}
    assert all(row["ranks"] == said[row["prompt_id"]] for row in rows)


def test_people_need_a_project_and_a_project_people() -> None:
    block = {"run_dir": "x", "rollouts": "r.parquet"}
    for wrong in ({"labeler": "people"}, {"project": "p.yaml", "annotators": [{"name": "ann"}]}):
        with pytest.raises(ConfigError, match="go together"):
            config.validate({**block, **wrong}, "label", source="test")
