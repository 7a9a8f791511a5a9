"""Estimators of KL(policy || reference) from the log-probabilities of sampled tokens, and the exact value.

Where an estimator stands decides what training converges to, and the value's quality says nothing about the
gradient's. With x sampled from the policy pi, and rho = pi_ref / pi:

    k1 in the reward      reaches pi_ref exp(r / beta) / Z, the KL-regularised (reverse-KL) optimum of RLHF.
    k1 as a loss          E[grad log pi] = 0: regularises nothing, adds noise. `losses.kl_loss` refuses it.
    k2 as a loss          E[(log pi - log pi_ref) grad log pi] = grad KL(pi || pi_ref): reverse-KL optimum.
    k3 as a loss          E[(1 - rho) grad log pi] = grad KL(pi_ref || pi): forward-KL optimum, another one.
    k2, k3 in the reward  stop where r - beta k is constant, which is not pi_ref exp(r / beta) / Z.

As per-token losses, k2 and k3 take every prefix as given: that an early token steers towards prefixes with a
larger KL is seen by k1 in the reward only.

Source: John Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.functional.masked import at_least_float32, check_mask, zero_outside


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log pi_ref, in nats, any shape. Unbiased, large variance, negative for single tokens.

    In the reward: reverse-KL optimum. As a loss: no regularisation at all (expected gradient 0).
    Source: Schulman 2020.
    """
    return at_least_float32(logprobs) - at_least_float32(ref_logprobs)


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log pi - log pi_ref)^2 / 2, in nats, any shape. Biased, small variance, never negative.

    As a loss: its expected gradient is that of KL(pi || pi_ref), reverse-KL optimum. Not for the reward.
    Source: Schulman 2020.
    """
    return 0.5 * k1(logprobs, ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """rho - 1 - log rho with rho = pi_ref / pi, in nats, any shape. Unbiased, small variance, never negative.

    A good metric. As a loss: its expected gradient is that of KL(pi_ref || pi), forward-KL optimum. Not for
    the reward.
    Source: Schulman 2020.
    """
    log_rho = k1(ref_logprobs, logprobs)
    return torch.expm1(log_rho) - log_rho  # expm1: rho - 1 loses all digits where the policies nearly agree


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def sequence_kl(kl_BT: Tensor, action_mask_BT: Tensor) -> Tensor:
    """Sum of per-token estimates over each row's actions: nats per sequence, shape [B].

    By the chain rule the sum, not the mean, estimates the KL between the distributions over whole responses.
    This is the number that an adaptive KL target speaks of.

    Raises ValueError if the shapes differ or the mask is not boolean.
    """
    check_mask(action_mask_BT, kl_BT=kl_BT)
    return zero_outside(kl_BT, action_mask_BT).sum(dim=-1)


def categorical_kl(logp_V: Tensor, logq_V: Tensor) -> Tensor:
    """Exact KL(p || q) = sum_v p_v (log p_v - log q_v) in nats, over the last axis; leading axes are kept.

    Both are normalised log-probabilities. A zero of p (-inf) adds nothing; a zero of q alone gives +inf.
    """
    logp_V, logq_V = at_least_float32(logp_V), at_least_float32(logq_V)
    log_ratio_V = (logp_V - logq_V).masked_fill(logp_V == -torch.inf, 0.0)
    return (logp_V.exp() * log_ratio_V).sum(dim=-1)
