"""Simulated annotators: the stated probability, balanced sides, independence of what else is judged."""

import math
from collections import Counter
from itertools import combinations

import pytest
from scipy import stats

from reward_model.labeling.simulate import judge_pairs, left_probability
from rlhf.config_schema import AnnotatorConfig
from rlhf.errors import ConfigError, DataError

PRECISE = AnnotatorConfig(name="precise", noise=0.5)
NOISY = AnnotatorConfig(name="noisy", noise=3.0)
LEFTIST = AnnotatorConfig(name="leftist", noise=1.0, left_bias=0.8)
CARELESS = AnnotatorConfig(name="careless", noise=1.0, careless=0.6)


@pytest.mark.parametrize(
    ("annotator", "expected"),
    [
        (AnnotatorConfig(name="a", noise=2.0), 1 / (1 + math.exp(-1.5))),
        (AnnotatorConfig(name="a", noise=2.0, left_bias=0.5), 1 / (1 + math.exp(-2.0))),
        (AnnotatorConfig(name="a", noise=2.0, careless=0.4), 0.6 / (1 + math.exp(-1.5)) + 0.2),
        (AnnotatorConfig(name="a", careless=1.0), 0.5),
        (AnnotatorConfig(name="a", noise=1e-6), 1.0),
    ],
)
def test_left_probability_by_the_formula(annotator: AnnotatorConfig, expected: float) -> None:
    assert left_probability(5.0, 2.0, annotator) == pytest.approx(expected, abs=1e-12)


def test_a_precise_annotator_and_a_wide_gap_do_not_overflow() -> None:
    annotator = AnnotatorConfig(name="a", noise=1e-9)
    assert left_probability(-25.0, 0.0, annotator) == 0.0
    assert left_probability(0.0, -25.0, annotator) == 1.0


def test_every_annotator_judges_every_pair_once() -> None:
    gold = [[0.0, 1.0, 2.0, 3.0], [0.0, 1.0], [5.0, 4.0, 3.0]]
    judgments = judge_pairs(gold, [PRECISE, NOISY], seed=1)
    seen = Counter((j.annotator, j.item, min(j.left, j.right), max(j.left, j.right)) for j in judgments)
    expected = {
        (name, item, i, j)
        for name in ("precise", "noisy")
        for item, row in enumerate(gold)
        for i, j in combinations(range(len(row)), 2)
    }
    assert set(seen) == expected
    assert set(seen.values()) == {1}


def test_sides_are_counterbalanced_over_annotators_and_pairs() -> None:
    annotators = [PRECISE, NOISY, LEFTIST, CARELESS]
    judgments = judge_pairs([[0.0, 1.0, 2.0, 3.0]] * 50, annotators, seed=2)
    lower_left_by_pair: Counter[tuple[int, int, int]] = Counter()
    lower_left_by_annotator: Counter[str] = Counter()
    for j in judgments:
        lower_left_by_pair[j.item, min(j.left, j.right), max(j.left, j.right)] += j.left < j.right
        lower_left_by_annotator[j.annotator] += j.left < j.right
    assert set(lower_left_by_pair.values()) == {2}  # two of four annotators see either order
    assert set(lower_left_by_annotator.values()) == {150}  # half of 6 pairs in each of 50 prompts


def test_sides_are_random_over_prompts() -> None:
    judgments = judge_pairs([[0.0, 1.0]] * 1000, [PRECISE], seed=3)
    lower_left = sum(j.left < j.right for j in judgments)
    assert abs(lower_left - 500) < 4 * math.sqrt(250)


@pytest.mark.parametrize("annotator", [PRECISE, NOISY, LEFTIST, CARELESS], ids=lambda a: a.name)
def test_choices_follow_the_stated_probability(annotator: AnnotatorConfig) -> None:
    gold = [0.0, 0.7, 2.0]
    judgments = judge_pairs([gold] * 2000, [annotator], seed=4)
    shown = Counter((j.left, j.right) for j in judgments)
    chose_left = Counter((j.left, j.right) for j in judgments if j.choice == "left")
    assert len(shown) == 6
    chi_square = 0.0
    for (left, right), n in shown.items():
        p = left_probability(gold[left], gold[right], annotator)
        chi_square += (chose_left[left, right] - n * p) ** 2 / (n * p * (1 - p))
    assert stats.chi2.sf(chi_square, df=6) > 1e-4


def test_the_same_seed_repeats_and_another_differs() -> None:
    gold = [[0.0, 0.1, 0.2]] * 20
    assert judge_pairs(gold, [NOISY], seed=5) == judge_pairs(gold, [NOISY], seed=5)
    assert judge_pairs(gold, [NOISY], seed=5) != judge_pairs(gold, [NOISY], seed=6)


def test_judgments_do_not_depend_on_other_prompts_or_later_annotators() -> None:
    gold = [[0.0, 0.1, 0.2]] * 20
    few = judge_pairs(gold[:5], [NOISY], seed=7)
    many = judge_pairs(gold[:4] + [[0.0, 0.1, 0.2]] + [[9.0, 1.0]] * 15, [NOISY, CARELESS], seed=7)
    assert [j for j in many if j.item < 5 and j.annotator == "noisy"] == few


def test_prompts_do_not_share_their_coins() -> None:
    judgments = judge_pairs([[0.0, 0.0]] * 200, [NOISY], seed=8)
    assert 50 < sum(j.choice == "left" for j in judgments) < 150


def test_names_must_differ() -> None:
    with pytest.raises(ConfigError, match="share a name"):
        judge_pairs([[0.0, 1.0]], [NOISY, NOISY], seed=0)


def test_gold_scores_must_be_finite() -> None:
    with pytest.raises(DataError, match="prompt 1"):
        judge_pairs([[0.0, 1.0], [0.0, math.nan]], [NOISY], seed=0)
