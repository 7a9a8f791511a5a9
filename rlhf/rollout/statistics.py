"""The metrics of one PPO step, named as in TRL's PPO: masked, and global over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.eval.diversity import distinct_n, duplicate_share
from rlhf.functional.kl import ESTIMATORS, sequence_kl
from rlhf.functional.losses import explained_variance_from_moments
from rlhf.functional.masked import moments
from rlhf.runtime import Runtime
from rlhf.types import Rollout, RolloutBatch


def step_metrics(
    batch: RolloutBatch, rollouts: Sequence[Rollout], sums: dict[str, float], runtime: Runtime, *, kl_coef: float
) -> dict[str, float]:
    """Everything that a step logs about rollouts and update.

    Args:
        batch: with logprobs, values, rewards, advantages and returns filled in.
        sums: global sums over every optimizer step of this rollout batch.
        kl_coef: the coefficient that this step's rewards were made with.
    """
    return {**rollout_metrics(batch, rollouts, runtime, kl_coef=kl_coef), **update_metrics(sums)}


def rollout_metrics(
    batch: RolloutBatch, rollouts: Sequence[Rollout], runtime: Runtime, *, kl_coef: float
) -> dict[str, float]:
    """Means over the sequences of all ranks; KL and entropy in nats, lengths in tokens.

    Rows without actions, which got no score, count in `objective/invalid_frac` alone.
    `objective/rlhf_reward` is score - coef * KL per sequence, the quantity that RLHF maximises. `objective/reward_std`
    is the standard deviation of an ensemble's members over the score of a response. `response/distinct_n`
    are shares of all n-grams of words, `response/duplicate_frac` the share of answers that repeat another one.
    """
    mask_BT = batch.action_mask_BT
    kls = {name: sequence_kl(f(batch.logprobs_BT, batch.ref_logprobs_BT), mask_BT) for name, f in ESTIMATORS.items()}
    valid_B = mask_BT.any(1)
    raw_B = torch.tensor([math.nan if r.score is None else r.score for r in rollouts], device=mask_BT.device)
    sampler_gap_BT = (batch.sampler_logprobs_BT - batch.logprobs_BT).abs() * mask_BT
    per_sequence = {
        "objective/kl": kls["k1"],
        "objective/kl_k3": kls["k3"],
        "objective/scores": raw_B,
        "objective/scores_penalised": batch.scores_B,
        "objective/rlhf_reward": batch.scores_B - kl_coef * kls["k1"],
        "objective/entropy": -(batch.logprobs_BT * mask_BT).sum(1),
        "response/length_mean": mask_BT.sum(1),
        "response/eos_frac": torch.tensor([r.stop.finished for r in rollouts], device=mask_BT.device),
    }
    if all(r.gold_score is not None for r in rollouts):
        per_sequence["objective/gold"] = torch.tensor([r.gold_score for r in rollouts], device=mask_BT.device)
    if all(r.score_std is not None for r in rollouts):
        per_sequence["objective/reward_std"] = torch.tensor([r.score_std for r in rollouts], device=mask_BT.device)
    per_token = {"policy/entropy_avg": (batch.entropy_BT * mask_BT).sum(), "val/sampler_gap": sampler_gap_BT.sum()}
    counts = [valid_B.sum().double(), mask_BT.sum().double(), mask_BT.new_tensor(len(rollouts), dtype=torch.float64)]
    columns = [torch.where(valid_B, column.double(), 0.0).sum() for column in per_sequence.values()]
    columns += [s.double() for s in per_token.values()]
    valid, actions, rows, *sums = runtime.sum(torch.stack([*counts, *columns])).tolist()
    sequences, tokens = max(1.0, valid), max(1.0, actions)
    means = [s / sequences for s in sums[: len(per_sequence)]] + [s / tokens for s in sums[len(per_sequence) :]]
    named = dict(zip([*per_sequence, *per_token], means, strict=True))
    named["objective/scores_std"] = _std(raw_B, valid_B, runtime)
    named["objective/invalid_frac"] = 1 - valid / max(1.0, rows)
    named["objective/kl_coef"] = kl_coef
    named["response/score_length_corr"] = _correlation(raw_B[valid_B], mask_BT.sum(1)[valid_B], runtime)
    named |= _diversity([r for r in rollouts if r.score is not None], runtime)
    named["val/explained_var"] = _explained_variance(batch, runtime)
    return named


def update_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means over the action tokens of every optimizer step of this rollout batch."""
    tokens = max(1.0, sums["tokens"])
    return {
        "policy/approxkl_avg": sums["approxkl"] / tokens,
        "policy/clipfrac_avg": sums["clipfrac"] / tokens,
        "loss/policy_avg": sums["policy_loss"] / tokens,
        "loss/value_avg": sums["value_loss"] / tokens,
        "val/ratio": sums["ratio"] / tokens,
        "val/clipfrac_avg": sums["value_clipfrac"] / tokens,
        "train/grad_norm": sums["grad_norm"] / max(1.0, sums["updates"] - sums["skipped"]),
        "train/updates": sums["updates"],
        "train/reused_forwards": sums["reused_forwards"],
        "train/skipped_updates": sums["skipped"],
    }


def _std(x_B: Tensor, valid_B: Tensor, runtime: Runtime) -> float:
    count, total, squares = runtime.sum(moments(x_B.float(), valid_B)).tolist()
    count = max(1.0, count)
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2))


def _correlation(x_B: Tensor, y_B: Tensor, runtime: Runtime) -> float:
    """Pearson's; 0 where one of the two is constant."""
    x_B, y_B = x_B.double(), y_B.double()
    sums = torch.stack([torch.ones_like(x_B), x_B, y_B, x_B * x_B, y_B * y_B, x_B * y_B]).sum(1)
    count, x, y, xx, yy, xy = runtime.sum(sums).tolist()
    spread = math.sqrt(max(0.0, count * xx - x * x) * max(0.0, count * yy - y * y))
    return (count * xy - x * y) / spread if spread > 1e-9 * count else 0.0


def _diversity(rollouts: Sequence[Rollout], runtime: Runtime) -> dict[str, float]:
    """Over the answers of all ranks together: shares of unique n-grams do not add up."""
    texts = runtime.gather_objects([r.response for r in rollouts])
    shares = {f"response/distinct_{n}": distinct_n(texts, n) for n in (1, 2)}
    return {**shares, "response/duplicate_frac": duplicate_share(texts)}


def _explained_variance(batch: RolloutBatch, runtime: Runtime) -> float:
    mask_BT = batch.action_mask_BT
    errors = runtime.sum(moments(batch.returns_BT - batch.values_BT, mask_BT))
    return float(explained_variance_from_moments(errors, runtime.sum(moments(batch.returns_BT, mask_BT))))
