import math
from itertools import combinations, permutations

import pytest
import torch
import torch.nn.functional as F

from reward_model.losses import all_pairs, bradley_terry, centering, plackett_luce, pointwise

CHOSEN_B = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
REJECTED_B = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)


def random_scores(rows: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss_of, x: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss_of(leaf), leaf)[0]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def full_mask(scores_BK: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scores_BK, dtype=torch.bool)


# Bradley-Terry


def test_bradley_terry_by_hand():
    expected = -(log_sigmoid(1) + log_sigmoid(-1) + math.log(0.5)) / 3
    assert bradley_terry(CHOSEN_B, REJECTED_B).item() == pytest.approx(expected)


def test_bradley_terry_gradient_by_hand():
    """d loss / d chosen = -(1 - sigmoid(d)) / B, and the opposite for rejected."""
    expected_B = -(1 - torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64).sigmoid()) / 3
    torch.testing.assert_close(gradient(lambda c: bradley_terry(c, REJECTED_B), CHOSEN_B), expected_B)
    torch.testing.assert_close(gradient(lambda r: bradley_terry(CHOSEN_B, r), REJECTED_B), -expected_B)


def test_margin_shifts_the_difference():
    margin_B = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    expected = -(log_sigmoid(0.5) + log_sigmoid(-2) + log_sigmoid(-2)) / 3
    assert bradley_terry(CHOSEN_B, REJECTED_B, margin_B=margin_B).item() == pytest.approx(expected)


def test_soft_targets_are_the_cross_entropy_of_the_preference():
    target_B = torch.tensor([0.9, 0.5, 0.0])
    expected = F.binary_cross_entropy_with_logits(CHOSEN_B - REJECTED_B, target_B.double())
    torch.testing.assert_close(bradley_terry(CHOSEN_B, REJECTED_B, target_B=target_B), expected)


def test_calling_the_other_response_chosen_changes_nothing():
    margin_B, target_B = torch.tensor([0.5, 0.1, 2.0]), torch.tensor([0.9, 0.5, 0.2])
    one = bradley_terry(CHOSEN_B, REJECTED_B, margin_B=margin_B, target_B=target_B)
    other = bradley_terry(REJECTED_B, CHOSEN_B, margin_B=margin_B, target_B=1 - target_B)
    torch.testing.assert_close(one, other)


def test_weights_repeat_pairs():
    weighted = bradley_terry(CHOSEN_B, REJECTED_B, weight_B=torch.tensor([2, 0, 1]))
    repeated = bradley_terry(CHOSEN_B[[0, 0, 2]], REJECTED_B[[0, 0, 2]])
    torch.testing.assert_close(weighted, repeated)
    assert bradley_terry(CHOSEN_B, REJECTED_B, weight_B=torch.zeros(3)) == 0


def test_extreme_differences_stay_finite_and_bfloat16_is_computed_in_float32():
    loss = bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert loss.item() == pytest.approx(2e4)
    half = bradley_terry(CHOSEN_B.bfloat16(), REJECTED_B.bfloat16())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(bradley_terry(CHOSEN_B, REJECTED_B).item(), rel=1e-6)


def test_bradley_terry_without_pairs_is_zero_with_a_graph():
    assert gradient(lambda x: bradley_terry(x, x.detach()), torch.zeros(0)).shape == (0,)


def test_bradley_terry_refuses_wrong_arguments():
    with pytest.raises(ValueError, match=r"\[B\], got \{'chosen_B': \(3,\), 'rejected_B': \(2,\)\}"):
        bradley_terry(CHOSEN_B, REJECTED_B[:2])
    for name in ("margin_B", "target_B", "weight_B"):
        with pytest.raises(ValueError, match=rf"'{name}': \(1,\)"):
            bradley_terry(CHOSEN_B, REJECTED_B, **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'chosen_B': \(3, 1\)"):
        bradley_terry(CHOSEN_B[:, None], REJECTED_B[:, None])
    for bad in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="targets are probabilities"):
            bradley_terry(CHOSEN_B, REJECTED_B, target_B=torch.tensor([0.5, bad, 0.5]))


def test_bradley_terry_recovers_strengths_up_to_the_fisher_information():
    """10 items, all pairs, 500 simulated labelings: the estimate's error is chi-square with 9 degrees of freedom."""
    replicates, comparisons = 500, 100
    generator = torch.Generator().manual_seed(0)
    first, second = torch.tensor(list(combinations(range(10), 2))).T
    strengths = torch.linspace(-1, 1, 10, dtype=torch.float64)
    chance = (strengths[first] - strengths[second]).sigmoid()
    wins = torch.binomial(
        torch.full((replicates, 45), float(comparisons)), chance.float().expand(replicates, -1), generator=generator
    )
    target = (wins / comparisons).double().flatten()
    signs = (F.one_hot(first, 10) - F.one_hot(second, 10)).double()

    def information(theta):
        p = (theta[..., first] - theta[..., second]).sigmoid()
        return comparisons * torch.einsum("...p,pi,pj->...ij", p * (1 - p), signs, signs)

    def score(theta):  # the loss is a mean over all pairs of all replicates
        return gradient(
            lambda t: bradley_terry(t[:, first].flatten(), t[:, second].flatten(), target_B=target), theta
        ) * (target.numel() * comparisons)

    constant = torch.full((10, 10), 10.0, dtype=torch.float64)  # fixes the free constant: strengths sum to 0
    estimate = torch.zeros(replicates, 10, dtype=torch.float64)
    for _ in range(8):
        estimate = estimate - torch.linalg.solve(information(estimate) + constant, score(estimate))
    assert score(estimate).abs().max() < 1e-8
    error = estimate - strengths
    chi_square = torch.einsum("ri,ij,rj->r", error, information(strengths), error)
    assert chi_square.mean().item() == pytest.approx(9, abs=4 * math.sqrt(18 / replicates))
    deviation = torch.linalg.pinv(information(estimate), hermitian=True).diagonal(dim1=-2, dim2=-1).sqrt()
    coverage = (error.abs() < 1.96 * deviation).double().mean().item()
    assert 0.93 < coverage < 0.97


# All pairs


def all_pairs_loop(scores_BK, target_BKK, mask_BKK) -> float:
    prompts = []
    for b in range(len(scores_BK)):
        losses = []
        for i, j in combinations(range(scores_BK.shape[1]), 2):
            if mask_BKK[b, i, j]:
                difference, target = (scores_BK[b, i] - scores_BK[b, j]).item(), target_BKK[b, i, j].item()
                losses.append(-target * log_sigmoid(difference) - (1 - target) * log_sigmoid(-difference))
        if losses:
            prompts.append(sum(losses) / len(losses))
    return sum(prompts) / len(prompts)


def random_pairs(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    scores_BK = random_scores(4, 5, seed)
    target_BKK = torch.rand(4, 5, 5, generator=generator, dtype=torch.float64)
    target_BKK = target_BKK.triu(1) + (1 - target_BKK).triu(1).mT
    mask_BKK = torch.rand(4, 5, 5, generator=generator) < 0.6
    mask_BKK = mask_BKK.triu(1) | mask_BKK.triu(1).mT
    mask_BKK[2] = False
    return scores_BK, target_BKK, mask_BKK


@pytest.mark.parametrize("seed", range(5))
def test_all_pairs_equals_the_loop(seed):
    batch = random_pairs(seed)
    assert all_pairs(*batch).item() == pytest.approx(all_pairs_loop(*batch), rel=1e-12)


def test_all_pairs_of_two_is_bradley_terry():
    scores_BK = torch.stack([CHOSEN_B, REJECTED_B], dim=1)
    target_BKK = torch.tensor([[0.5, 1.0], [0.0, 0.5]]).expand(3, 2, 2)
    mask_BKK = torch.ones(3, 2, 2, dtype=torch.bool)
    torch.testing.assert_close(all_pairs(scores_BK, target_BKK, mask_BKK), bradley_terry(CHOSEN_B, REJECTED_B))


def test_each_prompt_weighs_the_same_however_many_pairs_it_has():
    scores_BK = torch.zeros(2, 3)
    scores_BK[1] = torch.tensor([3.0, 1.0, -1.0])
    target_BKK = torch.ones(2, 3, 3).triu(1)
    mask_BKK = torch.ones(2, 3, 3, dtype=torch.bool)
    mask_BKK[0, :, 2] = False
    of_second = -(2 * log_sigmoid(2) + log_sigmoid(4)) / 3
    assert all_pairs(scores_BK, target_BKK, mask_BKK).item() == pytest.approx((math.log(2) + of_second) / 2)


def test_all_pairs_does_not_depend_on_the_order_of_completions():
    scores_BK, target_BKK, mask_BKK = random_pairs()
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = (scores_BK[:, order], target_BKK[:, order][:, :, order], mask_BKK[:, order][:, :, order])
    torch.testing.assert_close(all_pairs(*shuffled), all_pairs(scores_BK, target_BKK, mask_BKK))


def test_all_pairs_ignores_whatever_stands_at_padding():
    scores_BK, target_BKK, mask_BKK = random_pairs()
    padded_BK = F.pad(scores_BK, (0, 2), value=math.nan)
    padded_target_BKK = F.pad(target_BKK, (0, 2, 0, 2), value=math.nan)
    padded_mask_BKK = F.pad(mask_BKK, (0, 2, 0, 2))
    plain = gradient(lambda s: all_pairs(s, target_BKK, mask_BKK), scores_BK)
    padded = gradient(lambda s: all_pairs(s, padded_target_BKK, padded_mask_BKK), padded_BK)
    torch.testing.assert_close(padded, F.pad(plain, (0, 2)))


def test_all_pairs_without_pairs_is_zero_with_a_graph():
    scores_BK, target_BKK, mask_BKK = random_pairs()
    assert not gradient(lambda s: all_pairs(s, target_BKK, torch.zeros_like(mask_BKK)), scores_BK).any()


def test_all_pairs_refuses_wrong_arguments():
    scores_BK, target_BKK, mask_BKK = random_pairs()
    with pytest.raises(ValueError, match=r"scores_BK \(4, 4\), target_BKK \(4, 5, 5\)"):
        all_pairs(scores_BK[:, :4], target_BKK, mask_BKK)
    with pytest.raises(ValueError, match=r"'mask_BKK': \(4, 5, 4\)"):
        all_pairs(scores_BK, target_BKK, mask_BKK[..., :4])
    with pytest.raises(ValueError, match="boolean"):
        all_pairs(scores_BK, target_BKK, mask_BKK.long())
    with pytest.raises(ValueError, match="targets are probabilities"):
        all_pairs(scores_BK, target_BKK + 1, mask_BKK)


# Plackett-Luce


def test_plackett_luce_by_hand():
    """Draw without replacement with odds 1, 2, 4, in the order third, first, second."""
    scores_BK = torch.tensor([[1.0, 2.0, 4.0]]).log()
    loss = plackett_luce(scores_BK, torch.tensor([[2, 3, 1]]), full_mask(scores_BK))
    assert loss.item() == pytest.approx(-math.log(4 / 7 * 1 / 3))


def test_plackett_luce_of_two_is_bradley_terry():
    scores_BK = torch.stack([REJECTED_B, CHOSEN_B], dim=1)
    ranks_BK = torch.tensor([[2, 1]]).expand(3, 2)
    loss = plackett_luce(scores_BK, ranks_BK, full_mask(scores_BK))
    torch.testing.assert_close(loss, bradley_terry(CHOSEN_B, REJECTED_B))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_probabilities_of_all_permutations_sum_to_one(k):
    scores_BK = random_scores(1, k)
    losses = [
        plackett_luce(scores_BK, torch.tensor([ranks]), full_mask(scores_BK)) for ranks in permutations(range(1, k + 1))
    ]
    assert torch.stack(losses).neg().exp().sum().item() == pytest.approx(1, rel=1e-12)


def test_only_the_order_of_the_ranks_matters():
    scores_BK = random_scores(2, 4)
    one = plackett_luce(scores_BK, torch.tensor([[2, 1, 4, 3]] * 2), full_mask(scores_BK))
    other = plackett_luce(scores_BK, torch.tensor([[20.0, -1.0, 99.0, 30.5]] * 2), full_mask(scores_BK))
    torch.testing.assert_close(one, other)


def test_ties_by_hand_follow_efron():
    """Odds 1, 2 tied before 4: first draw from 7, the second from 7 less half of the tied 3."""
    scores_BK = torch.tensor([[1.0, 2.0, 4.0]]).log()
    loss = plackett_luce(scores_BK, torch.tensor([[1, 1, 2]]), full_mask(scores_BK))
    assert loss.item() == pytest.approx(-math.log(1 / 7 * 2 / 5.5 * 4 / 4))


def test_tied_items_of_equal_score_have_the_likelihood_of_any_order():
    scores_BK = torch.tensor([[0.7, 0.7, 0.7, -1.0]])
    tied = plackett_luce(scores_BK, torch.tensor([[1, 1, 1, 2]]), full_mask(scores_BK))
    ordered = plackett_luce(scores_BK, torch.tensor([[2, 1, 3, 4]]), full_mask(scores_BK))
    torch.testing.assert_close(tied, ordered)


def test_ties_do_not_depend_on_the_order_of_items_and_pull_scores_together():
    scores_BK, ranks_BK = random_scores(1, 4), torch.tensor([[2, 1, 2, 1]])
    mask_BK, order = full_mask(scores_BK), torch.tensor([2, 3, 1, 0])
    shuffled = plackett_luce(scores_BK[:, order], ranks_BK[:, order], mask_BK)
    torch.testing.assert_close(shuffled, plackett_luce(scores_BK, ranks_BK, mask_BK))
    all_tied_BK = torch.ones_like(ranks_BK)
    at_equal = gradient(lambda s: plackett_luce(s, all_tied_BK, mask_BK), torch.zeros_like(scores_BK))
    torch.testing.assert_close(at_equal, torch.zeros_like(scores_BK))
    at_random = gradient(lambda s: plackett_luce(s, all_tied_BK, mask_BK), scores_BK)
    assert at_random.flatten()[scores_BK.argmax()] > 0 > at_random.flatten()[scores_BK.argmin()]


def test_plackett_luce_ignores_whatever_stands_at_padding():
    scores_BK = random_scores(3, 4)
    ranks_BK = torch.tensor([[1, 2, 3, 4], [2, 1, 1, 3], [4, 3, 2, 1]])
    plain = gradient(lambda s: plackett_luce(s, ranks_BK, full_mask(s)), scores_BK)
    padded_BK = F.pad(scores_BK, (1, 2), value=math.nan)
    padded_mask_BK = F.pad(full_mask(scores_BK), (1, 2))
    padded = gradient(lambda s: plackett_luce(s, F.pad(ranks_BK, (1, 2)), padded_mask_BK), padded_BK)
    torch.testing.assert_close(padded, F.pad(plain, (1, 2)))


def test_prompts_with_fewer_than_two_items_are_left_out():
    scores_BK, ranks_BK = random_scores(3, 3), torch.tensor([[1, 2, 3]]).expand(3, 3)
    mask_BK = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    first = plackett_luce(scores_BK[:1], ranks_BK[:1], mask_BK[:1])
    torch.testing.assert_close(plackett_luce(scores_BK, ranks_BK, mask_BK), first)
    assert not gradient(lambda s: plackett_luce(s, ranks_BK[1:], mask_BK[1:]), scores_BK[1:]).any()


def test_plackett_luce_refuses_wrong_arguments():
    scores_BK = random_scores(2, 3)
    with pytest.raises(ValueError, match=r"'ranks_BK': \(2, 2\)"):
        plackett_luce(scores_BK, torch.ones(2, 2), full_mask(scores_BK))
    with pytest.raises(ValueError, match=r"'scores_BK': \(3,\)"):
        plackett_luce(scores_BK[0], torch.ones(3), full_mask(scores_BK[0]))
    with pytest.raises(ValueError, match="boolean"):
        plackett_luce(scores_BK, torch.ones(2, 3), torch.ones(2, 3))


# Pointwise and centering


def test_pointwise_by_hand():
    scores_B, ratings_B = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 4, 3])
    assert pointwise(scores_B, ratings_B).item() == pytest.approx(5 / 3)
    assert pointwise(scores_B, ratings_B, weight_B=torch.tensor([0.0, 3.0, 1.0])).item() == pytest.approx(13 / 4)
    with pytest.raises(ValueError, match=r"'ratings_B': \(2,\)"):
        pointwise(scores_B, ratings_B[:2])


def test_centering_of_pairs_by_hand():
    scores_BK = torch.tensor([[1.0, 2.0], [0.5, -0.5]], dtype=torch.float64)
    assert centering(scores_BK).item() == 4.5
    gradient_BK = gradient(centering, scores_BK)
    torch.testing.assert_close(gradient_BK, torch.tensor([[3.0, 3.0], [0.0, 0.0]], dtype=torch.float64))


def test_centering_of_more_than_two_is_the_mean_over_pairs_and_ignores_padding():
    scores_BK = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, math.nan]])
    mask_BK = torch.tensor([[True, True, True], [True, True, False]])
    assert centering(scores_BK, mask_BK).item() == pytest.approx(((9 + 16 + 25) / 3 + 4) / 2)
    assert gradient(lambda s: centering(s, mask_BK), scores_BK).isfinite().all()


def test_centering_refuses_wrong_arguments():
    with pytest.raises(ValueError, match=r"'scores_BK': \(3,\)"):
        centering(torch.zeros(3))
    with pytest.raises(ValueError, match=r"'mask_BK': \(2, 3\)"):
        centering(torch.zeros(2, 2), torch.ones(2, 3, dtype=torch.bool))


# Weights of prompts


@pytest.mark.parametrize("loss", ["all_pairs", "plackett_luce", "centering"])
def test_a_weight_of_three_is_three_copies_and_one_of_zero_is_none(loss: str):
    """The third prompt has one completion, and so no part in the mean whatever its weight."""
    scores_BK, ranks_BK = random_scores(3, 3), torch.tensor([[1, 2, 3], [2, 1, 3], [1, 2, 3]])
    mask_BK = torch.tensor([[True] * 3, [True] * 3, [True, False, False]])

    def of(rows: list[int], weight_B: torch.Tensor | None) -> float:
        s, m, r = scores_BK[rows], mask_BK[rows], ranks_BK[rows]
        wins = (r[:, :, None] < r[:, None, :]).double()
        pairs = m[:, :, None] & m[:, None, :]
        results = {
            "all_pairs": lambda: all_pairs(s, wins, pairs, weight_B=weight_B),
            "plackett_luce": lambda: plackett_luce(s, r, m, weight_B=weight_B),
            "centering": lambda: centering(s, m, weight_B=weight_B),
        }
        return results[loss]().item()

    assert of([0, 1, 2], torch.tensor([3.0, 1.0, 5.0])) == pytest.approx(of([0, 0, 0, 1], None))
    assert of([0, 1, 2], torch.tensor([0.0, 2.0, 1.0])) == pytest.approx(of([1], None))
