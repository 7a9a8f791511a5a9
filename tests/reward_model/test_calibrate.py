"""What is measured on held-out labels, against hand numbers, brute force and scikit-learn."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
import torch

from reward_model.calibrate import (
    JudgedPair,
    Scored,
    Units,
    accuracy,
    accuracy_by,
    best_of_n,
    best_temperature,
    calibration,
    correlation,
    expected_pick,
    judged_pairs,
    length_bias,
    rating_fit,
    reliability,
)
from reward_model.data import RankedTokens, RatingScale, merge_by_prompt, wins_from_ranks
from reward_model.measure import Measured, attach, gold_accuracy, summarise
from rlhf.eval.reward_page import render_reward_page


def item(ranks: list[int], lengths: list[int], group: str = "g", **more: Any) -> RankedTokens:
    more.setdefault("wins", wins_from_ranks(ranks))
    return RankedTokens([[1] * n for n in lengths], ranks, group=group, response_lengths=lengths, **more)


def pair(logit: float, target: float = 1.0, gap: int = 0, group: str = "g") -> JudgedPair:
    return JudgedPair(logit, target, gap, group, 0.0)


# --- calibration ----------------------------------------------------------------------------------------------


def test_calibration_by_hand() -> None:
    """Confidences .75, .75, .9, .9; right, wrong, right, right."""
    logits = [math.log(3), -math.log(3), math.log(9), math.log(9)]
    found = calibration([pair(logit) for logit in logits])
    assert found["brier"] == pytest.approx((0.25**2 + 0.75**2 + 2 * 0.1**2) / 4)
    assert found["log_loss"] == pytest.approx(-(math.log(0.75) + math.log(0.25) + 2 * math.log(0.9)) / 4)
    assert found["entropy_floor"] == 0.0
    bins = reliability(torch.tensor(logits, dtype=torch.float64), torch.ones(4, dtype=torch.float64), bins=2)
    assert [(b["confidence"], b["accuracy"], b["pairs"]) for b in bins] == [
        (pytest.approx(0.75), 0.5, 2),
        (pytest.approx(0.9), 1.0, 2),
    ]


def test_soft_labels_have_an_entropy_that_no_model_beats() -> None:
    pairs = [pair(math.log(0.7 / 0.3), 0.7), pair(0.0, 0.5)]
    found = calibration(pairs)
    floor = (-(0.7 * math.log(0.7) + 0.3 * math.log(0.3)) + math.log(2)) / 2
    assert found["entropy_floor"] == pytest.approx(floor)
    assert found["log_loss"] == pytest.approx(floor)
    assert found["ece"] == pytest.approx(0.0, abs=1e-12)


def test_the_error_is_that_of_scikit_learns_quantile_bins() -> None:
    calibration_curve = pytest.importorskip("sklearn.calibration").calibration_curve
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 1000)
    wins = rng.random(1000) < 1 / (1 + np.exp(-logits / 3))  # three times too sure
    found = calibration([pair(logit, float(win)) for logit, win in zip(logits, wins, strict=True)])
    confidence = 1 / (1 + np.exp(-np.abs(logits)))
    right = np.where(logits > 0, wins, ~wins)
    accuracies, confidences = calibration_curve(right, confidence, n_bins=10, strategy="quantile")
    assert [b["pairs"] for b in found["reliability"]] == [100] * 10
    assert found["ece"] == pytest.approx(np.abs(accuracies - confidences).mean(), abs=1e-9)
    assert found["ece"] > 0.1
    assert 1 / found["temperature"] == pytest.approx(1 / 3, abs=0.14)  # 4 standard errors
    assert found["log_loss_at_temperature"] < found["log_loss"]


def test_a_planted_temperature_comes_back() -> None:
    """With soft labels sigmoid(logit / 2.5) the likelihood is highest at 2.5 exactly."""
    logit_N = torch.linspace(-4, 4, 41, dtype=torch.float64)
    assert best_temperature(logit_N, (logit_N / 2.5).sigmoid()) == pytest.approx(2.5, rel=1e-6)


@pytest.mark.parametrize("target", [1.0, 0.0, 0.5], ids=["never wrong", "always wrong", "a coin"])
def test_no_temperature_helps_where_there_is_nothing_to_weigh(target: float) -> None:
    logit_N = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert best_temperature(logit_N, torch.full((2,), target, dtype=torch.float64)) is None


# --- pairs ----------------------------------------------------------------------------------------------------


def test_pairs_are_untied_with_the_better_one_first() -> None:
    wins = [[0.5, 0.2, 0.4], [0.8, 0.5, 0.7], [0.6, 0.3, 0.5]]
    one = Scored(item([2, 1, 2], [5, 3, 9], wins=wins), [1.0, 2.0, 4.0], [[1.0, 2.0, 4.0], [0.0, 3.0, 4.0]])
    pairs = judged_pairs([one], std=10.0)
    assert [(p.logit, p.target, p.gap, p.is_right) for p in pairs] == [(10.0, 0.8, -2, 1.0), (-20.0, 0.7, -6, 0.0)]
    assert [p.spread for p in pairs] == pytest.approx([pstdev([1, 3]), pstdev([-2, -1])])


def test_accuracy_in_parts_covers_every_pair_once_in_order() -> None:
    logits = [3.0, -1.0, 0.5, -0.1, 2.0, 0.0, -4.0]
    pairs = [pair(logit, group=str(i)) for i, logit in enumerate(logits)]
    assert accuracy(pairs)["value"] == pytest.approx(3.5 / 7)
    parts = accuracy_by(pairs, [abs(logit) for logit in logits], parts=3)
    assert [(p["from"], p["to"], p["pairs"]) for p in parts] == [(0.0, 0.5, 3), (1.0, 2.0, 2), (3.0, 4.0, 2)]
    assert [p["value"] for p in parts] == pytest.approx([1.5 / 3, 0.5, 0.5])


# --- length ---------------------------------------------------------------------------------------------------


def test_length_bias_by_hand() -> None:
    """Two prompts: in the first the short answer is better and scores lower; in the second all is alike but level."""
    scored = [
        Scored(item([1, 2], [2, 6], "a"), [0.0, 1.0], [[0.0, 1.0]]),
        Scored(item([1, 2], [12, 10], "b"), [5.0, 4.0], [[5.0, 4.0]]),
        Scored(item([1, 2], [3, 3], "c"), [5.0, 4.0], [[5.0, 4.0]]),
    ]
    found = length_bias(scored, judged_pairs(scored, 1.0))
    assert found["pairs"] == 2
    assert found["longer_wins_in_labels"]["value"] == 0.5
    assert found["longer_wins_in_model"]["value"] == 1.0
    scores, lengths = [0, 1, 5, 4, 5, 4], [2, 6, 12, 10, 3, 3]
    inner, inner_lengths = [-0.5, 0.5, 0.5, -0.5, 0.5, -0.5], [-2, 2, 1, -1, 0, 0]
    assert found["correlation"] == pytest.approx(np.corrcoef(scores, lengths)[0, 1])
    assert found["correlation_within_prompts"] == pytest.approx(np.corrcoef(inner, inner_lengths)[0, 1])


def test_a_constant_has_no_correlation() -> None:
    assert correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert correlation([1.0, 2.0], [1.0, 2.0]) is None
    one = Scored(item([1, 2], [4, 4]), [1.0, 0.0], [[1.0, 0.0]])
    found = length_bias([one], judged_pairs([one], 1.0))
    assert (found["longer_wins_in_labels"], found["correlation"]) == (None, None)


# --- best of n ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [[0.3, -1.0, 2.5, 0.9, 0.1], [1.0, 1.0, 0.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
def test_the_expected_pick_is_that_of_every_choice_of_n(scores: list[float]) -> None:
    values = [5.0, 1.0, -2.0, 4.0, 8.0]
    for n in range(1, 6):
        picks = []
        for chosen in combinations(range(5), n):
            best = max(scores[i] for i in chosen)
            picks.append(fmean(values[i] for i in chosen if scores[i] == best))
        assert expected_pick(scores, values, n) == pytest.approx(fmean(picks))


def test_best_of_n_over_prompts() -> None:
    scored = [
        Scored(item([1, 2, 3], [1, 1, 1], "a", gold=[1.0, 2.0, 3.0]), [3.0, 2.0, 1.0], []),
        Scored(item([1, 2], [1, 1], "b", gold=[0.0, 4.0]), [0.0, 1.0], []),
        Scored(item([1], [1], "c"), [9.0], []),
    ]
    rows = best_of_n(scored)
    assert [row["n"] for row in rows] == [1, 2], "no prompt of two or more has fewer than two"
    assert [row["kl"] for row in rows] == pytest.approx([0.0, math.log(2) - 0.5])
    assert [row["proxy"]["value"] for row in rows] == pytest.approx([(2 + 0.5) / 2, ((3 + 3 + 2) / 3 + 1) / 2])
    assert [row["gold"]["value"] for row in rows] == pytest.approx([2.0, ((1 + 1 + 2) / 3 + 4) / 2])
    assert best_of_n(scored[2:]) == []


# --- ratings --------------------------------------------------------------------------------------------------


def test_ratings_are_compared_in_their_own_unit() -> None:
    """Score 0.5 is raw 1 + 2 * 0.5 = 2 and rating 3 + 0.5 * 2 = 4."""
    scored = [Scored(item([1, 2], [1, 1], ratings=[5.0, 3.0]), [0.5, -0.5], [])]
    found = rating_fit(scored, Units(1.0, 2.0, RatingScale(3.0, 0.5)))
    assert (found["mse"], found["mse_of_a_constant"]) == (pytest.approx((1 + 0) / 2), pytest.approx(2.0))


def test_rated_rows_of_a_prompt_become_one_ranking() -> None:
    rows = [
        item([1], [n], group, ratings=[rating]) for n, group, rating in ((1, "a", 2.0), (2, "b", 9.0), (3, "a", 4.0))
    ]
    rows.append(item([1], [4], "a", ratings=[4.0]))
    merged = merge_by_prompt(rows)
    assert [(m.group, m.ranks, m.response_lengths, m.ratings) for m in merged] == [
        ("a", [3, 1, 1], [1, 3, 4], [2.0, 4.0, 4.0]),
        ("b", [1], [2], [9.0]),
    ]
    assert merged[0].wins[1] == [1.0, 0.5, 0.5]


# --- the report -----------------------------------------------------------------------------------------------


def test_scores_come_back_to_their_items() -> None:
    items = [item([1, 2], [1, 1]), item([1], [1]), item([2, 1], [1, 1], gold=[0.0, 1.0])]
    scores_MN = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0], [10.0, 11.0, 12.0, 13.0, 14.0]])
    scored = attach(scores_MN, scores_MN.mean(0), items)
    assert [one.scores for one in scored] == [[5.0, 6.0], [7.0], [8.0, 9.0]]
    assert scored[2].members == [[3.0, 4.0], [13.0, 14.0]]
    assert gold_accuracy(scored) == {"value": 1.0, "low": pytest.approx(0.2065, abs=1e-3), "high": 1.0, "pairs": 1}


def test_the_page_escapes_its_title_and_shows_what_was_measured(tmp_path: Any) -> None:
    scored = [
        Scored(item([1, 2], [2, 6 + i], str(i), gold=[1.0, 0.0]), [1.0 - i % 3, 0.0], [[1.0, 0.0]]) for i in range(12)
    ]
    pairs = judged_pairs(scored, 1.0)
    report: dict[str, Any] = {
        "prompts": 12,
        "responses": 24,
        "members": 1,
        "length": length_bias(scored, pairs),
        "best_of_n": best_of_n(scored),
        "accuracy": accuracy(pairs),
        "calibration": calibration(pairs),
        "by_confidence": accuracy_by(pairs, [abs(p.logit) for p in pairs]),
        "by_length_gap": accuracy_by(pairs, [p.gap for p in pairs]),
        "gold_accuracy": gold_accuracy(scored),
    }
    page = render_reward_page("<script>alert(1)</script>", report)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 6
    Measured(summarise(report), report).write(tmp_path, title="Reward model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["reward_report.html", "reward_report.json"]
    assert summarise(report)["accuracy_against"] == "gold"
