"""From scores and a per-token KL to advantages, on the one aligned token axis.

Time steps are the actions: tokens between two actions (a tool's answer, the next user turn) and padding do
not exist for a return or an advantage. Nothing here whitens; `masked.whiten` does, over the global batch.
Inputs are taken as constants: pass tensors that carry no graph.
"""

import math

import torch
from torch import Tensor

from rlhf.functional.masked import at_least_float32, check_mask, zero_outside


def clip_scores(scores_B: Tensor, limit: float) -> Tensor:
    """Scores clamped to [-limit, limit]. Changes the optimum wherever it acts: a guard, not a normalisation.

    Raises ValueError for a limit that is not positive.
    """
    if not limit > 0:
        raise ValueError(f"the score limit must be positive, not {limit}")
    return scores_B.clamp(-limit, limit)


def penalised_rewards(scores_B: Tensor, kl_BT: Tensor, action_mask_BT: Tensor, *, kl_coef: float) -> Tensor:
    """Per-token rewards of shape [B, T]: the KL penalty on every action, the score on the last one.

        r_t = -kl_coef * kl_t + [t is the row's last action] * score

    With k1 as `kl_BT` the optimum is pi_ref exp(score / kl_coef) / Z. The last action may be the EOS token,
    which the policy chose like any other. A row without actions gets zeros; so does everything outside of the
    mask.

    Raises ValueError if the shapes differ, the mask is not boolean, or kl_coef is negative or not finite.
    Source: Ziegler et al. 2019 (arXiv:1909.08593), equation 2; Ouyang et al. 2022 (arXiv:2203.02155),
    equation 2.
    """
    check_mask(action_mask_BT, kl_BT=kl_BT)
    if scores_B.shape != action_mask_BT.shape[:1]:
        shapes = f"scores_B {tuple(scores_B.shape)}, action_mask_BT {tuple(action_mask_BT.shape)}"
        raise ValueError(f"one score per row is needed, got {shapes}")
    if not (math.isfinite(kl_coef) and kl_coef >= 0):
        raise ValueError(f"kl_coef must be finite and not negative, not {kl_coef}")
    actions_left_BT = action_mask_BT.flip(-1).cumsum(-1).flip(-1)  # this one included
    is_last_BT = action_mask_BT & (actions_left_BT == 1)
    penalty_BT = -kl_coef * zero_outside(kl_BT, action_mask_BT)
    return penalty_BT + torch.where(is_last_BT, at_least_float32(scores_B).unsqueeze(-1), 0.0)


def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    action_mask_BT: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap_B: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimates of shape [B, T]; zeros outside of the mask; never whitened.

        delta_i = r_i + gamma V_{i+1} - V_i        A_i = delta_i + gamma lam A_{i+1}

    i counts the row's actions, V_i = V(tokens before action i). After the last action V and A are 0 (the
    episode terminated), or V is `bootstrap_B[b]` where a budget cut the row; give 0 there for terminated
    rows. Rewards and values outside of the mask are ignored. The critic's target is the advantage plus
    `values_BT`. Computed in float32 (float64 stays).

    Raises ValueError if shapes differ, the mask is not boolean, or gamma or lam is outside of [0, 1].
    Source: Schulman et al. 2015 (arXiv:1506.02438), equation 16.
    """
    check_mask(action_mask_BT, rewards_BT=rewards_BT, values_BT=values_BT)
    _check_discounts(gamma=gamma, lam=lam)
    rewards_BT, values_BT = at_least_float32(rewards_BT), at_least_float32(values_BT)
    advantages_BT = torch.zeros_like(rewards_BT + values_BT)
    next_advantage_B = advantages_BT.new_zeros(len(advantages_BT))
    next_value_B = next_advantage_B
    if bootstrap_B is not None:
        if bootstrap_B.shape != next_value_B.shape:
            shapes = f"bootstrap_B {tuple(bootstrap_B.shape)}, rewards_BT {tuple(rewards_BT.shape)}"
            raise ValueError(f"one bootstrap value per row is needed, got {shapes}")
        next_value_B = bootstrap_B.to(advantages_BT.dtype)
    for t in reversed(range(action_mask_BT.shape[1])):
        is_action_B = action_mask_BT[:, t]
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantages_BT[:, t] = torch.where(is_action_B, advantage_B, 0.0)
        next_advantage_B = torch.where(is_action_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(is_action_B, values_BT[:, t], next_value_B)
    return advantages_BT


def reward_to_go(rewards_BT: Tensor, action_mask_BT: Tensor, *, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each action on, shape [B, T]; zeros outside of the mask.

        R_i = r_i + gamma R_{i+1}

    i counts actions, as in `gae`, of which this is the case V = 0, lam = 1.

    Raises ValueError as `gae` does.
    """
    return gae(rewards_BT, torch.zeros_like(rewards_BT), action_mask_BT, gamma=gamma, lam=1.0)


def rloo(scores_BG: Tensor) -> Tensor:
    """REINFORCE leave-one-out: each score minus the mean of the others of its prompt, shape [B, G].

        A_g = s_g - mean_{h != g} s_h = (s_g - mean_h s_h) G / (G - 1)

    Equal scores give exactly 0, and so does a group of one: it has no baseline, hence nothing to learn from.

    Raises ValueError unless the scores are [B, G].
    Source: Kool et al. 2019; Ahmadian et al. 2024 (arXiv:2402.14740).
    """
    group = scores_BG.shape[-1]
    return _centered(scores_BG) * (group / max(group - 1, 1))


def grpo(scores_BG: Tensor, *, normalise_std: bool, eps: float = 1e-4) -> Tensor:
    """Group-relative advantages: scores minus their prompt's mean, optionally over its deviation: [B, G].

        A_g = (s_g - mean_h s_h) / (std_h s_h + eps)

    The deviation is the sample's (divided by G - 1). Dividing by it weighs prompts whose scores are nearly
    equal more than others; `normalise_std=False` is the variant without that bias (Dr. GRPO). Equal scores
    and groups of one give exactly 0.

    Raises ValueError unless the scores are [B, G].
    Source: Shao et al. 2024 (arXiv:2402.03300), section 4.1; Liu et al. 2025 (arXiv:2503.20783).
    """
    centered_BG = _centered(scores_BG)
    if not normalise_std:
        return centered_BG
    variance_B1 = centered_BG.square().sum(-1, keepdim=True) / max(scores_BG.shape[-1] - 1, 1)
    return centered_BG / (variance_B1.sqrt() + eps)


def broadcast_to_actions(advantages_B: Tensor, action_mask_BT: Tensor) -> Tensor:
    """Give every action of a row the row's advantage, shape [B, T]; zeros outside of the mask.

    Raises ValueError if there is not exactly one advantage per row or the mask is not boolean.
    """
    check_mask(action_mask_BT)
    if advantages_B.shape != action_mask_BT.shape[:1]:
        shapes = f"advantages_B {tuple(advantages_B.shape)}, action_mask_BT {tuple(action_mask_BT.shape)}"
        raise ValueError(f"one advantage per row is needed, got {shapes}")
    return torch.where(action_mask_BT, advantages_B.unsqueeze(-1), 0.0)


def _centered(scores_BG: Tensor) -> Tensor:
    """Scores minus the mean of their group."""
    if scores_BG.ndim != 2:
        raise ValueError(f"scores must be [B, G], got shape {tuple(scores_BG.shape)}")
    # The mean of equal numbers need not be that number in floating point; after this shift it is exactly 0.
    shifted_BG = at_least_float32(scores_BG)
    shifted_BG = shifted_BG - shifted_BG[:, :1]
    return shifted_BG - shifted_BG.mean(dim=-1, keepdim=True)


def _check_discounts(**discounts: float) -> None:
    for name, value in discounts.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], not {value}")
