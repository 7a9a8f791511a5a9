"""Coefficients against the libraries and against formulas written out here; planted annotators; undefined figures."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest

from reward_model.labeling import coefficients as c
from reward_model.labeling.aggregation import aggregate, fit_dawid_skene, votes_of
from reward_model.labeling.crowd import PRECISION, crowd_models, noisy_bradley_terry
from reward_model.labeling.records import Answer, Candidate, Item, Judgment
from reward_model.labeling.reliability import agreement_report, looks, one_each

PAIR = Item("q", [Candidate("one two"), Candidate("three four")])


def judgment(item: Item, annotator: str, answer: Answer, *, order: list[int] | None = None, **more: Any) -> Judgment:
    order = order or list(range(len(item.responses)))
    more = {"labeler": "person", **more}
    return Judgment(0, item.key, item.kind, annotator, order=order, answer=answer, **more)


def compare(item: Item, annotator: str, value: int, *, swapped: bool = False, ms: int = 0, **more: Any) -> Judgment:
    """`value` is canonical: positive in favour of response 1, wherever it was shown."""
    answer = Answer("compare", -value if swapped else value, ms_active=ms)
    return judgment(item, annotator, answer, order=[1, 0] if swapped else [0, 1], **more)


def pairs(n: int) -> list[Item]:
    return [Item(f"question {i}", [Candidate("yes"), Candidate("no")], prompt_id=str(i)) for i in range(n)]


def random_table(seed: int, categories: int) -> np.ndarray:
    """Ratings [annotators, items] with gaps (NaN); some items have one rating or none."""
    rng = np.random.default_rng(seed)
    truth_I = rng.integers(0, categories, 40)
    ratings_MI = np.where(rng.random((5, 40)) < 0.6, truth_I, rng.integers(0, categories, (5, 40))).astype(float)
    ratings_MI[rng.random((5, 40)) < 0.45] = np.nan
    return ratings_MI


def counts_of(ratings_MI: np.ndarray, categories: int) -> np.ndarray:
    return np.stack([(ratings_MI == category).sum(0) for category in range(categories)], axis=1)


def alpha_by_pairs(ratings_MI: np.ndarray, categories: int, *, ordinal: bool) -> float:
    """1 - D_o / D_e from lists of values: every pair of values of one item, and every pair of all values."""
    units = [column[~np.isnan(column)].astype(int).tolist() for column in ratings_MI.T]
    units = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units for value in unit]
    n = [values.count(category) for category in range(categories)]

    def distance(a: int, b: int) -> float:
        low, high = min(a, b), max(a, b)
        if ordinal:
            return (sum(n[low : high + 1]) - (n[low] + n[high]) / 2) ** 2
        return float(a != b)

    observed = sum(sum(distance(a, b) for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    expected = sum(distance(a, b) for a, b in permutations(values, 2)) / (len(values) - 1)
    return 1 - observed / expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("level", "categories"), [("nominal", 3), ("ordinal", 7)])
def test_alpha_is_the_librarys_and_the_formulas(seed: int, level: Any, categories: int) -> None:
    import krippendorff

    ratings_MI = random_table(seed, categories)
    figure = c.alpha(counts_of(ratings_MI, categories), level)
    library = krippendorff.alpha(ratings_MI, level_of_measurement=level, value_domain=list(range(categories)))
    assert figure.value == pytest.approx(library, abs=1e-12)
    assert figure.value == pytest.approx(alpha_by_pairs(ratings_MI, categories, ordinal=level == "ordinal"), abs=1e-12)
    assert figure.n == ((~np.isnan(ratings_MI)).sum(0) > 1).sum()


def test_a_strength_that_nobody_used_does_not_change_alpha() -> None:
    counts_IC = counts_of(random_table(5, 7), 7)
    counts_IC[:, 3] = 0
    without_IC = np.delete(counts_IC, 3, axis=1)
    assert c.alpha(counts_IC, "ordinal").value == pytest.approx(c.alpha(without_IC, "ordinal").value, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_raw_agreement_counts_equal_pairs_of_answers(seed: int) -> None:
    ratings_MI = random_table(seed, 3)
    equal = [a == b for column in ratings_MI.T for a, b in combinations(column[~np.isnan(column)], 2)]
    assert c.raw_agreement(counts_of(ratings_MI, 3)).value == pytest.approx(np.mean(equal), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_fleiss_kappa_is_the_librarys_and_the_formulas(seed: int) -> None:
    from statsmodels.stats.inter_rater import fleiss_kappa

    rng = np.random.default_rng(seed)
    even_IC = counts_of(rng.integers(0, 3, (4, 30)).astype(float), 3)
    odd_IC = counts_of(rng.integers(0, 3, (2, 7)).astype(float), 3)
    figure = c.fleiss_kappa(np.concatenate([odd_IC, even_IC]))
    observed = np.mean([(row * (row - 1)).sum() / 12 for row in even_IC])
    chance = ((even_IC.sum(0) / 120) ** 2).sum()
    assert figure.value == pytest.approx((observed - chance) / (1 - chance), abs=1e-12)
    assert figure.value == pytest.approx(fleiss_kappa(even_IC), abs=1e-12)
    assert figure.n == 30


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weights", ["none", "quadratic"])
@pytest.mark.filterwarnings("ignore")
def test_cohens_kappa_is_the_librarys(seed: int, weights: Any) -> None:
    """Also where an annotator always says the same; where both do, the library has NaN."""
    from sklearn.metrics import cohen_kappa_score

    rng = np.random.default_rng(seed)
    one = rng.integers(0, 7, 30) if seed else np.zeros(30, dtype=int)
    other = np.where(rng.random(30) < 0.5, one, rng.integers(0, 7, 30)) if seed < 3 else np.full(30, 4)
    confusion_CC = np.zeros((7, 7), dtype=int)
    np.add.at(confusion_CC, (one, other), 1)
    library = cohen_kappa_score(one, other, labels=range(7), weights=None if weights == "none" else weights)
    assert c.cohen_kappa(confusion_CC, weights).value == pytest.approx(library, abs=1e-12)
    alike = c.cohen_kappa(np.diag([0, 9, 0]), weights)
    assert (alike.value, alike.note, alike.n) == (None, c.ALL_AGREE, 9)
    assert math.isnan(cohen_kappa_score([1] * 9, [1] * 9, labels=range(3)))


@pytest.mark.filterwarnings("ignore")
def test_where_the_libraries_raise_or_divide_by_zero_the_figure_says_why() -> None:
    import krippendorff
    from statsmodels.stats.inter_rater import fleiss_kappa

    unanimous_IC = np.array([[3, 0, 0], [3, 0, 0]])
    assert math.isnan(krippendorff.alpha(value_counts=unanimous_IC, level_of_measurement="nominal"))
    assert math.isnan(fleiss_kappa(unanimous_IC))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in (
            c.alpha(unanimous_IC, "nominal"),
            c.alpha(unanimous_IC, "ordinal"),
            c.fleiss_kappa(unanimous_IC),
        ):
            assert (figure.value, figure.note) == (None, c.ALL_AGREE)
        assert c.raw_agreement(unanimous_IC).value == 1.0
        for of in (c.raw_agreement, c.fleiss_kappa, lambda table: c.alpha(table, "nominal")):
            assert of(np.array([[1, 0, 0], [0, 1, 0]])).note == c.NO_OVERLAP
            assert of(np.zeros((0, 3), dtype=int)).note == c.NOTHING
    assert c.alpha(np.array([[2, 0], [0, 2]]), "nominal").value == 1.0  # all agree, on different answers


# --- rankings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_kendalls_w_is_the_mean_rank_correlation(seed: int) -> None:
    """Without ties, mean Spearman rho = (M W - 1) / (M - 1) (Kendall 1962)."""
    from scipy.stats import spearmanr

    rng = np.random.default_rng(seed)
    ranks_MK = np.array([rng.permutation(5) + 1 for _ in range(4)])
    rhos: list[Any] = [spearmanr(a, b)[0] for a, b in combinations(ranks_MK, 2)]
    assert c.item_kendall_w(ranks_MK) == pytest.approx((3 * np.mean(rhos) + 1) / 4, abs=1e-12)


def test_rankings_with_ties() -> None:
    same_MK = np.array([[1, 1, 2, 3]] * 3)
    assert c.item_kendall_w(same_MK) == pytest.approx(1)
    assert c.item_tau(same_MK) == pytest.approx(1)
    # By hand: of three pairs one is in order in both, one reversed, one tied by the first. tau-b = 0 / sqrt(2 * 3).
    assert c.item_tau(np.array([[1, 2, 2], [2, 1, 3]])) == pytest.approx(0, abs=1e-12)
    assert math.isnan(c.item_tau(np.array([[1, 1, 1], [1, 2, 3]])))
    assert math.isnan(c.item_kendall_w(np.ones((2, 3), dtype=int)))
    assert c.mean_of_items(np.array([np.nan, 0.5, 1.0])) == c.Figure(0.75, n=2)
    assert c.mean_of_items(np.array([np.nan])).note == c.ALL_TIED


@pytest.mark.parametrize("seed", range(3))
def test_tau_counts_concordant_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranks_MK = np.array([rng.permutation(4) + 1 for _ in range(3)])
    signs = [
        np.sign(a[j] - a[i]) * np.sign(b[j] - b[i])
        for a, b in combinations(ranks_MK, 2)
        for i, j in combinations(range(4), 2)
    ]
    assert c.item_tau(ranks_MK) == pytest.approx(np.mean(signs), abs=1e-12)


@pytest.mark.parametrize(
    ("names", "note"), [([], c.NOTHING), (["aa"], c.ONE_ANNOTATOR), (["ab"], c.NO_OVERLAP), (["ab", "ab"], "")]
)
def test_rankings_in_the_report(names: list[str], note: str) -> None:
    """Each string names who judged item 0, 1, ...; the last case has both annotators at both items."""
    items = [Item(f"q{i}", [Candidate(text) for text in "abc"], kind="ranking") for i in range(2)]
    judged = [
        judgment(items[(i + turn) % 2], name, Answer("rank", ranks=[1, 2, 3]))
        for turn, who in enumerate(names)
        for i, name in enumerate(who)
    ]
    figure = agreement_report(items, judged, seed=0, resamples=5)["rankings"]["kendall_tau"]
    assert figure["note"] == note
    assert figure["value"] == (None if note else 1.0)


# --- intervals ------------------------------------------------------------------------------------------------


def test_bootstrap_intervals_are_seeded_and_as_wide_as_theory_says() -> None:
    """Of a share of 400 independent items, two standard errors are 0.049."""
    counts_IC = np.array([[2, 0]] * 200 + [[1, 1]] * 200)
    figure = c.bootstrap(lambda rows: c.raw_agreement(counts_IC[rows]), 400, resamples=500, seed=1)
    again = c.bootstrap(lambda rows: c.raw_agreement(counts_IC[rows]), 400, resamples=500, seed=1)
    assert figure == again
    assert figure.value == 0.5
    assert figure.low == pytest.approx(0.5 - 0.049, abs=0.008)
    assert figure.high == pytest.approx(0.5 + 0.049, abs=0.008)


def test_an_interval_needs_draws_in_which_the_figure_is_defined() -> None:
    values = iter([0.5, *([None] * 9), 0.4])
    figure = c.bootstrap(lambda _: c.Figure(next(values)), 5, resamples=10, seed=0)
    assert (figure.value, figure.low, figure.high) == (0.5, None, None)
    assert figure.note


def test_shares_have_wilsons_interval() -> None:
    from scipy.stats import binomtest

    figure, expected = c.share(7, 9, ""), binomtest(7, 9).proportion_ci(method="wilson")
    assert (figure.low, figure.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert c.share(0, 0, "no gold question").note == "undefined (no gold question)"


# --- aggregation and models of the crowd ----------------------------------------------------------------------


def planted(accuracies: dict[str, float], n: int, seed: int) -> tuple[list[Item], list[Judgment], dict[str, int]]:
    """Items, judgments in random orders, and the better response by item."""
    rng, items = random.Random(seed), pairs(n)
    truth = {item.key: rng.randrange(2) for item in items}
    judged = []
    for item in items:
        for name, accuracy in accuracies.items():
            said = truth[item.key] if rng.random() < accuracy else 1 - truth[item.key]
            judged.append(compare(item, name, rng.choice([1, 2, 3]) * (2 * said - 1), swapped=rng.random() < 0.5))
    return items, judged, truth


def test_every_model_finds_the_planted_careless_annotator() -> None:
    accuracies = {"ann": 0.92, "ben": 0.85, "careless": 0.5, "dora": 0.78}
    _, judged, _ = planted(accuracies, 400, seed=0)
    models = crowd_models(judged, seed=0)
    for figures in (
        models["dawid_skene"]["accuracy"],
        models["mace"]["competence"],
        models["noisy_bradley_terry"]["skill"],
    ):
        careless, *others = sorted(figures.values())
        assert figures["careless"] == careless < others[0] - 0.15
    for name, accuracy in accuracies.items():
        assert models["dawid_skene"]["accuracy"][name] == pytest.approx(accuracy, abs=0.06)
    ours = fit_dawid_skene(judged)
    assert ours
    own = {name: (rows[0][0] + rows[1][1]) / 2 for name, rows in ours.confusions.items()}
    for name in accuracies:
        assert own[name] == pytest.approx(models["dawid_skene"]["accuracy"][name], abs=0.05)


def test_our_dawid_skene_names_the_same_responses_as_crowd_kits() -> None:
    from crowdkit.aggregation import DawidSkene

    from reward_model.labeling.crowd import _table

    items, judged, _ = planted({"a": 0.9, "b": 0.85, "c": 0.8, "d": 0.5, "e": 0.75}, 300, seed=1)
    theirs_P = DawidSkene(n_iter=200).fit_predict_proba(_table(votes_of(judged)))["lower"]
    wins = aggregate({item.key: item for item in items}, judged, "dawid_skene")
    both = [(theirs_P[f"{n}/0/1"], wins[key][0][1]) for n, key in enumerate(wins)]
    sure = [(p > 0.5) == (ours > 0.5) for p, ours in both if abs(p - 0.5) > 0.45]
    assert len(sure) > 150
    assert all(
        sure
    )  # on close ones the two differ: theirs estimates how often a lower index wins, ours has a side bias
    assert np.mean([(p > 0.5) == (ours > 0.5) for p, ours in both]) > 0.9


def test_noisy_bradley_terry_is_at_the_top_of_crowd_kits_likelihood() -> None:
    """crowd-kit's likelihood with our prior: no step in any direction rises above the fit."""
    from crowdkit.aggregation import NoisyBradleyTerry

    _, judged, _ = planted({"a": 0.9, "b": 0.6, "c": 0.5}, 25, seed=2)
    votes = votes_of(judged)
    fit = noisy_bradley_terry(votes)
    responses, annotators = list(fit.scores), list(fit.skills)
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    x = [0.0, *fit.scores.values(), *map(logit, fit.lefts.values()), *map(logit, fit.skills.values())]
    rows = [
        [1 + responses.index((v.item, r)) for r in (v.left, v.right, v.left if v.choice == "left" else v.right)]
        for v in votes
    ]
    workers = np.array([annotators.index(v.annotator) for v in votes])
    precision = np.array([PRECISION] * len(responses) + [1.0] * len(annotators))

    def posterior(x: np.ndarray) -> float:
        cost = NoisyBradleyTerry._compute_log_likelihood(x, np.array(rows), workers, len(responses), len(annotators), 0)
        skills = x[1 + len(responses) + len(annotators) :]
        rest = x[1 : 1 + len(responses) + len(annotators)]
        return -cost - 0.5 * (precision * rest**2).sum() - 0.5 * ((skills - 1) ** 2).sum()

    best = np.array(x)
    for i in range(1, len(x)):
        for step in (-0.05, 0.05):
            moved = best.copy()
            moved[i] += step
            assert posterior(moved) < posterior(best)


def test_majority_counts_a_tie_as_half_and_dawid_skene_not_at_all() -> None:
    a, b = pairs(2)
    judged = [compare(a, "x", -2), compare(a, "y", 0, swapped=True), compare(a, "z", 3), compare(a, "w", -1)]
    judged += [compare(b, "x", 0), judgment(b, "y", Answer("both_bad"))]
    items = {item.key: item for item in (a, b)}
    assert aggregate(items, judged, "majority")[a.key] == [[0.5, 2.5 / 4], [1.5 / 4, 0.5]]
    assert aggregate(items, judged, "majority")[b.key] == [[0.5, 0.5], [0.5, 0.5]]
    assert aggregate(items, judged, "dawid_skene")[b.key] == [[0.5, 0.5], [0.5, 0.5]]
    assert aggregate(items, judged[4:], "dawid_skene") == {b.key: [[0.5, 0.5], [0.5, 0.5]]}


def test_rankings_become_votes_as_they_were_shown() -> None:
    item = Item("q", [Candidate(text) for text in "abc"], kind="ranking")
    answer = Answer("rank", ranks=[2, 1, 1])  # at the places: c second, a and b first
    votes = votes_of([judgment(item, "x", answer, order=[2, 0, 1])])
    assert [(v.left, v.right, v.choice) for v in votes] == [(2, 0, "right"), (2, 1, "right")]
    assert crowd_models([judgment(item, "x", answer)], seed=0) == {"note": "undefined (one annotator)"}
    assert crowd_models([], seed=0) == {"note": "undefined (no untied comparison)"}


# --- the report -----------------------------------------------------------------------------------------------


def test_one_annotators_record_by_hand() -> None:
    items = pairs(6)
    gold = Item("gold", [Candidate("right"), Candidate("wrong")], gold_ranks=[1, 2])
    judged = [
        compare(items[0], "a", 1, ms=4000),
        compare(items[1], "a", -1, ms=100, swapped=True),  # shown: the right one
        compare(items[2], "a", 0, ms=5000),
        judgment(items[3], "a", Answer("both_bad", ms_active=6000)),
        judgment(items[4], "a", Answer("skip", ms_active=1)),
        judgment(items[5], "a", Answer("flag")),
        compare(gold, "a", -2, ms=3000),
        compare(items[0], "a", 3, swapped=True, presentation=1, ms=2000),
        compare(items[1], "a", 1, presentation=1, ms=2000),
        compare(items[0], "b", 2),
        compare(items[2], "b", -1),
    ]
    report = agreement_report([*items, gold], judged, seed=0)
    a = report["annotators"]["a"]
    assert (a["judgments"], a["deciding"]) == (9, 7)
    assert (a["gold_accuracy"]["value"], a["gold_accuracy"]["n"]) == (1.0, 1)
    # Untied comparisons, as shown: right, right, left (gold), left (items[0] swapped), right (items[1] again).
    assert (a["left_rate"]["value"], a["left_rate"]["n"]) == (pytest.approx(2 / 5), 5)
    assert a["left_rate"]["p_value"] == pytest.approx(1.0)  # 2 or 3 of 5 are the likeliest outcomes
    assert (a["self_consistency"]["value"], a["self_consistency"]["n"]) == (0.5, 2)
    assert a["agreement_with_others"]["value"] == 0.5
    assert a["tie_share"]["value"] == a["both_bad_share"]["value"] == pytest.approx(1 / 9)
    assert a["skip_share"]["value"] == a["flag_share"]["value"] == pytest.approx(1 / 9)
    assert a["ms_median"] == 3000  # 100 2000 2000 3000 4000 5000 6000; the skip does not count
    assert a["too_fast_share"]["value"] == 0.0  # two words in 100 ms are 20 a second, as fast as can be
    slow_reader = compare(PAIR, "a", 1, ms=199)  # four words in less than 200 ms
    assert agreement_report([PAIR], [slow_reader], seed=0)["annotators"]["a"]["too_fast_share"]["value"] == 1.0
    assert report["pairs"]["raw"]["value"] == 0.5
    assert report["counts"] == {
        "items": 6, "gold_questions": 1, "items_judged": 4, "judgments": 11, "deciding": 9, "on_gold": 1,
        "repeats": 2, "ties": 1, "both_bad": 1, "skip": 1, "flag": 1, "annotators": 2,
    }  # fmt: skip


def test_gold_and_swapped_repeats_stay_out_of_the_coefficients() -> None:
    items = pairs(2)
    gold = Item("gold", [Candidate("right"), Candidate("wrong")], gold_ranks=[1, 2])
    judged = [compare(item, name, 2 * n - 1) for n, item in enumerate(items) for name in "ab"]
    judged += [compare(items[0], "a", 1, swapped=True, presentation=1)]  # the other answer this time
    judged += [compare(gold, "a", -1), compare(gold, "b", 1)]
    report = agreement_report([*items, gold], judged, seed=0)
    assert report["pairs"]["raw"]["value"] == report["pairs"]["alpha_nominal"]["value"] == 1.0
    assert report["annotators"]["a"]["agreement_with_others"]["value"] == 1.0


def test_gold_rankings_are_right_when_no_two_are_reversed() -> None:
    gold = Item("g", [Candidate(t) for t in "abc"], kind="ranking", gold_ranks=[1, 2, 2])
    for ranks, right in (([1, 2, 3], 1), ([1, 3, 2], 1), ([1, 1, 2], 0), ([2, 1, 3], 0)):
        report = agreement_report([gold], [judgment(gold, "a", Answer("rank", ranks=ranks))], seed=0)
        assert report["annotators"]["a"]["gold_accuracy"]["value"] == right


@pytest.mark.parametrize(
    ("judged", "note"),
    [
        (lambda items: [], c.NOTHING),
        (lambda items: [compare(item, "a", 1) for item in items], c.ONE_ANNOTATOR),
        (lambda items: [compare(items[0], "a", 1), compare(items[1], "b", 1)], c.NO_OVERLAP),
        (lambda items: [compare(item, name, 1) for item in items for name in "ab"], c.ALL_AGREE),
    ],
    ids=["nothing", "one annotator", "no overlap", "all agree"],
)
def test_undefined_figures_are_none_and_say_why(judged: Callable[[list[Item]], list[Judgment]], note: str) -> None:
    items = pairs(3)
    report = agreement_report(items, judged(items), seed=0, resamples=10, models=True)
    for name in ("alpha_nominal", "alpha_ordinal", "fleiss_kappa"):
        assert (report["pairs"][name]["value"], report["pairs"][name]["note"]) == (None, note)
    json.dumps(report, allow_nan=False)


def test_peoples_coefficients_are_not_mixed_with_a_judges() -> None:
    items = pairs(8)
    people = [compare(item, name, 1 if n % 2 else -1) for n, item in enumerate(items) for name in "ab"]
    judge = [compare(item, "model", 1, labeler="judge") for item in items]
    report = agreement_report(items, [*people, *judge], seed=0)
    assert report["coefficients_of"] == "people"
    assert report["pairs"]["alpha_nominal"]["value"] == 1.0
    assert report["labels"] == ["people", "a judge model"]
    kappas = {tuple(row["annotators"]): row["kappa"]["value"] for row in report["annotator_pairs"]}
    assert kappas == {("a", "b"): 1.0, ("a", "model"): 0.0, ("b", "model"): 0.0}
    assert agreement_report(items, judge, seed=0)["coefficients_of"] == "all"


@pytest.mark.parametrize("kind", ["pair", "ranking"])
def test_a_judge_that_follows_the_place_agrees_with_nobody(kind: str) -> None:
    """It names the first one in both orders: a tie. One order alone would agree with half of the people's answers."""
    K = 2 if kind == "pair" else 3
    items = [Item(f"q{n}", [Candidate(c) for c in "abc"[:K]], kind=kind) for n in range(12)]  # type: ignore[arg-type]
    best = [list(range(1, K + 1)), list(range(K, 0, -1))]
    people = [judgment(item, "a", Answer("rank", ranks=best[n % 2])) for n, item in enumerate(items)]
    places, left = list(range(K)), Answer("rank", ranks=best[0])
    first = [judgment(item, "first", left, order=places, labeler="judge") for item in items]
    first += [judgment(item, "first", left, order=places[::-1], labeler="judge", presentation=1) for item in items]
    report = agreement_report(items, [*people, *first], seed=0)
    assert report["annotators"]["first"]["agreement_with_others"]["value"] == 0.0
    assert report["annotators"]["a"]["agreement_with_others"]["n"] == 12
    assert report["annotators"]["first"]["dawid_skene_accuracy"]["n"] == 24
    assert report["annotators"]["first"]["dawid_skene_accuracy"]["value"] == pytest.approx(0.5, abs=0.05)
    if kind == "pair":
        assert report["annotator_pairs"][0]["raw"]["value"] == 0.0
    alone = agreement_report(items, first, seed=0)
    assert alone["counts"]["deciding"] == 24
    assert alone["annotators"]["first"]["agreement_with_others"]["note"] == "undefined (nobody else judged the same)"


def test_a_judges_two_orders_are_one_answer_of_the_mean_strength() -> None:
    """Sure in one order and nearly torn in the other: 0.9 and 0.45 make 0.725 for response 1, not a tie of two."""
    (item,) = pairs(1)

    def said(value: int, p_first: float, **more: Any) -> Judgment:
        answer = Answer("compare", value, notes=json.dumps({"p_first": p_first}))
        return judgment(item, "m", answer, labeler="judge", **more)

    sure = [said(3, 0.1), said(-2, 0.8, order=[1, 0], presentation=1)]
    (one,) = one_each(looks(sure))
    assert (one.value, one.order, one.ranks) == (2, [0, 1], [2, 1])  # (3 + 2) / 2, to the even number
    torn = [said(3, 0.1), said(1, 0.45, order=[1, 0], presentation=1)]
    assert [j.value for j in one_each(looks(torn))] == [0]
    person = [judgment(item, "p", j.answer, order=j.order, presentation=j.presentation) for j in sure]
    assert looks(person) == person[:1]


def test_order_of_items_and_names_of_annotators_do_not_matter() -> None:
    items, judged, _ = planted({"a": 0.9, "b": 0.7, "c": 0.6}, 60, seed=4)
    report = agreement_report(items, judged, seed=0)
    shuffled = random.Random(0).sample(judged, len(judged))
    again = agreement_report(items[::-1], shuffled, seed=0)
    for name, figure in report["pairs"].items():
        assert again["pairs"][name]["value"] == pytest.approx(figure["value"], abs=1e-12)
    assert again["annotators"]["b"]["left_rate"] == report["annotators"]["b"]["left_rate"]
