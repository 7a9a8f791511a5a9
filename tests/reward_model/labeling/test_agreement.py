"""Aggregation against hand-computed steps, planted truths and invariances; undefined figures say so."""

import math
import random
from itertools import pairwise

import pytest

from reward_model.labeling.agreement import (
    Pair,
    agreement_with_gold,
    annotator_report,
    dawid_skene,
    majority,
    ranks_from_wins,
    wins_matrix,
)
from reward_model.labeling.simulate import Judgment, judge_pairs, left_probability
from rlhf.config_schema import AnnotatorConfig
from rlhf.errors import DataError


def vote(item: int, annotator: str, choice: str, *, swapped: bool = False) -> Judgment:
    """A vote on responses 0 and 1 of `item`; swapped shows response 1 on the left."""
    left, right = (1, 0) if swapped else (0, 1)
    return Judgment(item, left, right, annotator, "left" if choice == "left" else "right")


def planted(accuracies: dict[str, float], pairs: int, seed: int) -> tuple[list[Judgment], dict[Pair, bool]]:
    """Votes right with each annotator's accuracy, in random orders; and whether response 0 is the better."""
    rng = random.Random(seed)
    truth: dict[Pair, bool] = {(item, 0, 1): rng.random() < 0.5 for item in range(pairs)}
    votes = []
    for (item, _, _), lower_better in truth.items():
        for name, accuracy in accuracies.items():
            swapped = rng.random() < 0.5
            truth_is_left = lower_better != swapped
            chose_left = truth_is_left == (rng.random() < accuracy)
            votes.append(vote(item, name, "left" if chose_left else "right", swapped=swapped))
    return votes, truth


def share_right(posteriors: dict[Pair, float], truth: dict[Pair, bool]) -> float:
    return sum((p > 0.5) == truth[pair] for pair, p in posteriors.items()) / len(truth)


# --- majority -----------------------------------------------------------------------------------------------


def test_majority_is_the_share_for_the_lower_index_whatever_the_order() -> None:
    votes = [vote(0, "a", "left"), vote(0, "b", "right", swapped=True), vote(0, "c", "right")]
    votes += [vote(1, "a", "left", swapped=True)]
    assert majority(votes) == {(0, 0, 1): pytest.approx(2 / 3), (1, 0, 1): 0.0}


@pytest.mark.parametrize("aggregate", [majority, dawid_skene])
def test_no_votes_are_an_error(aggregate: object) -> None:
    with pytest.raises(DataError, match="no judgments"):
        aggregate([])  # type: ignore[operator]


# --- Dawid-Skene --------------------------------------------------------------------------------------------


def test_one_iteration_by_hand() -> None:
    """Two annotators, two pairs; b sees pair 1 swapped. q starts at the shares: pair 0 at 1, pair 1 at 1/2.

    a: pair 0 left, truth left (weight 1); pair 1 left, truth left or right (1/2 each). Counts: left row
       (1.5, 0), right row (0.5, 0); with (2, 1) and (1, 2) before: 3.5 of 4.5 and 1.5 of 3.5.
    b: pair 0 left, truth left (weight 1); pair 1 swapped, left = response 1, truth left or right (1/2 each).
       The same counts.
    E, pair 0: C_a[l, l] C_b[l, l] against C_a[r, l] C_b[r, l]. Pair 1: if response 0 is better, it stands
    left for a and right for b: C_a[l, l] C_b[r, l]; else C_a[r, l] C_b[l, l]: equal, so q stays at 1/2.
    """
    votes = [vote(0, "a", "left"), vote(0, "b", "left")]
    votes += [vote(1, "a", "left"), vote(1, "b", "left", swapped=True)]
    left_if_left, left_if_right = 3.5 / 4.5, 1.5 / 3.5
    fit = dawid_skene(votes, max_iterations=1)
    assert fit.iterations == 1
    for name in ("a", "b"):
        assert fit.confusions[name][0] == pytest.approx([left_if_left, 1 - left_if_left], abs=1e-12)
        assert fit.confusions[name][1] == pytest.approx([left_if_right, 1 - left_if_right], abs=1e-12)
    for_0, for_1 = left_if_left**2, left_if_right**2
    assert fit.posteriors[0, 0, 1] == pytest.approx(for_0 / (for_0 + for_1), abs=1e-12)
    assert fit.posteriors[1, 0, 1] == pytest.approx(0.5, abs=1e-12)
    expected = math.log(0.5 * for_0 + 0.5 * for_1) + math.log(left_if_left * left_if_right)
    assert fit.log_likelihood == pytest.approx(expected, abs=1e-12)
    log_prior_of_one = 2 * math.log(left_if_left) + math.log(1 - left_if_left)
    log_prior_of_one += math.log(left_if_right) + 2 * math.log(1 - left_if_right)
    assert fit.objectives == pytest.approx([expected + 2 * log_prior_of_one], abs=1e-12)


def test_planted_accuracies_are_recovered() -> None:
    accuracies = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}
    votes, _ = planted(accuracies, pairs=4000, seed=1)
    fit = dawid_skene(votes, max_iterations=500)
    assert fit.converged
    for name, accuracy in accuracies.items():
        for side in (0, 1):
            # 2000 votes a side have a standard error of 0.011 at most; unknown truths double it at worst.
            assert fit.confusions[name][side][side] == pytest.approx(accuracy, abs=0.045)


def test_beats_majority_when_one_annotator_is_much_better() -> None:
    votes, truth = planted({"expert": 0.95, "b": 0.55, "c": 0.55, "d": 0.6, "e": 0.6}, pairs=3000, seed=2)
    assert share_right(dawid_skene(votes).posteriors, truth) > share_right(majority(votes), truth) + 0.1


def test_left_bias_shows_in_the_confusion_matrix() -> None:
    """A constant gap of 1.5 makes P(left | truth) the same for all pairs: sigmoid(+-1.5 + bias)."""
    biases = {"even": 0.0, "left": 1.0, "right": -1.0}
    annotators = [AnnotatorConfig(name=name, left_bias=bias) for name, bias in biases.items()]
    annotators.append(AnnotatorConfig(name="precise", noise=0.5))
    rng = random.Random(3)
    gold = [[0.0, 1.5] if rng.random() < 0.5 else [1.5, 0.0] for _ in range(4000)]
    fit = dawid_skene(judge_pairs(gold, annotators, seed=3), max_iterations=500)
    for annotator in annotators:
        p_left = [left_probability(1.5, 0.0, annotator), left_probability(0.0, 1.5, annotator)]
        assert [row[0] for row in fit.confusions[annotator.name]] == pytest.approx(p_left, abs=0.045)


def test_a_careless_annotator_weighs_next_to_nothing() -> None:
    annotators = [AnnotatorConfig(name=name, noise=0.5) for name in "ab"]
    annotators.append(AnnotatorConfig(name="c", careless=0.95))
    rng = random.Random(4)
    gold = [[rng.gauss(0, 1), rng.gauss(0, 1)] for _ in range(2000)]
    votes = judge_pairs(gold, annotators, seed=4)
    fit = dawid_skene(votes)
    accuracy = {name: (c[0][0] + c[1][1]) / 2 for name, c in fit.confusions.items()}
    assert accuracy["c"] < 0.6 < 0.8 < min(accuracy["a"], accuracy["b"])
    report = annotator_report(votes, fit.posteriors, gold)["annotators"]
    assert report["c"]["accuracy"] < 0.6 < 0.8 < min(report[name]["accuracy"] for name in "ab")
    assert report["c"]["agreement"] < 0.6 < 0.8 < min(report[name]["agreement"] for name in "ab")


@pytest.mark.parametrize("seed", range(5))
def test_the_objective_never_decreases(seed: int) -> None:
    votes, _ = planted({"a": 0.8, "b": 0.65, "c": 0.6, "d": 0.4}, pairs=60, seed=seed)
    objectives = dawid_skene(votes, max_iterations=200).objectives
    assert len(objectives) > 3
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(objectives))


def test_fixed_point_satisfies_the_update_equations() -> None:
    """An independent, loop-wise E step at the fit gives the fit's posteriors."""
    votes, _ = planted({"a": 0.85, "b": 0.7, "c": 0.6}, pairs=80, seed=6)
    fit = dawid_skene(votes, max_iterations=2000)
    for pair, posterior in fit.posteriors.items():
        likelihoods = []
        for better in (0, 1):
            product = 0.5
            for v in votes:
                if v.item == pair[0]:
                    truth_side = 0 if v.left == better else 1
                    product *= fit.confusions[v.annotator][truth_side][0 if v.choice == "left" else 1]
            likelihoods.append(product)
        assert posterior == pytest.approx(likelihoods[0] / sum(likelihoods), abs=1e-9)


def test_renumbering_the_responses_mirrors_the_posteriors() -> None:
    votes, _ = planted({"a": 0.85, "b": 0.7, "c": 0.6}, pairs=50, seed=7)
    mirrored = [Judgment(v.item, 1 - v.left, 1 - v.right, v.annotator, v.choice) for v in votes]
    fit, other = dawid_skene(votes), dawid_skene(mirrored)
    assert other.posteriors == pytest.approx({pair: 1 - p for pair, p in fit.posteriors.items()}, abs=1e-9)


@pytest.mark.parametrize("names", ["a", "abc"])
@pytest.mark.parametrize("swap_some", [False, True])
def test_unanimous_votes_give_finite_figures(names: str, swap_some: bool) -> None:
    votes = []
    for item in range(6):
        swapped = swap_some and item % 2 == 1
        votes += [vote(item, name, "right" if swapped else "left", swapped=swapped) for name in names]
    fit = dawid_skene(votes)
    entries = [x for confusion in fit.confusions.values() for row in confusion for x in row]
    assert all(map(math.isfinite, [fit.log_likelihood, *fit.objectives, *entries]))
    # Shown always on the left, the winner may owe it to a bias: weak evidence. Swapped, it may not.
    assert min(fit.posteriors.values()) > (0.6 if swap_some else 0.5)
    assert max(fit.posteriors.values()) < 1.0


def test_one_annotator_alone_is_believed_but_not_without_doubt() -> None:
    votes, _ = planted({"a": 0.8}, pairs=200, seed=8)
    fit = dawid_skene(votes, max_iterations=5000)
    assert {pair: p > 0.5 for pair, p in fit.posteriors.items()} == {
        pair: share == 1.0 for pair, share in majority(votes).items()
    }
    assert all(0.55 < max(p, 1 - p) < 0.8 for p in fit.posteriors.values())


# --- wins and ranks -----------------------------------------------------------------------------------------


def test_wins_matrix_holds_both_directions_and_a_half_elsewhere() -> None:
    wins = wins_matrix({(0, 1): 0.75, (1, 2): 0.0}, 3)
    assert wins == [[0.5, 0.75, 0.5], [0.25, 0.5, 0.0], [0.5, 1.0, 0.5]]


@pytest.mark.parametrize(
    ("wins", "ranks"),
    [
        ([[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]], [1, 2, 3]),
        ([[0.5, 0.5, 1], [0.5, 0.5, 1], [0, 0, 0.5]], [1, 1, 3]),
        ([[0.5, 0, 0], [1, 0.5, 0.5], [1, 0.5, 0.5]], [3, 1, 1]),
        ([[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]], [1, 1, 1]),  # a circle
        ([[0.5, 0.3, 0.3], [0.7, 0.5, 0.1], [0.7, 0.9, 0.5]], [3, 2, 1]),
        ([[0.5, 0.5 + 1e-12], [0.5 - 1e-12, 0.5]], [1, 1]),  # equal but for rounding
    ],
)
def test_ranks_by_row_sums_and_ties_share_the_better_rank(wins: list[list[float]], ranks: list[int]) -> None:
    assert ranks_from_wins(wins) == ranks


# --- the report ---------------------------------------------------------------------------------------------


def test_annotator_report_by_hand() -> None:
    """Gold: response 0 is better in prompts 0 and 1, and ties in prompt 2."""
    gold = [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    votes = [
        vote(0, "a", "left"),
        vote(1, "a", "right", swapped=True),
        vote(2, "a", "left"),
        vote(0, "b", "left"),
        vote(1, "b", "left", swapped=True),
    ]
    report = annotator_report(votes, {(0, 0, 1): 0.9, (1, 0, 1): 0.9, (2, 0, 1): 0.5}, gold)
    a, b = report["annotators"]["a"], report["annotators"]["b"]
    figures = ("judgments", "left_rate", "agreement", "accuracy")
    assert [a[key] for key in figures] == [3, pytest.approx(2 / 3), 1.0, 1.0]
    assert [b[key] for key in figures] == [2, 1.0, 0.5, 0.5]
    assert a["gold_confusion"] == [[1.0, 0.0], [0.0, 1.0]]
    assert b["gold_confusion"] == [[1.0, 0.0], [1.0, 0.0]]
    assert a["notes"] == b["notes"] == {}
    (pair,) = report["pairwise_agreement"]
    assert pair == {"annotators": ["a", "b"], "pairs": 2, "agreement": 0.5, "notes": {}}


def test_undefined_figures_are_none_with_a_word() -> None:
    votes = [vote(0, "a", "left"), vote(1, "b", "left")]
    report = annotator_report(votes, {(0, 0, 1): 0.5, (1, 0, 1): 1.0})
    a = report["annotators"]["a"]
    assert (a["agreement"], a["accuracy"], a["gold_confusion"]) == (None, None, [None, None])
    assert "decides none" in a["notes"]["agreement"]
    assert "no gold" in a["notes"]["accuracy"]
    (pair,) = report["pairwise_agreement"]
    assert pair["agreement"] is None
    assert pair["notes"] == {"agreement": "undefined (no pair in common)"}


def test_one_sided_and_tied_gold_are_named() -> None:
    one_sided = annotator_report([vote(0, "a", "left")], {(0, 0, 1): 1.0}, [[1.0, 0.0]])["annotators"]["a"]
    assert one_sided["gold_confusion"] == [[1.0, 0.0], None]
    assert one_sided["notes"]["gold_confusion"].startswith("right row undefined")
    tied = annotator_report([vote(0, "a", "left")], {(0, 0, 1): 1.0}, [[1.0, 1.0]])["annotators"]["a"]
    assert "gold ties" in tied["notes"]["accuracy"]


def test_agreement_with_gold_counts_undecided_half_and_leaves_ties_out() -> None:
    posteriors = {(0, 0, 1): 0.9, (1, 0, 1): 0.9, (2, 0, 1): 0.5, (3, 0, 1): 0.1}
    gold = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [2.0, 2.0]]
    assert agreement_with_gold(posteriors, gold) == pytest.approx((1 + 0 + 0.5) / 3)
    assert agreement_with_gold({(3, 0, 1): 0.1}, gold) is None
