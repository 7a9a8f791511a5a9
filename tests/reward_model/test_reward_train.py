"""Reward model training as a whole stage: it learns what can be learned, and its zero is a demonstration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reward_model import train
from reward_model.data import RankedTokens, pairs_of, tokenize_rankings
from reward_model.finish import drawn_responses
from reward_model.model import RewardModel
from reward_model.train import forward, obeys_masks, outcomes_of, packed_length, ranking_loss, right_pairs
from rlhf.data.templates import prompt_tokens, response_tokens
from rlhf.errors import ConfigError, DataError
from rlhf.models import value
from rlhf.models.value import load_scalar_model
from rlhf.runs import RunOptions
from rlhf.types import Ranking

GOOD, MIDDLE, POOR = "the sun is hot", "rain and the sun", "rain and rain and rain"
TOPICS = "star light moon sea sky blue red water cloud wind tree leaf bird fish good bad"
WORDS = TOPICS.split()


@pytest.fixture
def rankings(jsonl: Any) -> str:
    """Separable: the same answers in the same order for every prompt."""
    answers = [GOOD, MIDDLE, POOR]
    rows = []
    for i, word in enumerate(WORDS):
        order = [answers[(i + k) % 3] for k in range(3)]  # the best one stands anywhere
        rows.append({"prompt": f"explain {word}", "responses": order, "ranks": [answers.index(a) + 1 for a in order]})
    return jsonl("rankings.jsonl", rows)


@pytest.fixture
def config(stage_config: Any, rankings: str) -> Any:
    def build(**changes: Any) -> Any:
        given = {"dataset": {"path": rankings}, "heldout_fraction": 0.25, "optim": {"lr": 3e-3}, "epochs": 4}
        return stage_config("reward", **{**given, **changes})

    return build


@pytest.mark.parametrize("loss", ["bradley_terry", "all_pairs", "plackett_luce"])
@pytest.mark.parametrize("tuning", [{"kind": "full"}, {"kind": "lora", "rank": 8}], ids=["full", "lora"])
def test_the_loss_falls_and_the_held_out_accuracy_is_one(config: Any, metrics_of: Any, loss: str, tuning: Any) -> None:
    lr = 3e-3 if tuning["kind"] == "full" else 2e-2
    result = train.main(config(loss=loss, tuning=tuning, optim={"lr": lr}), RunOptions())
    lines = metrics_of(result.run_dir)
    assert lines[-1]["loss/train"] < lines[0]["loss/train"] / 2
    summary = result.summary
    assert summary["accuracy"] == summary["label_accuracy"] == 1.0
    assert (summary["pairs"], summary["prompts"], summary["accuracy_against"]) == (12, 4, "label")
    assert summary["accuracy_low"] <= summary["accuracy"] <= summary["accuracy_high"]
    names = load_file(Path(result.outputs["reward_model"]) / "model.safetensors").keys()
    assert not any("lora" in name for name in names)


RATED = {GOOD: 5.0, MIDDLE: 3.0, POOR: 1.0}


@pytest.fixture
def ratings(jsonl: Any) -> str:
    rows = [{"prompt": f"explain {word}", "response": a, "rating": r} for word in WORDS for a, r in RATED.items()]
    return jsonl("ratings.jsonl", rows)


@pytest.mark.parametrize("ensemble", [None, {"members": 2}], ids=["single", "ensemble"])
def test_ratings_are_learned_on_their_own_scale(config: Any, ratings: str, ensemble: Any) -> None:
    """Mean 3, variance 8/3: what a constant guess gets."""
    cfg = config(loss="pointwise", dataset={"path": ratings}, epochs=6, ensemble=ensemble)
    summary = train.main(cfg, RunOptions()).summary
    assert summary["rating_mse_of_a_constant"] == pytest.approx(8 / 3)
    assert summary["rating_mse"] < 0.3
    assert summary["rating_correlation"] > 0.95
    assert (summary["accuracy"], summary["pairs"], summary["prompts"]) == (1.0, 12, 4)


def test_one_rating_per_prompt_leaves_no_pair_to_order(config: Any, jsonl: Any) -> None:
    rows = [
        {"prompt": f"explain {w}", "response": GOOD if i % 2 else POOR, "rating": i % 2} for i, w in enumerate(WORDS)
    ]
    cfg = config(loss="pointwise", dataset={"path": jsonl("r.jsonl", rows)}, epochs=1)
    result = train.main(cfg, RunOptions())
    assert "accuracy" not in result.summary
    assert "rating_mse" in result.summary
    assert "No pair can be compared" in (Path(result.run_dir) / "reward_report.html").read_text()


def test_ratings_are_not_centred_silently(config: Any, ratings: str) -> None:
    with pytest.raises(ConfigError, match="centering is for comparisons"):
        config(loss="pointwise", dataset={"path": ratings}, centering=0.1)


def test_equal_ratings_teach_nothing(config: Any, jsonl: Any) -> None:
    rows = [{"prompt": f"explain {w}", "response": GOOD, "rating": 2} for w in WORDS]
    with pytest.raises(DataError, match=r"all 12 ratings are 2\.0"):
        train.main(config(loss="pointwise", dataset={"path": jsonl("r.jsonl", rows)}), RunOptions())


def test_lora_also_leaves_an_adapter_with_head_and_normalisation(config: Any, rankings: str, tiny: Any) -> None:
    """In fp32 the adapter and what it is folded into score alike; a mean of its own, for in bf16 they do not."""
    cfg = config(tuning={"kind": "lora", "rank": 8}, optim={"lr": 2e-2})
    result = train.main(cfg, RunOptions())
    folder = Path(result.run_dir) / "adapter"
    tokens, mask = torch.tensor([[2, 9, 12, 15, 3]]), torch.ones(1, 5, dtype=torch.bool)
    with torch.no_grad():
        kept = load_scalar_model(str(folder), dtype=torch.float32, keep_adapter=True)(tokens, mask)
        final = load_scalar_model(result.outputs["reward_model"], dtype=torch.float32)(tokens, mask)
    torch.testing.assert_close(kept, final, atol=1e-4, rtol=1e-4)
    moments = json.loads((folder / value.NORMALISATION_FILE).read_text())
    assert moments["std"] == pytest.approx(result.summary["std"], rel=1e-4)
    assert not (Path(train.main(config(), RunOptions()).run_dir) / "final" / "adapter_config.json").exists()


def test_with_layers_the_lower_ones_stay_the_base_models(config: Any, tiny: Any) -> None:
    """Which is what lets PPO put such a reward model on the policy's trunk."""
    result = train.main(config(tuning={"kind": "full", "layers": 1}), RunOptions())
    start = load_file(Path(tiny.path) / "model.safetensors")
    end = load_file(Path(result.outputs["reward_model"]) / "model.safetensors")
    changed = {name for name in start if name in end and not torch.equal(start[name], end[name])}
    assert changed == {name for name in start if "layers.1." in name or name == "model.norm.weight"}


def test_the_first_loss_is_that_of_a_coin(config: Any, metrics_of: Any) -> None:
    """-log sigmoid(0) = log 2, as nearly as a new head with small scores can have it."""
    line = metrics_of(train.main(config(optim={"lr": 1e-9}), RunOptions()).run_dir)[0]
    assert line["loss/train"] == pytest.approx(math.log(2), abs=0.4)


def test_demonstrations_score_zero_on_average_after_normalisation(
    config: Any, demonstrations_file: str, tiny: Any, runtime: Any
) -> None:
    result = train.main(config(normalise_on={"path": demonstrations_file}), RunOptions())
    model = RewardModel.load(result.outputs["reward_model"], runtime, tokenizer=tiny.tokenizer)
    rows = [json.loads(line) for line in Path(demonstrations_file).read_text().splitlines()]
    tokens = [
        prompt_tokens(tiny.tokenizer, row["prompt"], chat=True)
        + response_tokens(tiny.tokenizer, row["completion"], finished=True)
        for row in rows
    ]
    scores = torch.tensor(model.score_tokens(tokens))
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-4)
    assert result.summary["zero_is"] == demonstrations_file


def test_without_demonstrations_training_answers_have_mean_0_and_deviation_1(
    config: Any, rankings: str, tiny: Any, runtime: Any
) -> None:
    cfg = config(eval_dataset={"path": rankings})  # then every row is trained on
    result = train.main(cfg, RunOptions())
    model = RewardModel.load(result.outputs["reward_model"], runtime, tokenizer=tiny.tokenizer)
    rows = [
        row
        for line in Path(rankings).read_text().splitlines()
        for pair in pairs_of(one(tiny, json.loads(line)))
        for row in pair.rows
    ]
    scores = torch.tensor(model.score_tokens(rows))
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("pairs", [50, 80, 160, 320, 400])
def test_better_and_worse_answers_are_drawn_alike_for_the_normalisation(pairs: int) -> None:
    """Every pair that is drawn with both of its rows, at most 160 rows but of fewer all."""
    items = [RankedTokens([[i, 1], [i, 0]], [1, 2], [[0.5, 1.0], [0.0, 0.5]], str(i), [1, 1]) for i in range(pairs)]
    rows = drawn_responses(items, seed=0)
    assert len(rows) == min(160, 2 * pairs)
    assert sum(better for _, better in rows) == len(rows) // 2
    steps = {b - a for (a, _), (b, _) in zip(rows[::2], rows[2::2], strict=False)}
    assert pairs < 100 or len(steps) > 2, "no even distance, which could meet a period of the data"


def one(tiny: Any, row: dict[str, Any]) -> Any:
    ranking = Ranking(row["prompt"], row["responses"], row["ranks"])
    return tokenize_rankings([ranking], tiny.tokenizer, chat=True, max_length=64, truncation="error").items[0]


def test_further_training_starts_from_raw_scores(config: Any, tiny: Any, tmp_path: Path) -> None:
    """A reward model as the start: its old mean and std are not applied twice."""
    result = train.main(config(model=tiny.reward, optim={"lr": 1e-9}, epochs=1), RunOptions())
    plain = load_scalar_model(result.outputs["reward_model"], dtype=torch.float32)
    assert float(plain.mean) == pytest.approx(result.summary["mean"], rel=1e-5)
    start = load_scalar_model(tiny.reward, dtype=torch.float32)
    start.set_normalisation(result.summary["mean"], result.summary["std"])
    tokens, mask = torch.tensor([[2, 9, 12, 3]]), torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens, mask), start(tokens, mask), atol=1e-4, rtol=0)


def test_truncation_is_counted_aloud(config: Any, capsys: Any) -> None:
    train.main(config(max_length=10, epochs=1), RunOptions())
    assert "responses longer than 10 tokens keep their end" in capsys.readouterr().out


def test_only_ties_are_an_error(config: Any, jsonl: Any) -> None:
    rows = [{"prompt": f"explain {w}", "responses": ["a", "the"], "ranks": [1, 1]} for w in WORDS]
    with pytest.raises(DataError, match="0 items to train on"):
        train.main(config(dataset={"path": jsonl("ties.jsonl", rows)}), RunOptions())


@pytest.mark.parametrize("loss", ["all_pairs", "bradley_terry"])
def test_micro_batches_do_not_change_the_parameters(config: Any, tmp_path: Path, loss: str) -> None:
    files = []
    for size in (4, 3, 1):
        cfg = config(run_dir=str(tmp_path / f"m{size}"), micro_batch_size=size, loss=loss, optim={"lr": 1e-4}, epochs=1)
        files.append(load_file(Path(train.main(cfg, RunOptions()).outputs["reward_model"]) / "model.safetensors"))
    for other in files[1:]:
        assert max(float((other[name] - files[0][name]).abs().max()) for name in other) < 1e-6


def test_shared_prompts_change_the_time_and_nothing_else(config: Any, tmp_path: Path) -> None:
    files = []
    for share in (True, False):
        cfg = config(run_dir=str(tmp_path / str(share)), share_prompts=share, optim={"lr": 1e-4}, loss="all_pairs")
        files.append(load_file(Path(train.main(cfg, RunOptions()).outputs["reward_model"]) / "model.safetensors"))
    assert max(float((files[0][name] - files[1][name]).abs().max()) for name in files[0]) < 1e-6


def test_a_model_that_ignores_masks_is_noticed(config: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_states = value.hidden_states
    monkeypatch.setattr(value, "hidden_states", lambda net, x, mask, at=None: hidden_states(net, x, x >= 0, None))
    train.main(config(epochs=1), RunOptions())
    assert "each prompt is read once per response" in capsys.readouterr().out


def test_a_sliding_window_shorter_than_the_longest_row_is_noticed(tiny: Any, runtime: Any) -> None:
    """A mask of ours switches the model's own off: the packed row would see more than separate ones."""
    from transformers import MistralConfig, MistralForSequenceClassification

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(
        sliding_window=8, num_labels=1, vocab_size=len(tiny.tokenizer), num_key_value_heads=2, **shape
    )
    config.initializer_range = 0.5
    scalar = value.ScalarModel(MistralForSequenceClassification(config).eval())
    wins = [[0.5, 1.0], [0.0, 0.5]]
    items = [RankedTokens([[2, 5, *[7] * n], [2, 5, *[8] * n]], [1, 2], wins, "g", [n, n]) for n in (6, 30)]
    assert [packed_length(item) for item in items] == [14, 62]
    assert [obeys_masks(scalar, item, runtime) for item in items] == [True, False]


# --- parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_prompts", [False, True])
def test_scores_do_not_depend_on_the_rows_beside_them(tiny: Any, runtime: Any, share_prompts: bool) -> None:
    scalar = load_scalar_model(tiny.reward, dtype=torch.float32).eval()
    items = [one(tiny, {"prompt": p, "responses": [GOOD, POOR], "ranks": [1, 2]}) for p in ("why", "how is the sea")]
    with torch.no_grad():
        together, _ = forward(scalar, items, runtime, share_prompts=share_prompts)
        alone = torch.cat([forward(scalar, [item], runtime, share_prompts=False)[0] for item in items])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_all_pairs_of_k_is_bradley_terry_on_its_pairs(tiny: Any, runtime: Any, config: Any) -> None:
    """K forwards instead of K (K - 1), one and the same loss."""
    scalar = load_scalar_model(tiny.reward, dtype=torch.float32).eval()
    items = [one(tiny, {"prompt": "why", "responses": [MIDDLE, GOOD, POOR], "ranks": [2, 1, 3]})]
    pairs = pairs_of(items[0])
    with torch.no_grad():
        scores = forward(scalar, items, runtime, share_prompts=True)
        k_way = ranking_loss(*scores, items, config(loss="all_pairs"))
        scores = forward(scalar, pairs, runtime, share_prompts=False)
        pairwise = ranking_loss(*scores, pairs, config(loss="bradley_terry"))
    assert len(pairs) == 3
    assert float(k_way) == pytest.approx(float(pairwise), abs=1e-5)


def test_centering_adds_its_share(tiny: Any, runtime: Any, config: Any) -> None:
    scores = torch.tensor([[1.0, 3.0]])
    items = [one(tiny, {"prompt": "why", "responses": [GOOD, POOR], "ranks": [1, 2]})]
    mask = torch.ones(1, 2, dtype=torch.bool)
    plain, centred = (float(ranking_loss(scores, mask, items, config(centering=c))) for c in (0.0, 0.01))
    assert centred == pytest.approx(plain + 0.01 * 16)  # (1 + 3) ** 2
    assert plain == pytest.approx(math.log(1 + math.exp(2)))  # d = -2


def test_outcomes_count_untied_pairs_and_half_equal_scores() -> None:
    assert outcomes_of([3.0, 1.0, 2.0], [1, 2, 2]) == [1.0, 1.0]
    assert outcomes_of([1.0, 1.0, 2.0], [1, 2, 3]) == [0.5, 0.0, 0.0]


def test_right_pairs_of_a_ragged_batch(tiny: Any) -> None:
    items = [
        one(tiny, {"prompt": "why", "responses": [GOOD, POOR], "ranks": [1, 2]}),
        one(tiny, {"prompt": "why", "responses": [GOOD, MIDDLE, POOR], "ranks": [1, 2, 3]}),
    ]
    scores = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 2.5]])  # wrong; right, right, wrong
    assert right_pairs(scores, items) == (2.0, 4.0)


def test_a_set_that_mixes_ratings_and_comparisons_is_refused(config: Any, jsonl: Any) -> None:
    rows = [{"prompt": f"explain {word}", "responses": [GOOD, POOR], "ranks": [1, 2]} for word in WORDS]
    rows[3]["meta"] = {"label_source": "ratings"}
    path = jsonl("mixed.jsonl", rows)
    with pytest.raises(DataError, match=r"mixed\.jsonl: 1 of 16 rankings were derived from ratings"):
        train.main(config(dataset={"path": path}), RunOptions())
