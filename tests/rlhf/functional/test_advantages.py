import math

import pytest
import torch
import torch.nn.functional as F

from rlhf.functional.advantages import (
    broadcast_to_actions,
    clip_scores,
    gae,
    grpo,
    penalised_rewards,
    reward_to_go,
    rloo,
)

REWARDS_BT = torch.tensor([[0.0, 0.0, 1.0]])
VALUES_BT = torch.tensor([[0.5, 0.6, 0.7]])
ALL_BT = torch.ones(1, 3, dtype=torch.bool)
HAND_BT = torch.tensor([[0.2849575, 0.2865, 0.3]])
SCORES_BG = torch.tensor([[1.0, 2.0, 6.0], [0.5, -0.5, 0.0]], dtype=torch.float64)


def random_batch(seed: int, rows: int = 5, length: int = 12):
    """Rewards, values and a mask with holes; the first row has no action, the second acts everywhere."""
    generator = torch.Generator().manual_seed(seed)
    rewards_BT, values_BT = torch.randn(2, rows, length, generator=generator, dtype=torch.float64)
    mask_BT = torch.rand(rows, length, generator=generator) < 0.5
    mask_BT[0], mask_BT[1] = False, True
    return rewards_BT, values_BT, mask_BT


def double_sum_gae(rewards_BT, values_BT, mask_BT, gamma, lam, bootstrap_B=None):
    """A_i = sum_{j >= i} (gamma lam)^(j - i) delta_j with explicit loops over the list of actions."""
    result_BT = torch.zeros_like(rewards_BT)
    for b in range(len(mask_BT)):
        actions = mask_BT[b].nonzero().flatten().tolist()
        last = 0.0 if bootstrap_B is None else bootstrap_B[b].item()
        values = [*(values_BT[b, t].item() for t in actions), last]
        rewards = [rewards_BT[b, t].item() for t in actions]
        deltas = [rewards[i] + gamma * values[i + 1] - values[i] for i in range(len(actions))]
        for i, t in enumerate(actions):
            result_BT[b, t] = sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(actions)))
    return result_BT


def insert_column(x_BT, at: int, value):
    column = torch.full((len(x_BT), 1), value, dtype=x_BT.dtype)
    return torch.cat([x_BT[:, :at], column, x_BT[:, at:]], dim=1)


def test_gae_hand_fixture():
    torch.testing.assert_close(gae(REWARDS_BT, VALUES_BT, ALL_BT, gamma=0.9, lam=0.95), HAND_BT)


def test_gae_bootstraps_a_row_that_was_cut():
    """Last delta 1 + .9 * .8 - .7 = 1.02; the ones before follow by .9 * .95 = .855."""
    advantages_BT = gae(REWARDS_BT, VALUES_BT, ALL_BT, gamma=0.9, lam=0.95, bootstrap_B=torch.tensor([0.8]))
    second = 0.03 + 0.855 * 1.02
    torch.testing.assert_close(advantages_BT, torch.tensor([[0.04 + 0.855 * second, second, 1.02]]))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.95), (0.99, 1.0), (0.7, 0.0)])
@pytest.mark.parametrize("bootstrap", [False, True])
def test_gae_equals_the_double_sum(seed, gamma, lam, bootstrap):
    rewards_BT, values_BT, mask_BT = random_batch(seed)
    bootstrap_B = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0], dtype=torch.float64) if bootstrap else None
    advantages_BT = gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam, bootstrap_B=bootstrap_B)
    expected_BT = double_sum_gae(rewards_BT, values_BT, mask_BT, gamma, lam, bootstrap_B)
    torch.testing.assert_close(advantages_BT, expected_BT, rtol=1e-12, atol=1e-12)


def test_a_bootstrap_of_zero_is_a_terminated_row():
    rewards_BT, values_BT, mask_BT = random_batch(0)
    zeros_B = torch.zeros(5, dtype=torch.float64)
    terminated_BT = gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.9)
    assert torch.equal(gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.9, bootstrap_B=zeros_B), terminated_BT)


@pytest.mark.parametrize("seed", range(3))
def test_gae_with_lambda_one_is_reward_to_go_minus_value(seed):
    rewards_BT, values_BT, mask_BT = random_batch(seed)
    returns_BT = reward_to_go(rewards_BT, mask_BT, gamma=0.9)
    expected_BT = torch.where(mask_BT, returns_BT - values_BT, 0)
    torch.testing.assert_close(gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=1.0), expected_BT)


def test_gae_with_lambda_zero_is_the_td_error():
    rewards_BT, values_BT, _ = random_batch(0)
    all_BT = torch.ones_like(rewards_BT, dtype=torch.bool)
    next_values_BT = F.pad(values_BT[:, 1:], (0, 1))
    expected_BT = rewards_BT + 0.9 * next_values_BT - values_BT
    torch.testing.assert_close(gae(rewards_BT, values_BT, all_BT, gamma=0.9, lam=0.0), expected_BT)


@pytest.mark.parametrize("at", range(13))
@pytest.mark.parametrize("junk", [100.0, math.nan])
def test_inserting_an_observation_token_changes_no_advantage(at, junk):
    rewards_BT, values_BT, mask_BT = random_batch(at)
    bootstrap_B = torch.ones(5, dtype=torch.float64)
    settings = {"gamma": 0.9, "lam": 0.95, "bootstrap_B": bootstrap_B}
    before_BT = gae(rewards_BT, values_BT, mask_BT, **settings)
    longer = [insert_column(x, at, junk) for x in (rewards_BT, values_BT)]
    after_BT = gae(*longer, insert_column(mask_BT, at, False), **settings)
    assert torch.equal(after_BT, insert_column(before_BT, at, 0.0))


def test_gae_never_whitens():
    rewards_BT, values_BT, mask_BT = random_batch(1)
    once_BT = gae(rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.95)
    scaled_BT = gae(10 * rewards_BT, 10 * values_BT, mask_BT, gamma=0.9, lam=0.95)
    torch.testing.assert_close(scaled_BT, 10 * once_BT)


def test_gae_is_computed_in_float32():
    advantages_BT = gae(REWARDS_BT.bfloat16(), VALUES_BT.bfloat16(), ALL_BT, gamma=0.9, lam=0.95)
    exact_BT = gae(REWARDS_BT, VALUES_BT.bfloat16().float(), ALL_BT, gamma=0.9, lam=0.95)
    assert advantages_BT.dtype == torch.float32
    assert torch.equal(advantages_BT, exact_BT)


def test_gae_of_a_batch_without_tokens():
    empty_BT = torch.zeros(2, 0)
    assert gae(empty_BT, empty_BT, empty_BT.bool(), gamma=1.0, lam=1.0).shape == (2, 0)


@pytest.mark.parametrize(("gamma", "lam", "name"), [(1.1, 0.9, "gamma"), (0.9, -0.1, "lam"), (math.nan, 1, "gamma")])
def test_gae_refuses_discounts_outside_of_the_unit_interval(gamma, lam, name):
    with pytest.raises(ValueError, match=f"^{name} must lie in"):
        gae(REWARDS_BT, VALUES_BT, ALL_BT, gamma=gamma, lam=lam)


def test_gae_refuses_other_shapes():
    with pytest.raises(ValueError, match="values_BT has shape"):
        gae(REWARDS_BT, VALUES_BT[:, :2], ALL_BT, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"bootstrap_B \(2,\)"):
        gae(REWARDS_BT, VALUES_BT, ALL_BT, gamma=1.0, lam=1.0, bootstrap_B=torch.zeros(2))


def test_reward_to_go_by_hand_across_an_observation():
    rewards_BT = torch.tensor([[1.0, 50.0, 2.0, 4.0]])
    mask_BT = torch.tensor([[True, False, True, True]])
    assert reward_to_go(rewards_BT, mask_BT, gamma=0.5).tolist() == [[3.0, 0.0, 4.0, 4.0]]


def test_penalised_rewards_by_hand():
    """The score stands on the last action, EOS included, and not one slot after it; the KL counts there too."""
    kl_BT = torch.tensor([[9.0, 1.0, 2.0, 3.0], [1.0, 9.0, -2.0, math.nan], [9.0, 9.0, 9.0, 9.0]])
    mask_BT = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    rewards_BT = penalised_rewards(torch.tensor([10.0, 20.0, math.nan]), kl_BT, mask_BT, kl_coef=0.5)
    assert rewards_BT.tolist() == [[0, -0.5, -1.0, 8.5], [-0.5, 0, 21.0, 0], [0, 0, 0, 0]]


def test_penalised_rewards_do_not_depend_on_the_padding_side():
    kl_BT = torch.tensor([[0.1, 0.2, 0.3]])
    expected_BT = penalised_rewards(torch.tensor([1.0]), kl_BT, ALL_BT, kl_coef=0.2)
    for pad in [(2, 0), (0, 2), (1, 3)]:
        padded_BT = penalised_rewards(torch.tensor([1.0]), F.pad(kl_BT, pad, value=7), F.pad(ALL_BT, pad), kl_coef=0.2)
        assert torch.equal(padded_BT, F.pad(expected_BT, pad))


def test_the_sum_of_penalised_rewards_is_the_regularised_objective():
    _, kl_BT, mask_BT = random_batch(4)
    scores_B = torch.arange(5.0, dtype=torch.float64)
    total_B = penalised_rewards(scores_B, kl_BT, mask_BT, kl_coef=0.3).sum(-1)
    expected_B = torch.where(mask_BT.any(-1), scores_B, 0) - 0.3 * (kl_BT * mask_BT).sum(-1)
    torch.testing.assert_close(total_B, expected_B)


def test_penalised_rewards_refuse_wrong_arguments():
    with pytest.raises(ValueError, match=r"scores_B \(2,\)"):
        penalised_rewards(torch.zeros(2), REWARDS_BT, ALL_BT, kl_coef=0.1)
    with pytest.raises(ValueError, match="kl_BT has shape"):
        penalised_rewards(torch.zeros(1), REWARDS_BT[:, :2], ALL_BT, kl_coef=0.1)
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="kl_coef must be finite and not negative"):
            penalised_rewards(torch.zeros(1), REWARDS_BT, ALL_BT, kl_coef=bad)


def test_clip_scores():
    assert clip_scores(torch.tensor([-9.0, 0.5, 9.0]), 2.0).tolist() == [-2, 0.5, 2]
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="limit must be positive"):
            clip_scores(torch.zeros(1), bad)


def test_rloo_by_hand():
    torch.testing.assert_close(rloo(SCORES_BG)[0], torch.tensor([-3.0, -1.5, 4.5], dtype=torch.float64))


def test_grpo_by_hand():
    """Centred -2, -1, 3; sample variance 14 / 2."""
    centered_G = torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(grpo(SCORES_BG, normalise_std=False)[0], centered_G)
    torch.testing.assert_close(grpo(SCORES_BG, normalise_std=True)[0], centered_G / (math.sqrt(7) + 1e-4))
    torch.testing.assert_close(grpo(SCORES_BG, normalise_std=True, eps=1.0)[0], centered_G / (math.sqrt(7) + 1))


@pytest.mark.parametrize("group", [2, 3, 8])
def test_rloo_is_grpo_without_std_times_g_over_g_minus_one(group):
    scores_BG = torch.randn(4, group, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leave_one_out_BG = torch.stack(
        [scores_BG[:, g] - scores_BG[:, [h for h in range(group) if h != g]].mean(-1) for g in range(group)], dim=1
    )
    torch.testing.assert_close(rloo(scores_BG), leave_one_out_BG)
    torch.testing.assert_close(rloo(scores_BG), grpo(scores_BG, normalise_std=False) * group / (group - 1))


@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e6 / 7])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_equal_scores_and_groups_of_one_give_exactly_zero(value, group):
    scores_BG = torch.full((2, group), value)
    assert not rloo(scores_BG).any()
    assert not grpo(scores_BG, normalise_std=True).any()
    assert not grpo(scores_BG, normalise_std=False).any()


def test_group_advantages_ignore_a_constant_per_prompt():
    shifted_BG = SCORES_BG + torch.tensor([[100.0], [-7.0]], dtype=torch.float64)
    torch.testing.assert_close(rloo(shifted_BG), rloo(SCORES_BG))
    torch.testing.assert_close(grpo(shifted_BG, normalise_std=True), grpo(SCORES_BG, normalise_std=True))


def test_group_advantages_refuse_flat_scores():
    for function in (rloo, lambda s: grpo(s, normalise_std=True)):
        with pytest.raises(ValueError, match=r"must be \[B, G\], got shape \(3,\)"):
            function(torch.zeros(3))


def test_broadcast_to_actions():
    mask_BT = torch.tensor([[False, True, True], [True, False, False]])
    assert broadcast_to_actions(torch.tensor([2.0, -1.0]), mask_BT).tolist() == [[0, 2, 2], [-1, 0, 0]]
    with pytest.raises(ValueError, match=r"advantages_B \(3,\)"):
        broadcast_to_actions(torch.zeros(3), mask_BT)
