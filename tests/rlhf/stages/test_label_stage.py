"""The label stage: rollouts are grouped and split by prompt; every file that comes out says "simulated"."""

import json
from itertools import combinations
from pathlib import Path

import pytest

from reward_model.labeling.groups import group_rollouts, split_by_prompt
from rlhf.config_schema import AnnotatorConfig, LabelStage
from rlhf.errors import DataError
from rlhf.rollout.scorers import readability
from rlhf.stages.label import label_rollouts, main
from rlhf.types import Ranking, Rollout, StopReason

ANSWERS = (
    "The sun is a big hot star. It gives us light.",
    "Stars make energy when light atoms join into heavier ones.",
    "Thermonuclear reactions transform hydrogen isotopes into considerably heavier elements.",
)


def rollout(prompt: int, text: str, stop: StopReason = StopReason.EOS) -> Rollout:
    n = len(text.split())
    return Rollout(
        prompt=[{"role": "user", "content": f"Explain topic {prompt}."}],
        response=text,
        tokens=[prompt, *range(n)],
        action_mask=[False] + [True] * n,
        logprobs=[0.0] * (n + 1),
        stop=stop,
        prompt_id=f"id{prompt}",
    )


def rollouts(prompts: int = 20) -> list[Rollout]:
    return [rollout(prompt, text) for prompt in range(prompts) for text in ANSWERS]


def config(**changes: object) -> LabelStage:
    annotators = [
        AnnotatorConfig(name="ann", noise=0.5),
        AnnotatorConfig(name="bob", noise=1.0, left_bias=1.0),
        AnnotatorConfig(name="cyd", noise=1.0, careless=0.9),
    ]
    given = {"run_dir": "unused", "rollouts": "unused", "annotators": annotators, "seed": 3, **changes}
    return LabelStage(**given)  # type: ignore[arg-type]


def test_rankings_carry_what_the_reward_model_needs() -> None:
    result = label_rollouts(rollouts(), config())
    rankings = result.train + result.heldout
    assert len(rankings) == 20
    for ranking in rankings:
        prompt = int(ranking.prompt_id.removeprefix("id"))
        source = [rollout(prompt, text) for text in ANSWERS]
        assert ranking.prompt == source[0].prompt
        assert ranking.responses == list(ANSWERS)
        assert ranking.tokens == [r.tokens for r in source]
        assert ranking.gold_scores == readability(source)
        assert ranking.wins is not None
        for i, j in combinations(range(3), 2):
            assert ranking.wins[i][j] + ranking.wins[j][i] == pytest.approx(1.0)
        assert ranking.meta["labels"] == "simulated"
        assert "readability" in ranking.meta["labeler"]


@pytest.mark.parametrize("aggregate", ["majority", "dawid_skene"])
def test_precise_annotators_rank_by_gold(aggregate: str) -> None:
    annotators = [AnnotatorConfig(name=name, noise=0.01) for name in "abc"]
    result = label_rollouts(rollouts(), config(annotators=annotators, aggregate=aggregate))
    assert all(ranking.ranks == [1, 2, 3] for ranking in result.train + result.heldout)
    assert result.report["agreement_with_gold"]["aggregate"] == 1.0
    assert ("dawid_skene" in result.report) == (aggregate == "dawid_skene")


def test_report_counts_and_annotators() -> None:
    same = [rollout(90, "One and the same.") for _ in range(2)]
    source = [*rollouts(10), rollout(0, ANSWERS[1]), *same]
    report = label_rollouts(source, config()).report
    assert next(iter(report)) == "notice"
    assert "SIMULATED" in report["notice"]
    assert report["counts"] == {
        "prompts": 10,
        "prompts_train": 8,
        "prompts_heldout": 2,
        "prompts_left_out": 1,
        "responses": 30,
        "duplicates_dropped": 2,
        "pairs": 30,
        "pairs_undecided": 0,
        "pairs_gold_tied": 0,
        "judgments": 90,
    }
    assert list(report["annotators"]) == ["ann", "bob", "cyd"]
    assert len(report["pairwise_agreement"]) == 3
    assert report["annotators"]["ann"]["accuracy"] > report["annotators"]["cyd"]["accuracy"]
    assert set(report["dawid_skene"]["confusions"]) == {"ann", "bob", "cyd"}
    json.dumps(report, allow_nan=False)


def test_judgments_point_at_the_responses_of_the_rankings() -> None:
    result = label_rollouts([rollout(0, ANSWERS[0]), *rollouts(2)], config())
    assert len(result.judgments) == 2 * 3 * 3
    for line in result.judgments:
        assert line["simulated"] is True
        assert line["prompt_id"] == f"id{line['item']}"
        assert {line["left"], line["right"]} < {0, 1, 2}
        assert line["choice"] in ("left", "right")


def test_ties_in_gold_are_coin_flips_and_undefined_agreement() -> None:
    source = [rollout(p, f"{text} twice", StopReason.LENGTH) for p in range(4) for text in ANSWERS]
    report = label_rollouts(source, config()).report
    assert report["agreement_with_gold"]["aggregate"] is None
    assert "gold ties" in report["agreement_with_gold"]["notes"]["aggregate"]
    assert report["annotators"]["ann"]["accuracy"] is None


# --- grouping -----------------------------------------------------------------------------------------------


def test_groups_may_be_interleaved_and_of_different_size() -> None:
    source = [rollout(0, "a"), rollout(1, "b"), rollout(0, "c"), rollout(1, "d"), rollout(0, "e")]
    assert [[r.response for r in g.rollouts] for g in group_rollouts(source)] == [["a", "c", "e"], ["b", "d"]]


def test_of_identical_texts_the_first_is_kept() -> None:
    first, second = rollout(0, "same"), rollout(0, "same", StopReason.LENGTH)
    (group,) = group_rollouts([first, second, rollout(0, "other")])
    assert group.rollouts[0] is first
    assert (len(group.rollouts), group.duplicates) == (2, 1)


def test_a_single_response_is_an_error() -> None:
    with pytest.raises(DataError, match=r"'id7' has a single response[\s\S]*completions_per_prompt"):
        label_rollouts([*rollouts(2), rollout(7, "alone")], config())


def test_nothing_but_duplicates_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to compare"):
        label_rollouts([rollout(0, "same"), rollout(0, "same")], config())


def test_no_rollouts_are_an_error() -> None:
    with pytest.raises(DataError, match="none of 0 prompts"):
        label_rollouts([], config())


def test_one_id_for_two_prompts_is_an_error() -> None:
    other = rollout(1, "b")
    other.prompt_id = "id0"
    with pytest.raises(DataError, match="two different prompts"):
        group_rollouts([rollout(0, "a"), other])


# --- split --------------------------------------------------------------------------------------------------


def rankings(n: int) -> list[Ranking]:
    return [Ranking(f"prompt {k}", ["a", "b"], [1, 2], prompt_id=f"p{k}") for k in range(n)]


@pytest.mark.parametrize(
    ("n", "fraction", "heldout"),
    [(20, 0.15, 3), (100, 0.1, 10), (20, 0.0, 0), (3, 0.01, 1), (1, 0.5, 0), (2, 0.99, 1)],
)
def test_split_is_exact_disjoint_and_complete(n: int, fraction: float, heldout: int) -> None:
    train, held = split_by_prompt(rankings(n), fraction, seed=0)
    assert len(held) == heldout
    assert {r.prompt_id for r in train} | {r.prompt_id for r in held} == {f"p{k}" for k in range(n)}
    assert not {r.prompt_id for r in train} & {r.prompt_id for r in held}


def test_split_is_stable_under_order_and_moves_with_the_seed() -> None:
    _, held = split_by_prompt(rankings(40), 0.25, seed=1)
    _, reversed_held = split_by_prompt(rankings(40)[::-1], 0.25, seed=1)
    _, other = split_by_prompt(rankings(40), 0.25, seed=2)
    assert {r.prompt_id for r in held} == {r.prompt_id for r in reversed_held}
    assert {r.prompt_id for r in held} != {r.prompt_id for r in other}
    # Literal ids: the split must not change between versions of the program or of Python.
    assert {r.prompt_id for r in split_by_prompt(rankings(10), 0.3, seed=0)[1]} == {"p0", "p3", "p6"}


def test_rankings_of_one_prompt_stay_together() -> None:
    twice = rankings(10) + rankings(10)
    train, held = split_by_prompt(twice, 0.3, seed=0)
    assert len(held) == 6
    assert not {r.prompt_id for r in train} & {r.prompt_id for r in held}


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture
def labeled(tmp_path: Path) -> tuple[Path, LabelStage]:
    from rlhf.rollout.buffer import RolloutBuffer

    parquet = tmp_path / "rollouts.parquet"
    RolloutBuffer(rollouts()).to_parquet(str(parquet))
    return tmp_path / "label", config(run_dir=str(tmp_path / "label"), rollouts=str(parquet))


def test_main_writes_files_that_all_say_simulated(labeled: tuple[Path, LabelStage]) -> None:
    folder, cfg = labeled
    result = main(cfg)
    assert {path.name for path in folder.iterdir()} == {
        "README.txt",
        "judgments.jsonl",
        "labels_report.json",
        "rankings.heldout.jsonl",
        "rankings.train.jsonl",
    }
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8")
        pieces = text.splitlines() if path.suffix == ".jsonl" else [text]
        assert pieces
        assert all("simulated" in piece.lower() for piece in pieces), path
    assert result.summary["labels"] == "simulated"
    assert result.summary["judgments"] == 180
    assert result.outputs == {name: str(folder / f"rankings.{name}.jsonl") for name in ("train", "heldout")}


def test_written_rankings_are_read_back_whole(labeled: tuple[Path, LabelStage]) -> None:
    from rlhf.config_schema import DatasetConfig
    from rlhf.data.records import read_rankings

    _, cfg = labeled
    outputs = main(cfg).outputs
    expected = label_rollouts(rollouts(), cfg)
    assert list(read_rankings(DatasetConfig(path=outputs["train"]))) == expected.train
    assert list(read_rankings(DatasetConfig(path=outputs["heldout"]))) == expected.heldout


def test_the_readmes_least_line_is_a_valid_ranking(labeled: tuple[Path, LabelStage], tmp_path: Path) -> None:
    from rlhf.config_schema import DatasetConfig
    from rlhf.data.records import read_rankings

    folder, cfg = labeled
    main(cfg)
    line = next(part for part in (folder / "README.txt").read_text().splitlines() if '{"prompt"' in part)
    by_hand = tmp_path / "by_hand.jsonl"
    by_hand.write_text(line[line.index("{") :] + "\n")
    (ranking,) = read_rankings(DatasetConfig(path=str(by_hand), format="ranking"))
    assert ranking.ranks == [2, 1]


def test_the_same_seed_writes_the_same_bytes(labeled: tuple[Path, LabelStage]) -> None:
    folder, cfg = labeled
    main(cfg)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    main(cfg)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_without_heldout_no_heldout_file_is_offered(labeled: tuple[Path, LabelStage]) -> None:
    _, cfg = labeled
    assert set(main(cfg.model_copy(update={"heldout_fraction": 0.0})).outputs) == {"train"}


def test_held_out_rollouts_are_labeled_alike_and_kept_apart() -> None:
    everything = rollouts(prompts=12)
    ids = sorted({r.prompt_id for r in everything})
    training = [r for r in everything if r.prompt_id not in ids[:3]]
    heldout = [r for r in everything if r.prompt_id in ids[:3]]
    result = label_rollouts(training, config(), heldout)
    assert {r.prompt_id for r in result.heldout} == set(ids[:3])
    assert {r.prompt_id for r in result.train} == set(ids[3:])
    assert result.report["counts"]["prompts"] == 12
    with pytest.raises(DataError, match="1 prompts are in rollouts and in heldout_rollouts"):
        label_rollouts(everything[:2] + training, config(), heldout[:2])


def test_earlier_labels_are_read_from_their_folder(labeled: tuple[Path, LabelStage], tmp_path: Path) -> None:
    _, first = labeled
    main(first)
    second = config(run_dir=str(tmp_path / "second"), rollouts=first.rollouts, seed=4, earlier=first.run_dir)
    main(second)
    for name in ("rankings.train.jsonl", "rankings.heldout.jsonl"):
        before, now = (Path(cfg.run_dir, name).read_text() for cfg in (first, second))
        assert now.startswith(before)
        assert len(now.splitlines()) == 2 * len(before.splitlines())


def test_earlier_labels_that_are_not_there_are_named(labeled: tuple[Path, LabelStage], tmp_path: Path) -> None:
    _, first = labeled
    missing = config(run_dir=str(tmp_path / "x"), rollouts=first.rollouts, earlier=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere"):
        main(missing)
