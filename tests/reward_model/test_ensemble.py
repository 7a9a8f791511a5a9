"""Ensembles: what the members have of their own, what is saved, and what PPO makes of their disagreement."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from reward_model import train
from reward_model.data import RankedTokens
from reward_model.ensemble import (
    AdapterEnsemble,
    Aggregate,
    HeadEnsemble,
    described,
    disagreement,
    member_weights,
    start_ensemble,
)
from reward_model.model import RewardModel, load_model
from reward_model.train import ensemble_loss
from rlhf.data.templates import prompt_tokens, response_tokens
from rlhf.errors import ConfigError, ModelError
from rlhf.models.tuning import lora_layers
from rlhf.models.value import load_scalar_model
from rlhf.progress import Progress
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.runs import RunOptions
from rlhf.stages import ppo

ROWS = [[2, 9, 12, 15, 3], [2, 7, 8, 3], [2, 30, 31, 32, 33, 34, 3], [2, 11, 3]]
LORA = {"kind": "lora", "rank": 4}
WORDS = "star light moon sea sky blue red water cloud wind tree leaf bird fish good bad".split()  # noqa: SIM905
KINDS = ["heads", "heads of lora", "adapters"]


@pytest.fixture
def pairs(jsonl: Callable[..., str]) -> str:
    answers = ["the sun is hot", "rain and rain and rain", "it gives us energy"]
    return jsonl(
        "pairs.jsonl",
        [
            {"prompt": f"explain {word}", "chosen": answers[i % 3], "rejected": answers[(i + 1 + i % 2) % 3]}
            for i, word in enumerate(WORDS)
        ],
    )


@pytest.fixture
def config(stage_config: Any, pairs: str) -> Callable[..., Any]:
    def build(kind: str = "heads", **changes: Any) -> Any:
        ensemble = {"members": 3, "kind": kind.partition(" ")[0], **changes.pop("ensemble", {})}
        tuning = {} if kind == "heads" else {"tuning": LORA}
        given = {"dataset": {"path": pairs}, "heldout_fraction": 0.25, "optim": {"lr": 3e-3}, "epochs": 2, **tuning}
        return stage_config("reward", **{**given, "ensemble": ensemble, **changes})

    return build


# --- numbers --------------------------------------------------------------------------------------------------


def test_aggregates_by_hand() -> None:
    """Two rows; members (1, 3, 8) and (2, 2, 2): mean 4 and 2, deviation sqrt((9 + 1 + 16) / 3) and 0."""
    scores_MN = torch.tensor([[1.0, 2.0], [3.0, 2.0], [8.0, 2.0]])
    std = math.sqrt(26 / 3)
    assert disagreement(scores_MN).tolist() == pytest.approx([std, 0.0])
    assert Aggregate("mean")(scores_MN).tolist() == [4.0, 2.0]
    assert Aggregate("min")(scores_MN).tolist() == [1.0, 2.0]
    assert Aggregate("mean_minus_std", 0.5)(scores_MN).tolist() == pytest.approx([4 - std / 2, 2.0])


def test_weights_are_exponential_and_depend_on_seed_member_and_prompt_alone() -> None:
    groups = [f"p{i}" for i in range(4000)]
    weights_BM = member_weights(groups, 2, seed=1)
    for column in weights_BM.T:
        assert float(column.mean()) == pytest.approx(1.0, abs=0.06)  # 4 standard errors of 1 / sqrt(4000)
        assert float(column.median()) == pytest.approx(math.log(2), abs=0.06)
        assert float(column.std()) == pytest.approx(1.0, abs=0.1)
    assert abs(float(torch.corrcoef(weights_BM.T)[0, 1])) < 0.06
    assert torch.equal(member_weights(groups[7:9], 2, seed=1), weights_BM[7:9])
    assert not torch.equal(member_weights(groups[:2], 2, seed=2), weights_BM[:2])


def test_the_loss_of_an_ensemble_by_hand(config: Any) -> None:
    """Members with differences 1 and -2: (w_1 log(1 + e^-1) + w_2 log(1 + e^2)) / 2, whatever the batch's weights add
    up to."""
    items = [RankedTokens([[2, 5], [2, 6]], [1, 2], [[0.5, 1.0], [0.0, 0.5]], "g", [1, 1])]
    scores_BKM = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    cfg = config(ensemble={"members": 2})
    w = member_weights(["g"], 2, cfg.seed)[0].tolist()
    expected = (w[0] * math.log1p(math.exp(-1)) + w[1] * math.log1p(math.exp(2))) / 2
    loss = ensemble_loss(scores_BKM, torch.ones(1, 2, dtype=torch.bool), items, cfg)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_members_start_apart_around_the_models_head(config: Any, tiny: Any, kind: str) -> None:
    torch.manual_seed(3)
    scalar = load_scalar_model(tiny.reward, dtype=torch.float32)
    own = scalar.classifier.score.weight.detach().clone()
    model = start_ensemble(scalar, config(kind), torch.float32)
    heads = (model.score.weight if isinstance(model, HeadEnsemble) else _heads(model)).detach()
    torch.testing.assert_close(heads.mean(0, keepdim=True), own)
    assert float(torch.pdist(heads).min()) > 0.5, "of N(0, 1 / 33) in 32 dimensions: 1.4, on average"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert ("scalar.classifier.score.weight" in trained) is False
    assert all("lora_" in name or "score" in name for name in trained) is (kind != "heads")


def _heads(model: AdapterEnsemble) -> torch.Tensor:
    scalars: Any = model.scalars
    return torch.cat([scalar.classifier.score.weight for scalar in scalars])


# --- the stage ------------------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def left(request: pytest.FixtureRequest, config: Any) -> tuple[str, Any]:
    """(kind, result of training) of an ensemble."""
    return request.param, train.main(config(request.param), RunOptions())


@torch.no_grad()
def test_the_plain_model_is_what_it_says(left: tuple[str, Any], tiny: Any, runtime: Any) -> None:
    """transformers, without our code, on a padded batch: the mean of the heads, or the first member."""
    kind, result = left
    final = result.outputs["reward_model"]
    model = RewardModel.load(final, runtime, tokenizer=tiny.tokenizer)
    scores_MN = model.score_members(ROWS)
    assert scores_MN.shape == (3, 4)
    assert float(disagreement(scores_MN).min()) > 1e-3
    moments = json.loads((Path(final) / "reward_normalisation.json").read_text())
    plain: Any = AutoModelForSequenceClassification.from_pretrained(final)
    pad = plain.config.pad_token_id
    assert pad != tiny.eos
    width = max(map(len, ROWS))
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in ROWS])
    raw = plain(tokens, attention_mask=(tokens != pad).long()).logits.squeeze(1)
    expected = scores_MN[0] if kind == "adapters" else scores_MN.mean(0)
    torch.testing.assert_close((raw - moments["mean"]) / moments["std"], expected, atol=1e-4, rtol=1e-4)
    assert described(final)["plain"].endswith("the first member" if kind == "adapters" else "the mean of the members")
    single = load_scalar_model(final, dtype=torch.float32)
    mask = torch.ones(1, 5, dtype=torch.bool)
    assert float(single.score_last(torch.tensor(ROWS[:1]), mask)) == pytest.approx(float(expected[0]), abs=1e-4)


def test_every_member_has_mean_0_where_the_model_has_and_all_have_one_unit(
    left: tuple[str, Any], tiny: Any, runtime: Any, pairs: str, config: Any
) -> None:
    kind, result = left
    model = RewardModel.load(result.outputs["reward_model"], runtime, tokenizer=tiny.tokenizer)
    with Progress(stage="reward", enabled=False) as progress:
        items, _ = train.load_items(config(kind), tiny.tokenizer, progress)
    scores_MN = model.score_members([row for item in items for row in item.rows])
    assert scores_MN.mean(1).tolist() == pytest.approx([0.0] * 3, abs=1e-4)
    assert float(scores_MN.mean(0).std(correction=0)) == pytest.approx(1.0, abs=1e-4)
    summary = result.summary
    assert summary["disagreement"] > 0
    assert len(summary["member_accuracies"]) == 3


@pytest.mark.parametrize("kind", ["heads", "adapters"])
def test_ratings_are_guessed_by_the_mean_of_the_members(
    config: Any, jsonl: Any, tiny: Any, runtime: Any, kind: str
) -> None:
    """A member's 0 is elsewhere than another's; the guess is mean + std of the ratings times the members' mean raw
    score."""
    rows = [
        {"prompt": f"explain {word}", "response": f"the {word} is hot", "rating": i} for i, word in enumerate(WORDS)
    ]
    data = {"path": jsonl("ratings.jsonl", rows)}
    cfg = config(kind, loss="pointwise", dataset=data, eval_dataset=data, epochs=1)
    result = train.main(cfg, RunOptions())
    model: Any = load_model(result.outputs["reward_model"], runtime)
    tokens = [
        prompt_tokens(tiny.tokenizer, row["prompt"], chat=True)
        + response_tokens(tiny.tokenizer, row["response"], finished=True)
        for row in rows
    ]
    scores_MN = RewardModel(model, runtime).score_members(tokens)
    raw_N = (scores_MN * model.std + model.means_M[:, None]).mean(0).tolist()
    ratings = list(range(len(rows)))
    guesses = [fmean(ratings) + pstdev(ratings) * raw for raw in raw_N]
    expected = fmean((guess - rating) ** 2 for guess, rating in zip(guesses, ratings, strict=True))
    assert result.summary["rating_mse"] == pytest.approx(expected, rel=1e-4)


def test_lora_leaves_the_ensemble_beside_the_adapter_too(left: tuple[str, Any], tiny: Any, runtime: Any) -> None:
    kind, result = left
    adapter = Path(result.run_dir) / "adapter"
    if kind == "heads":
        assert not adapter.exists()
        return
    models = [load_model(name, runtime) for name in (result.outputs["reward_model"], str(adapter))]
    mask = torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        final, kept = (model.score_last(torch.tensor(ROWS[:1]), mask) for model in models)
    torch.testing.assert_close(final, kept, atol=1e-4, rtol=1e-4)
    assert bool(lora_layers(models[1]))
    if kind == "adapters":
        scalars: Any = models[0].scalars
        bases = [{p.data_ptr() for n, p in s.classifier.model.named_parameters() if "lora" not in n} for s in scalars]
        assert bases[0] == bases[1] == bases[2], "the frozen base is in memory once"


def test_heads_that_share_everything_are_one_head(config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Why members have starts and data of their own."""

    def heads(name: str) -> torch.Tensor:
        result = train.main(config(run_dir=str(tmp_path / name), epochs=4), RunOptions())
        return load_file(Path(result.outputs["reward_model"]) / "heads.safetensors")["weight"]

    draws = train.start_ensemble.__globals__["_draws"]
    monkeypatch.setitem(train.start_ensemble.__globals__, "_draws", lambda m, h, seed: 0 * draws(m, h, seed))
    weighed = heads("weighed")
    monkeypatch.setattr(train, "member_weights", lambda groups, members, seed: torch.ones(len(groups), members))
    assert float(torch.pdist(heads("alike")).max()) == 0.0
    assert float(torch.pdist(weighed).min()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_repeats_every_bit(config: Any, metrics_of: Any, tmp_path: Path, kind: str) -> None:
    """6 steps in one go; and 6 steps of which the last two are made anew from the checkpoint of step 4."""
    changes = {"epochs": 2, "save_every": 2}
    whole = Path(train.main(config(kind, run_dir=str(tmp_path / "whole"), **changes), RunOptions()).run_dir)
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "final")
    train.main(config(kind, run_dir=str(again), **changes), RunOptions())
    files = [p.relative_to(whole) for p in whole.glob("final/**/*") if p.suffix == ".safetensors"]
    assert len(files) == (4 if kind == "adapters" else 2)
    for file in files:
        one, two = load_file(whole / file), load_file(again / file)
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert metrics_of(whole)[-1]["loss/train"] == metrics_of(again)[-1]["loss/train"]
    assert (again / "checkpoints" / "step_4").is_dir()


def test_a_further_round_starts_from_the_heads_of_the_last(config: Any, tiny: Any, tmp_path: Path) -> None:
    first = train.main(config(), RunOptions()).outputs["reward_model"]
    cfg = config(model=first, run_dir=str(tmp_path / "second"))
    model = start_ensemble(load_scalar_model(first, dtype=torch.float32), cfg, torch.float32)
    assert torch.equal(model.score.weight, load_file(Path(first) / "heads.safetensors")["weight"])
    more = config(model=first, ensemble={"members": 5})
    assert start_ensemble(load_scalar_model(first, dtype=torch.float32), more, torch.float32).members == 5


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("ensemble.json", "{"),
        ("ensemble.json", '{"kind": "heads"}'),
        ("heads.safetensors", ""),
        ("heads.safetensors", None),
    ],
)
def test_a_damaged_ensemble_is_named(config: Any, runtime: Any, file: str, text: str | None) -> None:
    folder = Path(train.main(config(epochs=1), RunOptions()).outputs["reward_model"])
    (folder / file).write_text(text) if text is not None else (folder / file).unlink()
    with pytest.raises(ModelError, match=file):
        load_model(str(folder), runtime)


def test_heads_of_another_number_are_refused(config: Any, runtime: Any) -> None:
    folder = Path(train.main(config(epochs=1), RunOptions()).outputs["reward_model"])
    save_file({"weight": torch.zeros(2, 32)}, folder / "heads.safetensors")
    with pytest.raises(ModelError, match=r"shape is \(2, 32\)"):
        load_model(str(folder), runtime)


# --- in PPO ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["heads", "adapters"])
def test_ppo_scores_by_the_aggregate_and_logs_the_disagreement(
    config: Any, stage_config: Any, metrics_of: Any, tiny: Any, runtime: Any, kind: str
) -> None:
    reward = train.main(config(kind), RunOptions()).outputs["reward_model"]
    cfg = stage_config("ppo", reward_model=reward, reward_aggregate="min", steps=1, archive_rollouts=True)
    ppo.main(cfg, RunOptions())
    rollouts = RolloutBuffer.from_parquet(Path(cfg.run_dir) / "rollouts" / "step_000001.parquet").rollouts
    model = RewardModel.load(reward, runtime, tokenizer=tiny.tokenizer)
    columns = model.score_members([r.tokens for r in rollouts]).T.tolist()
    assert [r.score for r in rollouts] == pytest.approx([min(column) for column in columns], abs=1e-5)
    assert [r.score_std for r in rollouts] == pytest.approx([pstdev(column) for column in columns], abs=1e-5)
    line = metrics_of(cfg.run_dir)[0]
    assert line["objective/reward_std"] == pytest.approx(fmean(map(pstdev, columns)), abs=1e-5)
    assert line["objective/scores"] == pytest.approx(fmean(map(min, columns)), abs=1e-5)


def test_the_coefficient_can_be_ppos_own(config: Any, tiny: Any, runtime: Any) -> None:
    cfg = config(ensemble={"aggregate": "mean_minus_std", "coef": 0.5}, epochs=1)
    model = RewardModel.load(train.main(cfg, RunOptions()).outputs["reward_model"], runtime, tokenizer=tiny.tokenizer)
    assert model.aggregate == Aggregate("mean_minus_std", 0.5)
    model.aggregate_by(None, 2.0)
    columns = model.score_members(ROWS).T.tolist()
    assert model.score_tokens(ROWS) == pytest.approx([fmean(c) - 2 * pstdev(c) for c in columns], abs=1e-5)


def test_an_aggregate_of_a_single_model_is_refused(stage_config: Any) -> None:
    with pytest.raises(ConfigError, match="the reward model is a single one"):
        ppo.main(stage_config("ppo", reward_aggregate="min"), RunOptions())
    with pytest.raises(ConfigError, match="need an ensemble"):
        stage_config("ppo", reward_std_coef=1.0, reward_model=None, scorer="readability", critic_init="policy")


@pytest.mark.parametrize(
    ("kind", "tuning", "sharing"),
    [
        ("heads of lora", LORA, "lora"),
        ("adapters", LORA, "lora"),
        ("heads", {"kind": "full", "layers": 1}, "hydra"),
        ("adapters", {**LORA, "layers": 1}, "hydra"),
    ],
)
def test_shared_weights_change_no_score(
    config: Any, stage_config: Any, metrics_of: Any, tmp_path: Path, kind: str, tuning: Any, sharing: str
) -> None:
    run_dir = train.main(config(kind, tuning=tuning, epochs=1), RunOptions()).run_dir
    reward = f"{run_dir}/{'adapter' if sharing == 'lora' else 'final'}"
    lines = []
    for way in (sharing, "separate"):
        cfg = stage_config("ppo", run_dir=str(tmp_path / way), reward_model=reward, sharing=way, tuning=tuning, steps=1)
        ppo.main(cfg, RunOptions())
        lines.append({k: v for k, v in metrics_of(cfg.run_dir)[0].items() if k.startswith("objective/")})
    assert lines[0] == pytest.approx(lines[1], rel=2e-3, abs=2e-4)
