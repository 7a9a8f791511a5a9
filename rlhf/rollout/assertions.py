"""What must hold while PPO runs, or it would train on wrong numbers."""

from __future__ import annotations

import torch

from rlhf.errors import InvariantError
from rlhf.functional.kl import k3
from rlhf.functional.masked import masked_sum
from rlhf.runtime import Runtime
from rlhf.types import RolloutBatch


def assert_first_ratio(worst: float, runtime: Runtime) -> None:
    """The first ratio of a step is 1: nothing has changed since the old logprobs were taken.

    Raises:
        InvariantError: it is not; training would follow a wrong gradient.
    """
    tolerance = 1e-6 if runtime.precision == "fp32" else 0.01
    if worst > tolerance:
        raise InvariantError(
            f"the first minibatch's ratio is off 1 by {worst:.2g} (allowed in {runtime.precision}: {tolerance:.0e})",
            fix="look for dropout, another temperature, or a non-deterministic kernel",
        )


def assert_common_start(batch: RolloutBatch, runtime: Runtime, *, same_reference: bool) -> None:
    """Before the first update sampler, policy and reference are one function.

    The KL is 0 by k3, whose terms cannot cancel (asked for with `same_reference` only), and the sampler's
    log-probabilities are the policy's.

    Raises:
        InvariantError: they are not; PPO would learn from another distribution, or be pulled towards a wrong model.
    """
    mask_BT = batch.action_mask_BT
    gap_BT = (batch.sampler_logprobs_BT - batch.logprobs_BT).abs()
    sums = [
        mask_BT.sum(),
        masked_sum(k3(batch.logprobs_BT, batch.ref_logprobs_BT), mask_BT),
        masked_sum(gap_BT, mask_BT),
    ]
    tokens, kl, gap = runtime.sum(torch.stack([s.double() for s in sums])).tolist()
    kl, gap = kl / max(1.0, tokens), gap / max(1.0, tokens)
    is_fp32 = runtime.precision == "fp32"
    if same_reference and kl > (1e-6 if is_fp32 else 5e-3):
        raise InvariantError(
            f"KL(policy, reference) is {kl:.2g} nats per token before the first update; it must be 0",
            fix="check that `reference` is the model that `model` was saved from, in the same precision",
        )
    if gap > (1e-4 if is_fp32 else 0.1):
        raise InvariantError(
            f"the sampler's log-probabilities are off the policy's by {gap:.2g} nats per token before the first update",
            fix="the sampler runs on other weights, positions or another temperature than the policy",
        )
