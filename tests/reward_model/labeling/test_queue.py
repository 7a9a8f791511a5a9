"""Which responses are put before annotators: distinct ones, some drawn blindly, the others where models disagree."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reward_model import train
from reward_model.labeling import queue
from reward_model.labeling.preferences import is_held_out
from reward_model.labeling.queue import Pool, choose_items, doubts, interleave, read_pools
from reward_model.labeling.records import Candidate
from reward_model.labeling.store import LabelStore
from rlhf.config_labeling import LabelingStage
from rlhf.data.fields import as_chat
from rlhf.data.records import prompt_id
from rlhf.errors import ConfigError, DataError
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.runs import RunOptions
from rlhf.types import Rollout, StopReason


def rollout(
    prompt: str, response: str, *, policy: str = "sft", step: int = 0, tokens: list[int] | None = None
) -> Rollout:
    tokens = tokens or [5, 6]
    mask = [False, *[True] * (len(tokens) - 1)]
    return Rollout(
        prompt, response, tokens, mask, [0.0] * len(tokens), StopReason.EOS, prompt, policy=policy, step=step
    )


def pools(prompts: int, responses: int) -> list[Pool]:
    return [Pool(f"p{i}", f"p{i}", [Candidate(f"answer {i} {k}") for k in range(responses)]) for i in range(prompts)]


def stage(**queue_keys: Any) -> LabelingStage:
    return LabelingStage.model_validate({"run_dir": "unused", "judgments_per_item": 2, "queue": queue_keys})


def texts(item: Any) -> tuple[str, ...]:
    return tuple(sorted(response.text for response in item.responses))


def test_responses_of_all_files_meet_and_repeated_ones_do_not(tmp_path: Path) -> None:
    """As `sample` wrote them, and as PPO archived two of its steps."""
    RolloutBuffer([rollout("q", "a", tokens=[1, 2, 3]), rollout("q", "a"), rollout("r", "x")]).to_parquet(
        tmp_path / "s"
    )
    RolloutBuffer([rollout("q", "b", policy="ppo", step=4), rollout("r", "x", policy="ppo", step=5)]).to_parquet(
        tmp_path / "p"
    )
    files = [str(tmp_path / "s"), str(tmp_path / "p")]
    found, duplicates = read_pools(files)
    assert duplicates == 2
    assert [[r.text for r in pool.responses] for pool in found] == [["a", "b"], ["x"]]
    assert [r.policy for r in found[0].responses] == ["sft", "ppo, step 4"]
    assert found[0].responses[0].tokens == [1, 2, 3]
    assert found[0].sources == files
    RolloutBuffer([Rollout("other", "z", [1], [True], [0.0], StopReason.EOS, "q")]).to_parquet(tmp_path / "o")
    with pytest.raises(DataError, match="two different prompts"):
        read_pools([*files, str(tmp_path / "o")])


def test_without_models_pairs_are_drawn_blindly_and_every_prompt_comes_first_once() -> None:
    items = choose_items(pools(20, 4), stage(pairs_per_prompt=2))
    assert len(items) == 40
    assert len({item.prompt for item in items[:20]}) == 20
    assert len({(item.prompt, texts(item)) for item in items}) == 40
    assert {item.meta["sampling"] for item in items} == {"random"}
    assert [item.priority for item in items] == sorted((item.priority for item in items), reverse=True)
    assert all(item.wanted == 2 for item in items)
    again = choose_items(pools(20, 4), stage(pairs_per_prompt=2))
    assert [item.key for item in again] == [item.key for item in items]
    other = choose_items(pools(20, 4), stage(pairs_per_prompt=2).model_copy(update={"seed": 1}))
    assert [item.key for item in other] != [item.key for item in items]


def test_the_beginning_of_the_queue_is_not_the_held_out_side() -> None:
    """One hash for both would have all first answers kept for testing, and none left to train on."""
    everyone = [
        Pool(f"p{i}", prompt_id(as_chat(f"p{i}")), [Candidate(f"answer {i} {k}") for k in (0, 1)]) for i in range(200)
    ]
    ordered = sorted(choose_items(everyone, stage()), key=lambda item: -item.priority)
    held_out = [is_held_out(item.prompt, 0.1, seed=0) for item in ordered]
    assert 10 <= sum(held_out) <= 30
    assert sum(held_out[:20]) <= 6  # 2 to be expected


def test_every_pair_of_a_prompt_is_drawn_equally_often() -> None:
    counts = Counter(texts(item)[0][-1] + texts(item)[1][-1] for item in choose_items(pools(3000, 3), stage()))
    assert len(counts) == 3
    for n in counts.values():
        assert abs(n - 1000) < 4 * math.sqrt(1000 * 2 / 3)  # four standard errors


def test_the_number_of_a_response_says_nothing_of_its_place_in_the_buffer() -> None:
    """Else the newer model's would be response 1 of every pair."""
    first = sum(item.responses[0].text.endswith(" 0") for item in choose_items(pools(1000, 2), stage()))
    assert abs(first - 500) < 4 * math.sqrt(250)


def test_fewer_pairs_than_asked_for_and_a_limit() -> None:
    assert len(choose_items(pools(5, 2), stage(pairs_per_prompt=3))) == 5
    assert len(choose_items(pools(5, 3), stage(pairs_per_prompt=9))) == 15
    items = choose_items(pools(50, 3), stage(limit=7))
    assert [item.key for item in items] == [item.key for item in choose_items(pools(50, 3), stage(limit=20))[:7]]


def test_rankings_hold_at_most_k_responses() -> None:
    items = choose_items(pools(30, 6), stage(kind="ranking", responses_per_item=4, pairs_per_prompt=5))
    assert len(items) == 30
    assert {len(item.responses) for item in items} == {4}
    assert {item.kind for item in items} == {"ranking"}
    assert {text[-1] for item in items for text in texts(item)} == set("012345")  # not the first four each time
    assert {len(item.responses) for item in choose_items(pools(3, 3), stage(kind="ranking"))} == {3}


# --- active sampling ------------------------------------------------------------------------------------------


def test_disagreement_of_several_models_by_hand() -> None:
    """Two models with gaps of ln 3 and -ln 3: probabilities 3/4 and 1/4, whose standard deviation is 1/4."""
    scores_MK = torch.tensor([[math.log(3), 0.0, 5.0], [0.0, math.log(3), 5.0 + math.log(3)]])
    found = doubts(scores_MK)
    assert found[0, 1] == pytest.approx(0.25, abs=1e-6)
    assert found[1, 2] == pytest.approx(0, abs=1e-6)  # both models see the same gap
    assert torch.allclose(found, found.T)


def test_one_model_doubts_the_smallest_difference_most() -> None:
    found = doubts(torch.tensor([[0.0, math.log(3), math.log(3) + 0.01]]))
    assert found[0, 1] == pytest.approx(0.25, abs=1e-6)  # 1/2 - |3/4 - 1/2|
    assert found[1, 2] > 0.49
    assert found[1, 2] > found[0, 1] > found[0, 2]


def test_the_active_part_is_where_models_disagree_and_the_random_part_is_not_chosen_by_it() -> None:
    """Two models agree on all prompts but the first twenty."""
    given = pools(100, 2)
    scores_MN = torch.zeros(2, 200)
    scores_MN[:, ::2] = 4.0
    scores_MN[1, :40:2] = -4.0
    cfg = stage(limit=15, random_fraction=0.4)
    items = choose_items(given, cfg, scores_MN)
    active = [item for item in items if item.meta["sampling"] == "active"]
    blind = [item for item in items if item.meta["sampling"] == "random"]
    assert (len(active), len(blind)) == (9, 6)
    taken = {item.prompt for item in blind}
    assert {item.prompt for item in active} <= {f"p{i}" for i in range(20)} - taken
    assert [item.key for item in blind] == [item.key for item in choose_items(given, stage(limit=6))]
    assert all(item.meta["disagreement"] > 0.4 for item in active)
    assert [item.meta["sampling"] for item in items[:5]].count("random") == 2  # any beginning has both
    only_blind = choose_items(given, stage(limit=15, random_fraction=1.0), scores_MN)
    assert {item.meta["sampling"] for item in only_blind} == {"random"}


def test_a_prompt_gets_no_more_pairs_than_asked_for_blind_and_active_together() -> None:
    scores_MN = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    items = choose_items(pools(10, 4), stage(pairs_per_prompt=2, random_fraction=0.5), scores_MN)
    assert len(items) == 20
    assert set(Counter(item.prompt for item in items).values()) == {2}
    assert len({item.key for item in items}) == 20


def test_interleaved_beginnings_have_both_parts_in_their_shares() -> None:
    mixed = interleave(["r"] * 30, ["a"] * 70)
    for n in range(1, 101):
        assert abs(mixed[:n].count("r") - 0.3 * n) <= 1
    assert interleave([], [1, 2]) == [1, 2]


# --- the command ----------------------------------------------------------------------------------------------


def test_queueing_twice_adds_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = LabelingStage.model_validate({"run_dir": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match="names no files"):
        queue.main(cfg)
    RolloutBuffer([rollout(p, r) for p in "qrs" for r in "ab"]).to_parquet(tmp_path / "s.parquet")
    RolloutBuffer([rollout("q", "a"), rollout("r", "a")]).to_parquet(tmp_path / "one.parquet")
    keys = {"rollouts": [str(tmp_path / "s.parquet")], "batch": "round-2"}
    cfg = LabelingStage.model_validate({"run_dir": str(tmp_path / "run"), "queue": keys})
    first, second = queue.main(cfg), queue.main(cfg)
    assert (first.summary["added"], second.summary["added"], second.summary["known"]) == (3, 0, 3)
    assert "3 new items (pair), 0 known; 3 drawn blindly" in capsys.readouterr().out
    with LabelStore.open(cfg) as store:
        assert {item.batch for item in store.items()} == {"round-2"}
    alone = {"rollouts": [str(tmp_path / "one.parquet")]}
    with pytest.raises(DataError, match="none of 2 prompts"):
        queue.main(LabelingStage.model_validate({"run_dir": str(tmp_path / "run"), "queue": alone}))


def test_reward_models_score_the_tokens_that_were_sampled(tmp_path: Path, tiny: Any) -> None:
    """One model twice has no disagreement; alone it doubts small differences most."""
    words = ["sun", "moon", "sea", "sky", "blue", "red"]
    ids = tiny.tokenizer.convert_tokens_to_ids
    rows = [rollout(f"q{i}", word, tokens=[7, i + 5, ids(word)]) for i in range(4) for word in words]
    RolloutBuffer(rows).to_parquet(tmp_path / "s.parquet")
    keys = {"rollouts": [str(tmp_path / "s.parquet")], "reward_models": [tiny.reward], "random_fraction": 0.25}
    cfg = LabelingStage.model_validate({"run_dir": str(tmp_path / "run"), "queue": keys})
    given, _ = read_pools(cfg.queue.rollouts)
    scores_MN = queue.score([tiny.reward, tiny.reward], given, seed=0)
    assert scores_MN.shape == (2, 24)
    assert torch.equal(scores_MN[0], scores_MN[1])
    assert scores_MN[0].std() > 0
    summary = queue.main(cfg).summary
    assert (summary["added"], summary["random"], summary["active"]) == (4, 1, 3)
    with LabelStore.open(cfg) as store:
        chosen = [item for item in store.items() if item.meta["sampling"] == "active"]
    of = {(pool.prompt, r.text): s for pool, row in zip(given, scores_MN[0].split(6), strict=True)
          for r, s in zip(pool.responses, row.tolist(), strict=True)}  # fmt: skip
    for item in chosen:
        gaps = sorted(abs(of[item.prompt, a] - of[item.prompt, b]) for a in words for b in words if a < b)
        own = abs(of[item.prompt, item.responses[0].text] - of[item.prompt, item.responses[1].text])
        assert own == pytest.approx(gaps[0], abs=1e-6)
    RolloutBuffer([rollout("q", "a", tokens=[1, 10**6]), rollout("q", "b")]).to_parquet(tmp_path / "far.parquet")
    far, _ = read_pools([str(tmp_path / "far.parquet")])
    with pytest.raises(DataError, match="does not know"):
        queue.score([tiny.reward], far, seed=0)


def test_disagreement_does_not_depend_on_the_normalisation(tmp_path: Path, tiny: Any) -> None:
    """Scores are log odds as they were trained: in units of a spread of 4 all would look torn."""
    shutil.copytree(tiny.reward, tmp_path / "reward")
    given = [Pool("q", "q", [Candidate(str(i), tokens=[7, 5, i]) for i in range(8, 13)])]
    found = []
    for mean, std in ((0.0, 1.0), (5.0, 4.0)):
        said = {"mean": mean, "std": std, "zero_is": "training responses"}
        (tmp_path / "reward" / "reward_normalisation.json").write_text(json.dumps(said))
        found.append(doubts(queue.score([str(tmp_path / "reward")], given, seed=0)))
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert found[0].std() > 1e-3


@pytest.mark.parametrize("kind", ["heads", "adapters"])
def test_an_ensembles_members_choose_what_they_disagree_on(
    tmp_path: Path, tiny: Any, stage_config: Any, jsonl: Any, kind: str
) -> None:
    """The folder that `rlhf reward` wrote; disagreements from the members' scores, by numpy."""
    words = ["sun", "moon", "sea", "sky", "blue"]
    rows = [{"prompt": f"explain {w}", "chosen": f"the {w} is hot", "rejected": f"{w} and {w}"} for w in words]
    tuning = {} if kind == "heads" else {"tuning": {"kind": "lora", "rank": 4}}
    keys = {"dataset": {"path": jsonl("pairs.jsonl", rows)}, "heldout_fraction": 0.2, "epochs": 1, **tuning}
    ensemble = {"members": 3, "kind": kind}
    folder = train.main(stage_config("reward", **keys, ensemble=ensemble), RunOptions()).outputs["reward_model"]
    ids = tiny.tokenizer.convert_tokens_to_ids
    sampled = [rollout(f"q{i}", word, tokens=[7, i + 5, ids(word)]) for i in range(6) for word in words]
    RolloutBuffer(sampled).to_parquet(tmp_path / "s.parquet")
    keys = {"rollouts": [str(tmp_path / "s.parquet")], "reward_models": [folder], "random_fraction": 1 / 3}
    cfg = LabelingStage.model_validate({"run_dir": str(tmp_path / "run"), "queue": keys})
    assert queue.main(cfg).summary["active"] == 4
    given, _ = read_pools(cfg.queue.rollouts)
    scores_MN = queue.score([folder], given, seed=0)
    assert scores_MN.shape == (3, 30)
    doubt = {}
    for pool, scores_MK in zip(given, scores_MN.double().numpy().reshape(3, 6, 5).swapaxes(0, 1), strict=True):
        p_MKK = 1 / (1 + np.exp(scores_MK[:, None, :] - scores_MK[:, :, None]))
        of = {response.text: k for k, response in enumerate(pool.responses)}
        doubt[str(pool.prompt)] = (of, p_MKK.std(0))
    with LabelStore.open(cfg) as store:
        items = store.items()
    blind = {str(item.prompt) for item in items if item.meta["sampling"] == "random"}
    most = {prompt: table.max() for prompt, (_, table) in doubt.items() if prompt not in blind}
    active = [item for item in items if item.meta["sampling"] == "active"]
    assert {str(item.prompt) for item in active} == set(sorted(most, key=lambda prompt: -most[prompt])[:4])
    for item in active:
        of, table = doubt[str(item.prompt)]
        own = table[of[item.responses[0].text], of[item.responses[1].text]]
        assert own == pytest.approx(most[str(item.prompt)], abs=1e-6)
        assert item.meta["disagreement"] == pytest.approx(own, abs=2e-6)
        assert own > 0
