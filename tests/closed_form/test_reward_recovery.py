"""Reward losses against the Fisher information: their minimum is the maximum-likelihood estimate, no more and no less.

Ten items of known strength are compared; a table of ten scores (an embedding) is fitted by the project's own losses,
many data sets at once, by Newton's method on their gradients. Classical theory then says exactly how wrong the fit is:

    (fit - truth)' I (fit - truth)   is chi-square with 9 degrees of freedom (a constant is free)
    fit_i -+ 1.96 se_i               covers the truth in 95% of the data sets

with I the Fisher information and se_i from its pseudo-inverse. A loss that is biased, or wasteful of what it is told,
misses the 9.

D data sets, I items, N comparisons of a data set, K items per ranking.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reward_model.data import RankedTokens
from reward_model.losses import bradley_terry, plackett_luce
from reward_model.train import ranking_loss

ITEMS = 10
TRUTH_I = torch.linspace(-1.35, 1.35, ITEMS, dtype=torch.float64)
PAIRS = torch.tensor(list(combinations(range(ITEMS), 2)))


@dataclass(frozen=True)
class Study:
    """`loss` of a table [D, I] is a mean over data sets; `information(scores_I)` is one data set's, [I, I]."""

    datasets: int
    loss: Callable[[Tensor], Tensor]
    information: Callable[[Tensor], Tensor]


def pair_information(scores_I: Tensor, counts_P: Tensor) -> Tensor:
    """sum over pairs of count p (1 - p) (e_i - e_j)(e_i - e_j)'."""
    p_P = torch.sigmoid(scores_I[PAIRS[:, 0]] - scores_I[PAIRS[:, 1]])
    direction_PI = torch.zeros(len(PAIRS), ITEMS, dtype=torch.float64)
    direction_PI.scatter_(1, PAIRS[:, :1], 1.0).scatter_(1, PAIRS[:, 1:], -1.0)
    return direction_PI.T @ ((counts_P * p_P * (1 - p_P))[:, None] * direction_PI)


def win_probability() -> Tensor:
    return torch.sigmoid(TRUTH_I[PAIRS[:, 0]] - TRUTH_I[PAIRS[:, 1]])


def hard_pairs(datasets: int = 400, repeats: int = 20) -> Study:
    """Every pair is compared 20 times, each comparison a row: the winner is `chosen`."""
    generator = torch.Generator().manual_seed(1)
    rows_N2 = PAIRS.repeat(repeats, 1)
    first_wins_DN = torch.rand(datasets, len(rows_N2), generator=generator) < win_probability().repeat(repeats)
    chosen_DN = torch.where(first_wins_DN, rows_N2[:, 0], rows_N2[:, 1])
    rejected_DN = torch.where(first_wins_DN, rows_N2[:, 1], rows_N2[:, 0])

    def loss(table_DI: Tensor) -> Tensor:
        return bradley_terry(table_DI.gather(1, chosen_DN).flatten(), table_DI.gather(1, rejected_DN).flatten())

    return Study(datasets, loss, lambda s: pair_information(s, torch.full((len(PAIRS),), repeats)))


def soft_labels(datasets: int = 500) -> Study:
    """Pair p has 10 + p votes; its row says which share chose the first, weighted by the votes."""
    torch.manual_seed(2)
    votes_P = 10.0 + torch.arange(len(PAIRS), dtype=torch.float64)
    shares_DP = torch.binomial(votes_P.expand(datasets, -1), win_probability().expand(datasets, -1)) / votes_P

    def loss(table_DI: Tensor) -> Tensor:
        first, second = table_DI[:, PAIRS[:, 0]].flatten(), table_DI[:, PAIRS[:, 1]].flatten()
        return bradley_terry(first, second, target_B=shares_DP.flatten(), weight_B=votes_P.repeat(datasets))

    return Study(datasets, loss, lambda s: pair_information(s, votes_P))


def ties(datasets: int = 400, rounds: int = 10) -> Study:
    """Two annotators judge every pair in each of ten rounds; where they differ, the pair is a tie.

    By way of the trainer's own `ranking_loss`: a round is a prompt with ten responses and their table of wins.
    """
    torch.manual_seed(3)
    two = torch.full((datasets * rounds, len(PAIRS)), 2.0, dtype=torch.float64)
    shares_RP = torch.binomial(two, win_probability().expand_as(two)) / 2
    assert set(shares_RP.unique().tolist()) == {0.0, 0.5, 1.0}
    wins_RII = torch.full((datasets * rounds, ITEMS, ITEMS), 0.5, dtype=torch.float64)
    wins_RII[:, PAIRS[:, 0], PAIRS[:, 1]] = shares_RP
    wins_RII[:, PAIRS[:, 1], PAIRS[:, 0]] = 1 - shares_RP
    rows, ranks = [[0]] * ITEMS, list(range(1, ITEMS + 1))
    items = [RankedTokens(rows, ranks, wins, "", [1] * ITEMS) for wins in wins_RII.tolist()]
    cfg = SimpleNamespace(loss="all_pairs", centering=0.0)
    mask_RI = torch.ones(datasets * rounds, ITEMS, dtype=torch.bool)

    def loss(table_DI: Tensor) -> Tensor:
        return ranking_loss(table_DI.repeat_interleave(rounds, 0), mask_RI, items, cfg)  # type: ignore[arg-type]

    return Study(datasets, loss, lambda s: pair_information(s, torch.full((len(PAIRS),), 2 * rounds)))


def rankings(datasets: int = 300, k: int = 4) -> Study:
    """Every set of 4 items is ranked once: the best first, with probability exp s_i / sum over those that remain."""
    sets_NK = torch.tensor(list(combinations(range(ITEMS), k)))
    orders_OK = torch.tensor(list(permutations(range(k))))
    noise_DNK = (
        -torch.empty(datasets, len(sets_NK), k, dtype=torch.float64)
        .exponential_(generator=torch.Generator().manual_seed(4))
        .log()
    )  # Gumbel: sorting s + noise draws from Plackett-Luce
    ranks_BK = 1 + (TRUTH_I[sets_NK] + noise_DNK).argsort(-1, descending=True).argsort(-1).flatten(0, 1)
    mask_BK = torch.ones_like(ranks_BK, dtype=torch.bool)

    def loss(table_DI: Tensor) -> Tensor:
        return plackett_luce(table_DI[:, sets_NK].flatten(0, 1), ranks_BK, mask_BK)

    def information(scores_I: Tensor) -> Tensor:
        """The covariance of the score: sum over sets and orders of P(order) g g', g the gradient of log P(order)."""
        members_NOK = sets_NK[:, orders_OK]  # in order of the ranking
        strengths_NOK = scores_I[members_NOK].exp()
        remaining_NOK = strengths_NOK.flip(2).cumsum(2).flip(2)
        probability_NO1 = (strengths_NOK / remaining_NOK).prod(2, keepdim=True)
        # An item takes part in every stage up to its own.
        gradient_NOK = 1 - strengths_NOK * (1 / remaining_NOK).cumsum(2)
        g_NOI = torch.zeros(*members_NOK.shape[:2], ITEMS, dtype=torch.float64).scatter_(2, members_NOK, gradient_NOK)
        return torch.einsum("noi,noj->ij", g_NOI, probability_NO1 * g_NOI)

    return Study(datasets, loss, information)


def fit(study: Study, steps: int = 7) -> Tensor:
    """The minimum of the loss for every data set, centred: Newton's method, whose gradients are all the loss's own."""
    table_DI = torch.zeros(study.datasets, ITEMS, dtype=torch.float64)
    gradient_DI = torch.full_like(table_DI, torch.inf)
    for _ in range(steps):
        table_DI.requires_grad_()
        graph_DI = torch.autograd.grad(study.loss(table_DI), table_DI, create_graph=True)[0]
        rows = [torch.autograd.grad(g_D.sum(), table_DI, retain_graph=True)[0] for g_D in graph_DI.unbind(1)]
        hessian_DII, gradient_DI = torch.stack(rows, 1), graph_DI.detach()
        # The losses know differences only: their curvature along a common constant is 0, any other will do.
        table_DI = table_DI.detach() - torch.linalg.solve(hessian_DII + hessian_DII.abs().mean(), gradient_DI)
    assert float(gradient_DI.abs().max()) * study.datasets < 1e-8, "Newton's method has not converged"
    return table_DI - table_DI.mean(1, keepdim=True)


def many(make: Callable[..., Study], **more: int) -> Any:
    """The slow form: enough data sets to see a tenth of the tolerance."""
    return pytest.param(partial(make, **more), marks=pytest.mark.slow, id=f"{make.__name__}-many")


@pytest.mark.parametrize(
    "make",
    [
        hard_pairs,
        soft_labels,
        ties,
        rankings,
        many(hard_pairs, datasets=2500, repeats=40),
        many(soft_labels, datasets=10000),
        many(ties, datasets=2000, rounds=20),
        many(rankings, datasets=2000, k=5),
    ],
)
def test_the_fit_errs_as_much_as_the_fisher_information_says(
    make: Callable[[], Study], record_property: Callable[[str, object], None]
) -> None:
    study = make()
    fit_DI = fit(study)
    error_DI = fit_DI - TRUTH_I
    chi_square_D = (error_DI @ study.information(TRUTH_I) * error_DI).sum(1)
    # Intervals as a user would make them: from the fit alone.
    covariances_DII = torch.stack([torch.linalg.pinv(study.information(scores_I)) for scores_I in fit_DI])
    covered = error_DI.abs() < 1.96 * covariances_DII.diagonal(dim1=1, dim2=2).sqrt()
    figures = {
        "chi_square": float(chi_square_D.mean()),
        "coverage": float(covered.double().mean()),
        # Too steep by a tenth: the errors shrink by as much as the bias adds to them, and 9 alone would not see it.
        "slope": float((fit_DI @ TRUTH_I).mean() / TRUTH_I.square().sum()),
    }
    record_property("recovery", figures)
    assert figures["chi_square"] == pytest.approx(9.0, abs=0.6)
    assert 0.93 <= figures["coverage"] <= 0.97
    assert figures["slope"] == pytest.approx(1.0, abs=0.03)
