"""The losses of PPO: clipped policy objective, clipped value error, KL as a loss.

Denominator rule: every loss is a sum over actions divided by `denominator`, the mean number of actions per
micro-batch over ranks *and* accumulation steps. Averaging gradients over these, as data parallelism does,
then gives the exact mean over all actions of the optimizer step, however ragged and sharded they are.
Statistics are sums for the same reason: add them over micro-batches and ranks, then divide by the summed
"tokens".

Only the current policy's log-probabilities and the current values receive a gradient; all else is detached
here. Outside of the mask nothing counts.
"""

import math

import torch
from torch import Tensor

from rlhf.functional.kl import ESTIMATORS
from rlhf.functional.masked import check_mask, masked_sum, mean_and_var, moments, zero_outside

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far outside of any clip range, and still far from overflow in float32


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    action_mask_BT: Tensor,
    *,
    clip_range: float,
    denominator: float | Tensor,
    dual_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective as a 0-d loss to minimise, and sums of statistics.

        ratio = exp(log pi - log pi_old)
        loss  = sum over actions of max(-A ratio, -A clip(ratio, 1 -+ clip_range)) / denominator

    `dual_clip` = c > 1 also bounds the loss of actions with A < 0 by -A c, so that one action which became
    far more likely cannot dominate a step. The log-ratio is clamped at +-20.

    Statistics (detached 0-d sums over actions): "approxkl" of (log-ratio)^2 / 2, "clipfrac" of actions whose
    clipped term is the larger one, "ratio", and "tokens", the number of actions.

    Raises ValueError if the shapes differ, the mask is not boolean, clip_range or denominator is not
    positive, or dual_clip is not above 1.
    Source: Schulman et al. 2017 (arXiv:1707.06347), equation 7; dual clip: Ye et al. 2020 (arXiv:1912.09729).
    """
    check_mask(action_mask_BT, logprobs_BT=logprobs_BT, old_logprobs_BT=old_logprobs_BT)
    check_mask(action_mask_BT, advantages_BT=advantages_BT)
    _check_positive(clip_range=clip_range, denominator=denominator)
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, not {dual_clip}")
    log_ratio_BT = _log_ratio(logprobs_BT, old_logprobs_BT, action_mask_BT)
    ratio_BT = log_ratio_BT.exp()
    cost_BT = -zero_outside(advantages_BT.detach(), action_mask_BT)
    unclipped_BT = cost_BT * ratio_BT
    clipped_BT = cost_BT * ratio_BT.clamp(1 - clip_range, 1 + clip_range)
    loss_BT = torch.maximum(unclipped_BT, clipped_BT)
    if dual_clip is not None:
        loss_BT = torch.where(cost_BT > 0, torch.minimum(loss_BT, cost_BT * dual_clip), loss_BT)
    with torch.no_grad():
        stats = {
            "approxkl": masked_sum(0.5 * log_ratio_BT.square(), action_mask_BT),
            "clipfrac": masked_sum(clipped_BT > unclipped_BT, action_mask_BT),
            "ratio": masked_sum(ratio_BT, action_mask_BT),
            "tokens": masked_sum(action_mask_BT, action_mask_BT),
        }
    return masked_sum(loss_BT, action_mask_BT) / denominator, stats


def max_ratio_deviation(logprobs_BT: Tensor, old_logprobs_BT: Tensor, action_mask_BT: Tensor) -> Tensor:
    """Largest |pi / pi_old - 1| over the actions, a detached 0-d tensor; 0 for an empty mask.

    It must vanish on the first minibatch of the first epoch: dropout, a wrong temperature, a shifted axis or
    a truncated sampler all show here first. Ranks reduce it by maximum.

    Raises ValueError if the shapes differ or the mask is not boolean.
    """
    check_mask(action_mask_BT, logprobs_BT=logprobs_BT, old_logprobs_BT=old_logprobs_BT)
    log_ratio_BT = _log_ratio(logprobs_BT.detach(), old_logprobs_BT, action_mask_BT)
    deviation_BT = torch.expm1(log_ratio_BT).abs()
    return deviation_BT.amax() if deviation_BT.numel() else deviation_BT.sum()


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    action_mask_BT: Tensor,
    *,
    clip_range: float,
    denominator: float | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped squared error of the critic as a 0-d loss, and sums of statistics.

        V_clip = clip(V, V_old - clip_range, V_old + clip_range)
        loss   = sum over actions of max((V - R)^2, (V_clip - R)^2) / 2 / denominator

    `returns_BT` are the unwhitened advantages plus the old values. Infinity as clip_range turns clipping off.

    Statistics (detached 0-d sums over actions): "clipfrac" of actions whose clipped error is the larger one,
    "squared_error" of the unclipped (V - R)^2.

    Raises ValueError if the shapes differ, the mask is not boolean, or clip_range or denominator is not
    positive.
    Source: the reference implementation of Schulman et al. 2017; Huang et al. 2024 (arXiv:2403.17031).
    """
    check_mask(action_mask_BT, values_BT=values_BT, old_values_BT=old_values_BT, returns_BT=returns_BT)
    _check_positive(clip_range=clip_range, denominator=denominator)
    values_BT = zero_outside(values_BT, action_mask_BT)
    old_values_BT = zero_outside(old_values_BT.detach(), action_mask_BT)
    returns_BT = zero_outside(returns_BT.detach(), action_mask_BT)
    # Not V_old + clip(V - V_old): its rounding would make values within the range look clipped.
    clipped_values_BT = values_BT.clamp(old_values_BT - clip_range, old_values_BT + clip_range)
    unclipped_BT = (values_BT - returns_BT).square()
    clipped_BT = (clipped_values_BT - returns_BT).square()
    with torch.no_grad():
        stats = {
            "clipfrac": masked_sum(clipped_BT > unclipped_BT, action_mask_BT),
            "squared_error": masked_sum(unclipped_BT, action_mask_BT),
        }
    return 0.5 * masked_sum(torch.maximum(unclipped_BT, clipped_BT), action_mask_BT) / denominator, stats


def kl_loss(
    logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    action_mask_BT: Tensor,
    *,
    estimator: str,
    denominator: float | Tensor,
) -> Tensor:
    """A KL estimate as a 0-d loss: its sum over the actions divided by `denominator`.

    On the policy's own samples the expected gradient of "k2" is that of KL(policy || reference), the one RLHF
    is after; that of "k3" is that of KL(reference || policy), as in GRPO. See `rlhf.functional.kl`.

    Raises ValueError for "k1" (see the message), for an unknown estimator, if the shapes differ, the mask is
    not boolean, or the denominator is not positive.
    """
    if estimator == "k1":
        raise ValueError(
            "k1 as a loss does not regularise: its gradient is grad log pi, whose expectation under the "
            "policy is zero. Use 'k2' (reverse KL) or 'k3' (forward KL), or k1 in penalised_rewards"
        )
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown KL estimator {estimator!r}; choose 'k2' or 'k3'")
    check_mask(action_mask_BT, logprobs_BT=logprobs_BT, ref_logprobs_BT=ref_logprobs_BT)
    _check_positive(denominator=denominator)
    logprobs_BT = zero_outside(logprobs_BT, action_mask_BT)
    kl_BT = ESTIMATORS[estimator](logprobs_BT, zero_outside(ref_logprobs_BT.detach(), action_mask_BT))
    return masked_sum(kl_BT, action_mask_BT) / denominator


def explained_variance(values_BT: Tensor, returns_BT: Tensor, action_mask_BT: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the actions, a 0-d float64 tensor.

    1 is a perfect critic, 0 one that knows no more than a constant, below 0 worse than that. NaN if the
    returns do not vary: then there is nothing to explain. The number of one rank; over several, all-reduce
    the moments and call `explained_variance_from_moments`.

    Raises ValueError if the shapes differ or the mask is not boolean.
    """
    check_mask(action_mask_BT, values_BT=values_BT, returns_BT=returns_BT)
    errors_BT = returns_BT.detach().double() - values_BT.detach().double()
    return explained_variance_from_moments(
        moments(errors_BT, action_mask_BT), moments(returns_BT.detach(), action_mask_BT)
    )


def explained_variance_from_moments(error_moments_3: Tensor, return_moments_3: Tensor) -> Tensor:
    """`explained_variance` from the `moments` of returns - values and of returns, summed over ranks."""
    _, error_var = mean_and_var(error_moments_3)
    _, return_var = mean_and_var(return_moments_3)
    return torch.where(return_var > 0, 1 - error_var / return_var, torch.nan)


def _log_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, action_mask_BT: Tensor) -> Tensor:
    """log pi - log pi_old clamped at +-MAX_LOG_RATIO; 0 outside of the mask, where anything may stand."""
    logprobs_BT = zero_outside(logprobs_BT, action_mask_BT)
    log_ratio_BT = logprobs_BT - zero_outside(old_logprobs_BT.detach(), action_mask_BT)
    return log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _check_positive(**numbers: float | Tensor) -> None:
    for name, number in numbers.items():
        if math.isnan(number) or number <= 0:
            raise ValueError(f"{name} must be positive, not {float(number)}")
