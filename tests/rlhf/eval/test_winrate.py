"""Win rates and intervals: hand values, tables of the literature, coverage by simulation."""

import math

import numpy as np
import pytest

from rlhf.errors import DataError
from rlhf.eval.winrate import mean_interval, wilson_interval, win_rate


def test_win_rate_by_hand_counts_ties_half():
    won = win_rate([3.0, 1.0, 2.0, 5.0], [1.0, 1.0, 4.0, 0.0])
    assert (won.wins, won.ties, won.losses, won.n) == (2, 1, 1, 4)
    assert won.value == 2.5 / 4
    assert 0 <= won.low <= won.value <= won.high <= 1


def test_win_rate_is_antisymmetric():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 60).tolist(), rng.integers(0, 4, 60).tolist()
    one, other = win_rate(a, b), win_rate(b, a)
    assert other.value == pytest.approx(1 - one.value)
    assert other.low == pytest.approx(1 - one.high, abs=0.01)
    assert (other.wins, other.losses) == (one.losses, one.wins)


def test_copies_of_an_answer_do_not_narrow_the_interval():
    rng = np.random.default_rng(1)
    points = rng.normal(0.3, 1.0, 40)
    groups = list(range(40))
    once = win_rate(points.tolist(), [0.0] * 40, groups)
    copied = win_rate(np.repeat(points, 5).tolist(), [0.0] * 200, np.repeat(groups, 5).tolist())
    assert (copied.value, copied.low, copied.high) == pytest.approx((once.value, once.low, once.high))
    # Without the groups the same copies would feign five times the data.
    naive = win_rate(np.repeat(points, 5).tolist(), [0.0] * 200)
    assert naive.high - naive.low < 0.6 * (once.high - once.low)


def test_unanimous_prompts_prove_no_certainty():
    won = win_rate([1.0] * 20, [0.0] * 20, [i // 2 for i in range(20)])
    assert won.value == won.high == 1.0
    assert won.low == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)  # Wilson, 10 prompts of 10


def test_win_rate_is_reproducible_and_depends_on_no_global_state():
    np.random.seed(7)
    first = win_rate([1.0, 0.0, 2.0], [0.0, 1.0, 1.0])
    np.random.seed(8)
    assert win_rate([1.0, 0.0, 2.0], [0.0, 1.0, 1.0]) == first


@pytest.mark.parametrize("scores", [[], [math.nan], [math.inf]])
def test_nothing_to_compare_is_a_data_error(scores):
    with pytest.raises(DataError) as caught:
        win_rate(scores, scores)
    assert caught.value.fix


def test_length_mismatch_is_a_bug():
    with pytest.raises(ValueError, match="2 candidate scores against 1"):
        win_rate([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="1 groups for 2 values"):
        mean_interval([1.0, 2.0], ["a"])


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_the_literature(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_is_symmetric_and_refuses_no_trials():
    low, high = wilson_interval(3, 10)
    assert wilson_interval(7, 10) == pytest.approx((1 - high, 1 - low))
    with pytest.raises(DataError):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="11 successes"):
        wilson_interval(11, 10)


def test_mean_interval_matches_the_normal_theory_of_many_values():
    values = np.random.default_rng(2).normal(5.0, 2.0, 900)
    mean, low, high = mean_interval(values.tolist())
    half = 1.959964 * values.std() / math.sqrt(900)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.05 * half)


def test_groups_of_unequal_size_keep_their_weight():
    value, low, high = mean_interval([0.0, 0.0, 0.0, 4.0], ["a", "a", "a", "b"])
    assert (value, low, high) == (1.0, 0.0, 4.0)


def test_the_interval_covers_the_truth_when_answers_share_a_prompt():
    """Prompt effects of variance 1, answer noise of variance 0.25; the truth is 0."""
    rng = np.random.default_rng(3)
    prompts, answers, trials = 40, 3, 150
    groups = np.repeat(np.arange(prompts), answers).tolist()
    clustered = naive = 0
    for _ in range(trials):
        values = np.repeat(rng.normal(0, 1, prompts), answers) + rng.normal(0, 0.5, prompts * answers)
        _, low, high = mean_interval(values.tolist(), groups)
        clustered += low <= 0 <= high
        _, low, high = mean_interval(values.tolist())
        naive += low <= 0 <= high
    # Binomial standard deviation of a coverage of 0.95 over 150 trials: 0.018.
    assert 0.89 <= clustered / trials <= 0.99
    assert naive / trials < 0.85
