"""Scalar models: the reward model at the last token, the critic one token earlier, plain transformers alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from reward_model.model import RewardModel, save_reward_model
from rlhf.errors import ModelError
from rlhf.models.load import load_sequence_classifier
from rlhf.models.value import NORMALISATION_FILE, Critic, ScalarModel, load_scalar_model
from rlhf.rollout.buffer import pad_right
from rlhf.types import Rollout, StopReason

ROWS = [[2, 9, 12, 3], [2, 30, 14, 15, 16, 40, 3], [2, 7, 3, 8, 3], [5]]


def batch(rows: list[list[int]], pad: int, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [*rows, [pad] * (max(map(len, rows)) + extra)]
    mask = pad_right([[True] * len(row) for row in rows], False, torch.bool)
    return pad_right(rows, pad, torch.long)[:-1], mask[:-1]


@pytest.fixture(scope="module")
def scalar(tiny: Any) -> ScalarModel:
    return load_scalar_model(tiny.reward, dtype=torch.float32).eval()


@torch.no_grad()
def test_the_score_is_the_head_on_the_last_real_token_normalised(scalar: ScalarModel) -> None:
    tokens, mask = batch(ROWS, 3, extra=3)
    scores = scalar.score_last(tokens, mask)
    for row, score in zip(ROWS, scores.tolist(), strict=True):
        hidden = scalar.classifier.model(torch.tensor([row])).last_hidden_state[0, -1]
        raw = float(hidden @ scalar.classifier.score.weight[0])
        assert score == pytest.approx((raw - 0.25) / 0.5, abs=1e-5)  # mean and std of the fixture


@torch.no_grad()
@pytest.mark.parametrize("pad", [0, 3], ids=["pad-is-unk", "pad-is-eos"])
def test_a_score_does_not_depend_on_padding_or_side(scalar: ScalarModel, pad: int) -> None:
    alone = torch.cat([scalar.score_last(*batch([row], pad)) for row in ROWS])
    for extra in (0, 1, 6):
        torch.testing.assert_close(scalar.score_last(*batch(ROWS, pad, extra)), alone, atol=1e-5, rtol=0)
    tokens, mask = batch([row[::-1] for row in ROWS], pad, 2)
    torch.testing.assert_close(scalar.score_last(tokens.flip(1), mask.flip(1)), alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_critic_at_t_is_the_reward_model_s_score_of_the_tokens_before(scalar: ScalarModel) -> None:
    values = Critic(scalar)(*batch(ROWS, 3))
    for row, value_T in zip(ROWS, values, strict=True):
        assert float(value_T[0]) == 0.0
        for t in range(1, len(row)):
            assert float(value_T[t]) == pytest.approx(float(scalar.score_last(*batch([row[:t]], 3))), abs=1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_reward_model_scores_come_back_in_the_order_given(tiny: Any, runtime: Any, order: int) -> None:
    rows = ROWS[::order]
    model = RewardModel.load(tiny.reward, runtime, tokenizer=tiny.tokenizer, micro_batch_size=2)
    alone = [model.score_tokens([row])[0] for row in rows]
    seen: list[int] = []
    assert model.score_tokens(rows, seen.append) == pytest.approx(alone, abs=1e-5)
    assert seen == [2, 2]
    rollouts = [Rollout("", "", row, [True] * len(row), [0.0] * len(row), StopReason.EOS) for row in rows]
    assert model(rollouts) == pytest.approx(alone, abs=1e-5)


@torch.no_grad()
def test_a_saved_reward_model_scores_alike_in_plain_transformers(tiny: Any, scalar: ScalarModel) -> None:
    """Padded batches that end with EOS, with the saved tokenizer's own padding: raw score, before mean and std."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    plain = AutoModelForSequenceClassification.from_pretrained(tiny.reward).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.reward)
    assert tokenizer.pad_token_id == plain.config.pad_token_id != tokenizer.eos_token_id
    texts = ["why <|im_end|>", "explain the sun and the moon <|im_end|>", "it is hot <|im_end|>"]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    assert (given["attention_mask"].sum(1) < given["input_ids"].shape[1]).any(), "something is padded"
    raw = plain(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits.squeeze(-1)
    ours = scalar.score_last(given["input_ids"], given["attention_mask"].bool())
    torch.testing.assert_close((raw - 0.25) / 0.5, ours, atol=1e-5, rtol=0)


def test_the_normalisation_stands_beside_the_weights(tiny: Any, scalar: ScalarModel) -> None:
    assert json.loads((Path(tiny.reward) / NORMALISATION_FILE).read_text()) == {"mean": 0.25, "std": 0.5}
    assert (float(scalar.mean), float(scalar.std)) == (0.25, 0.5)
    assert not {"mean", "std"} & scalar.state_dict().keys()


@torch.no_grad()
def test_a_new_head_is_drawn_by_stiennon_s_rule(tiny: Any) -> None:
    """N(0, 1/(d+1)): 40 heads of 32 weights, the deviation within 4 standard errors of 33 ** -0.5."""
    torch.manual_seed(0)
    models = [load_sequence_classifier(tiny.path, dtype=torch.float32, new_head=True) for _ in range(40)]
    heads = torch.stack([model.score.weight for model in models])
    expected, n = 33**-0.5, heads.numel()
    assert float(heads.std()) == pytest.approx(expected, rel=4 / (2 * n) ** 0.5)
    assert abs(float(heads.mean())) < 4 * expected / n**0.5


def test_a_trained_head_is_kept(tiny: Any) -> None:
    one, two = (load_sequence_classifier(tiny.reward, dtype=torch.float32) for _ in range(2))
    assert torch.equal(one.score.weight, two.score.weight)


def test_a_classifier_with_several_labels_is_refused(tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny.reward, num_labels=3, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="3 labels"):
        load_sequence_classifier(str(tmp_path), dtype=torch.float32)


def test_another_tokenizer_is_refused(tiny: Any, runtime: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.path)
    tokenizer.add_tokens(["new"])
    with pytest.raises(ModelError, match="another tokenizer"):
        RewardModel.load(tiny.reward, runtime, tokenizer=tokenizer)


def test_saving_leaves_the_training_tokenizer_as_it_was(tiny: Any, tmp_path: Path) -> None:
    classifier = load_sequence_classifier(tiny.path, dtype=torch.float32, new_head=True)
    save_reward_model(tmp_path / "r", classifier, tiny.tokenizer, {"mean": 0.0, "std": 1.0})
    assert tiny.tokenizer.pad_token_id == tiny.tokenizer.eos_token_id
