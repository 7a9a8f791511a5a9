"""The arithmetic of the reward model's experiments (tests/benchmarks); none of them is run here."""

from __future__ import annotations

import json
import math
import statistics
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.mark.parametrize("n", [1, 3, 7])
def test_the_best_of_n_is_the_mean_over_all_subsets(load_benchmark: Any, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores, gold = torch.randn(2, 7, generator=generator)
    bests = [max(subset, key=lambda i: float(scores[i])) for subset in combinations(range(7), n)]
    by_hand = tuple(statistics.fmean(float(x[i]) for i in bests) for x in (scores, gold))
    assert load_benchmark("overoptimisation").expected_best(scores, gold, n) == pytest.approx(by_hand, abs=1e-6)


def test_the_best_of_thousands_is_computed_without_overflow(load_benchmark: Any) -> None:
    """Of uniform scores the best of n is n / (n + 1) on average."""
    scores = torch.arange(1, 8193) / 8193
    proxy, gold = load_benchmark("overoptimisation").expected_best(scores, -scores, 2048)
    assert proxy == pytest.approx(2048 / 2049, abs=1e-6)
    assert gold == pytest.approx(-2048 / 2049, abs=1e-6)


def test_ensembles_by_hand(load_benchmark: Any) -> None:
    scores_MB = torch.tensor([[1.0, 4.0], [3.0, 4.0]])
    found = {name: rule(scores_MB).tolist() for name, rule in load_benchmark("overoptimisation").RULES.items()}
    assert found == {
        "single": [1, 4],
        "mean": [2, 4],
        "min": [1, 4],
        "mean - std": [pytest.approx(2 - math.sqrt(2)), 4],
        "mean - 4 std": [pytest.approx(2 - 4 * math.sqrt(2)), 4],
        "mean - 10 std": [pytest.approx(2 - 10 * math.sqrt(2)), 4],
    }


@pytest.mark.parametrize(("kind", "peak"), [("bon", 1.5 / 0.6), ("rl", math.exp(1.5 / 0.3 - 1))])
def test_fits_recover_their_own_curve_and_its_peak(load_benchmark: Any, kind: str, peak: float) -> None:
    curves = load_benchmark("gao_curves")
    truth = curves.Fit(kind, 1.5, 0.3, 1.0)
    points = [(d, truth(d)) for d in (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)]
    found = curves.fit(kind, points)
    assert (found.alpha, found.beta, found.r2) == pytest.approx((1.5, 0.3, 1.0))
    assert found.peak == pytest.approx(peak)
    assert found(peak) > max(found(0.99 * peak), found(1.01 * peak))
    assert curves.Fit(kind, 1.5, -0.3, 1.0).peak is None, "it only rises"


def test_r2_is_zero_for_a_curve_that_says_no_more_than_the_mean(load_benchmark: Any) -> None:
    found = load_benchmark("gao_curves").fit("bon", [(1.0, 1.0), (1.0, -1.0), (2.0, 1.0), (2.0, -1.0)])
    assert (found.alpha, found.beta, found.r2) == pytest.approx((0, 0, 0), abs=1e-12)


def test_peak_and_gain_of_a_run_by_hand(load_benchmark: Any) -> None:
    curves = load_benchmark("gao_curves")
    points = curves.ppo_points([(0.0, 0, 0.5), (1.0, 1, 1.5), (4.0, 2, 2.5), (9.0, 3, 1.5)], start=0.5)
    assert points == [(0, 0), (1, 1), (2, 2), (3, 1)]
    assert curves.peak_of(points, span=1) == (2, 2, 1)
    assert curves.gain_at(points, 2.25, span=1) == pytest.approx(1.75)
    assert curves.gain_at(points, 3.5, span=1) is None


def test_the_mean_of_best_of_n_is_over_seeds_and_from_n_1_on(load_benchmark: Any) -> None:
    runs = [[(0.0, 0, 1.0), (4.0, 1, 2.0)], [(0.0, 0, 0.0), (4.0, 1, 3.0)]]
    assert load_benchmark("gao_curves").best_curve(runs) == [(0, 0), (2, 2)]


def test_the_picture_has_a_panel_per_size_and_a_line_per_rule(load_benchmark: Any) -> None:
    curves = load_benchmark("gao_curves")
    points = [(0.0, 0.0), (1.0, 1.0), (2.0, 0.5)]
    panel = {rule: (points, curves.fit("rl", points)) for rule in ("single", "min")}
    root = ElementTree.fromstring(curves.picture({"PPO": {"200": panel, "800": panel}}))
    tags = [element.tag.split("}")[1] for element in root.iter()]
    assert (tags.count("polyline"), tags.count("circle"), tags.count("svg")) == (4, 12, 3)
    assert "PPO, 800 pairs" in "".join(root.itertext())


def test_a_precise_annotator_rates_by_hand(load_benchmark: Any) -> None:
    module = load_benchmark("pointwise_against_pairwise")
    crowd = module.Crowd(module.Annotators(1, noise=0.0), seed=0)
    assert [crowd.rating(0, gold) for gold in (-9.0, -1.0, 0.0, 0.4, 9.0)] == [1, 2, 4, 5, 7]  # 4 + 1.5 gold
    assert crowd.prefers_first(0.1, 0.0)
    assert not crowd.prefers_first(0.0, 0.1)


def test_scales_change_ratings_and_leave_comparisons_alone(load_benchmark: Any) -> None:
    module = load_benchmark("pointwise_against_pairwise")

    def said(offset: float, slope: float) -> tuple[set[int], list[bool]]:
        crowd = module.Crowd(module.Annotators(30, noise=0.0, offset=offset, slope=slope), seed=0)
        return {crowd.rating(who, 0.5) for who in range(30)}, [crowd.prefers_first(g, 0.0) for g in (-1.0, 1.0)]

    assert said(0.0, 0.0) == ({5}, [False, True])
    ratings, comparisons = said(2.0, 0.8)
    assert len(ratings) >= 5
    assert comparisons == [False, True]


def test_standardised_ratings_have_no_scale_left(load_benchmark: Any) -> None:
    standardised = load_benchmark("pointwise_against_pairwise").standardised
    assert standardised([1, 3, 10, 20, 5], [0, 0, 1, 1, 2]) == [-1, 1, -1, 1, 0]


def test_disjoint_pairs_of_a_ranking_by_hand(load_benchmark: Any) -> None:
    ranking = {"prompt": "p", "responses": ["a", "b", "c", "d"], "ranks": [3, 1, 2, 4]}
    halves = load_benchmark("kway_against_pairs").taken_apart(ranking)
    assert [(h["responses"], h["ranks"]) for h in halves] == [(["a", "b"], [2, 1]), (["c", "d"], [1, 2])]


def test_the_interval_over_worlds_is_students(load_benchmark: Any) -> None:
    """Of 1, 2, 3: 2 -+ 4.303 / sqrt(3)."""
    assert load_benchmark("gold_world").over_seeds([1.0, 2.0, 3.0]) == pytest.approx(
        (2, 2 - 2.4841, 2 + 2.4841), abs=1e-3
    )


def test_an_annotator_chooses_as_often_as_bradley_terry_says(load_benchmark: Any) -> None:
    import random

    rng, choice = random.Random(0), load_benchmark("gold_world").choice
    shares = [statistics.fmean(choice(rng, 1.0, 0.0, noise=0.5, careless=c) for _ in range(20_000)) for c in (0.0, 0.5)]
    p = 1 / (1 + math.exp(-2))
    assert shares == pytest.approx([p, 0.5 * p + 0.25], abs=0.01)


def test_the_published_tables_are_those_of_the_result_files(load_benchmark: Any) -> None:
    readme = (FOLDER / "README.md").read_text()
    kway = json.loads((FOLDER / "results" / "kway_against_pairs.json").read_text())["setting"]
    for name, side in kway["sides"].items():
        accuracy, low, high = side["accuracy"]
        line = next(line for line in readme.splitlines() if line.startswith((f"| {name} |", f"| {name} (")))
        assert f"| {accuracy:.3f} ({low:.3f} to {high:.3f}) |" in line
        assert line.endswith(f"| {side['cpu_s']:.1f} s |")
    ratings = json.loads((FOLDER / "results" / "pointwise_against_pairwise.json").read_text())["setting"]
    assert load_benchmark("pointwise_against_pairwise").table(ratings["accuracy"]) in readme
    found = json.loads((FOLDER / "results" / "overoptimisation.json").read_text())["setting"]["runs"]
    assert load_benchmark("overoptimisation").tables(found) in readme
