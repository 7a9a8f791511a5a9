"""Classic PPO bugs, each injected into the real functions, one at a time.

A mutant is a change of the configuration, a replacement of functions, or both. `changes_optimum=False` marks mutants
that still lead to pi*, and says why. Most of these follow from one fact: token transitions are deterministic, so at
(pi*, V*) the TD error of every action is 0 (Peters et al. 2010; Nachum et al. 2017, arXiv:1702.08892), hence all
advantages vanish, whatever lambda is, and reweighting them by positive numbers moves nothing.

Not injectable, because nothing would change: "advantages not detached" (they carry no graph) and "log-ratio not masked"
(the masked sum drops what lies outside).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from token_mdp import EOS
from torch import Tensor

from rlhf.functional import kl, losses
from rlhf.functional.masked import masked_sum
from rlhf.models import roles
from rlhf.models.policy import Policy
from rlhf.models.value import Critic
from rlhf.stages import ppo

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutant:
    """`patches` are applied before a run with `ppo_config(**changes)`."""

    name: str
    patches: tuple[Patch, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    changes_optimum: bool = True
    why: str = ""


def replaced(name: str, mutate: Callable[[Any], Any], owner: Any = ppo) -> Patch:
    """`owner.name` becomes `mutate(owner.name)`."""
    return lambda patch: patch.setattr(owner, name, mutate(getattr(owner, name)))


# --- where the mask of actions begins and ends ------------------------------------------------------------------


def first_action(mask_BT: Tensor) -> Tensor:
    return mask_BT & (mask_BT.cumsum(1) == 1)


def last_action(mask_BT: Tensor) -> Tensor:
    return mask_BT & (actions_left(mask_BT) == 1)


def one_early(mask_BT: Tensor) -> Tensor:
    """The action before the last one; the only action of rows that have just one."""
    left_BT = actions_left(mask_BT)
    return mask_BT & (left_BT == left_BT.amax(1, keepdim=True).clamp(max=2))


def one_late(mask_BT: Tensor) -> Tensor:
    """The slot after the last action, where there is one."""
    return shifted(last_action(mask_BT), 1)


def actions_left(mask_BT: Tensor) -> Tensor:
    return mask_BT.flip(1).cumsum(1).flip(1)


def shifted(x_BT: Tensor, by: int) -> Tensor:
    """Moved `by` slots to the right (left if negative), zeros moved in."""
    moved_BT = x_BT.roll(by, 1)
    moved_BT[:, slice(None, by) if by > 0 else slice(by, None)] = 0
    return moved_BT


# --- mutations of `penalised_rewards` ---------------------------------------------------------------------------


def score_on(choose: Callable[[Tensor], Tensor]) -> Patch:
    """The score stands on the slots that `choose` picks."""

    def mutate(original: Any) -> Any:
        def mutated(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, *, kl_coef: float) -> Tensor:
            penalty_BT = original(torch.zeros_like(scores_B), kl_BT, mask_BT, kl_coef=kl_coef)
            return penalty_BT + choose(mask_BT) * scores_B[:, None]

        return mutated

    return replaced("penalised_rewards", mutate)


def scores_become(change: Callable[[Tensor, Tensor], Tensor]) -> Patch:
    """`change(scores_B, mask_BT)` instead of the scores."""

    def mutate(original: Any) -> Any:
        return lambda scores_B, kl_BT, mask_BT, **k: original(change(scores_B, mask_BT), kl_BT, mask_BT, **k)

    return replaced("penalised_rewards", mutate)


def kl_becomes(change: Callable[[Tensor, Tensor], Tensor]) -> Patch:
    """`change(kl_BT, mask_BT)` instead of the KL per token."""

    def mutate(original: Any) -> Any:
        return lambda scores_B, kl_BT, mask_BT, **k: original(scores_B, change(kl_BT, mask_BT), mask_BT, **k)

    return replaced("penalised_rewards", mutate)


def only_ended(scores_B: Tensor, mask_BT: Tensor) -> Tensor:
    """Scores of responses shorter than the budget."""
    return torch.where(mask_BT.sum(1) < mask_BT.sum(1).max(), scores_B, 0.0)


# --- mutations of the batch -------------------------------------------------------------------------------------


def reference_becomes(change: Callable[[Any], Tensor]) -> Patch:
    """`change(batch)` instead of the reference's log-probabilities, inside the reward only."""

    def mutate(original: Any) -> Any:
        def mutated(batch: Any, *args: Any, **kwargs: Any) -> None:
            kept, batch.ref_logprobs_BT = batch.ref_logprobs_BT, change(batch)
            original(batch, *args, **kwargs)
            batch.ref_logprobs_BT = kept

        return mutated

    return replaced("shape_rewards", mutate)


def after(name: str, change: Callable[[Any], None]) -> Patch:
    """`change(batch)` after a function of the stage that fills in or returns the batch."""

    def mutate(original: Any) -> Any:
        def mutated(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            change(args[0] if result is None else result)
            return result

        return mutated

    return replaced(name, mutate)


def set_field(name: str, change: Callable[[Any], Tensor]) -> Callable[[Any], None]:
    """`batch.name = change(batch)`."""
    return lambda batch: setattr(batch, name, change(batch))


def with_one_pad(batch: Any) -> Tensor:
    """Actions and the first padding slot of every row."""
    return batch.action_mask_BT | one_late(batch.action_mask_BT)


# --- mutations of the models, the sampler and the losses --------------------------------------------------------


class OtherSampler:
    """A language model whose logits are changed while sampling, and nowhere else."""

    def __init__(self, lm: Any, change: Callable[[Tensor], Tensor]) -> None:
        self.lm, self.change = lm, change
        self.config, self.device = lm.config, lm.device

    def __call__(self, **kwargs: Any) -> Any:
        output = self.lm(**kwargs)
        output.logits = self.change(output.logits)
        return output


def samples_from(change: Callable[[Tensor], Tensor]) -> Patch:
    """The sampler sees `change(logits)`."""

    def mutate(original: Any) -> Any:
        @contextmanager
        def mutated(self: Any) -> Any:
            with original(self) as lm:
                yield OtherSampler(lm, change)

        return mutated

    return replaced("ready", mutate, roles.Sampler)


def top_k(logits: Tensor, k: int = 2) -> Tensor:
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -1e9)


def top_p(logits: Tensor, p: float = 0.7) -> Tensor:
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    keep = probabilities.cumsum(-1) - probabilities < p
    return logits.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), -1e9)


def without_eos(logits: Tensor) -> Tensor:
    return logits.index_fill(-1, torch.tensor([EOS]), -1e9)


def forward_at(temperature: float, name: str, position: int) -> Patch:
    """Argument `position` of function `name`, a model, ignores the configured temperature."""

    def mutate(original: Any) -> Any:
        def mutated(*args: Any, **kwargs: Any) -> Any:
            model = args[position]
            untempered = lambda *a, **_: model(*a, temperature=temperature)  # noqa: E731
            return original(*args[:position], untempered, *args[position + 1 :], **kwargs)

        return mutated

    return replaced(name, mutate)


def policy_logprobs_become(change: Callable[[Tensor], Tensor]) -> Patch:
    """`change(logprobs_BT)` in every forward pass of policy and reference."""

    def mutate(original: Any) -> Any:
        def mutated(self: Any, *args: Any, **kwargs: Any) -> Any:
            logprobs_BT, entropy_BT = original(self, *args, **kwargs)
            return change(logprobs_BT), entropy_BT

        return mutated

    return replaced("forward", mutate, Policy)


def untempered_policy(original: Any) -> Any:
    return lambda self, *args, temperature: original(self, *args, temperature=1.0)


def larger_of(choose: Callable[[Tensor, Tensor], Tensor]) -> Patch:
    """`choose(unclipped, clipped)` instead of their maximum in the policy loss."""

    def mutate(original: Any) -> Any:
        def mutated(*args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "maximum", choose)
                return original(*args, **kwargs)

        return mutated

    return replaced("policy_loss", mutate)


def per_sequence_mean(original: Any) -> Any:
    """Every response weighs the same, whatever its length."""

    def mutated(logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, **k: Any) -> Any:
        lengths_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
        return original(logprobs_BT, old_BT, advantages_BT * lengths_B1.float().mean() / lengths_B1, mask_BT, **k)

    return mutated


def centred_per_row(original: Any) -> Any:
    """Advantages minus the mean of their own response."""

    def mutated(x_BT: Tensor, mask_BT: Tensor, moments_3: Tensor, *, center: bool) -> Tensor:
        means_B1 = (x_BT * mask_BT).sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
        return original((x_BT - means_B1) * mask_BT, mask_BT, moments_3, center=center)

    return mutated


def k1_loss(original: Any) -> Any:
    def mutated(logprobs_BT: Tensor, ref_BT: Tensor, mask_BT: Tensor, *, estimator: str, denominator: float) -> Tensor:
        return masked_sum(kl.k1(logprobs_BT, ref_BT), mask_BT) / denominator

    return mutated


# --- the table --------------------------------------------------------------------------------------------------

KL_IN_LOSS = {"kind": "fixed", "coef": 0.5, "place": "loss"}

MUTANTS = [
    # The KL penalty
    Mutant("KL sign", (replaced("k1", lambda k1: lambda p, q: k1(q, p)),)),
    Mutant("KL mean over the response", (kl_becomes(lambda x, mask: x / mask.sum(1, keepdim=True)),)),
    Mutant("KL absolute value", (kl_becomes(lambda x, mask: x.abs()),)),
    Mutant("KL clamped at 0", (kl_becomes(lambda x, mask: x.clamp(min=0)),)),
    Mutant("k2 in the reward", (replaced("k1", lambda k1: kl.k2),)),
    Mutant("k3 in the reward", (replaced("k1", lambda k1: kl.k3),)),
    Mutant("beta halved", (kl_becomes(lambda x, mask: x / 2),)),
    Mutant("beta doubled", (kl_becomes(lambda x, mask: x * 2),)),
    Mutant("KL dropped", (kl_becomes(lambda x, mask: x * 0),)),
    Mutant("KL of EOS dropped", (reference_becomes(lambda b: torch.where(b.tokens_BT == EOS, b.logprobs_BT, b.ref_logprobs_BT)),)),
    Mutant("KL of the last action dropped", (kl_becomes(lambda x, mask: x * ~last_action(mask)),)),
    Mutant("KL of the first action dropped", (kl_becomes(lambda x, mask: x * ~first_action(mask)),)),
    Mutant("KL one token late", (kl_becomes(lambda x, mask: shifted(x, 1)),)),
    Mutant("k1 as a loss", (replaced("kl_loss", k1_loss),), {"kl": {**KL_IN_LOSS, "estimator": "k2"}}),
    Mutant("k2 as a loss per token", (), {"kl": {**KL_IN_LOSS, "estimator": "k2"}}),
    Mutant("k3 as a loss", (), {"kl": {**KL_IN_LOSS, "estimator": "k3"}}),
    # The reference
    Mutant("reference is the old policy", (reference_becomes(lambda b: b.logprobs_BT),)),
    Mutant("reference shifted by one token", (reference_becomes(lambda b: shifted(b.ref_logprobs_BT, 1)),)),
    Mutant("reference of another row", (reference_becomes(lambda b: b.ref_logprobs_BT.roll(1, 0)),)),
    Mutant("reference at temperature 1", (forward_at(1.0, "evaluate_rollouts", 3),)),
    # The score
    Mutant("score one token early", (score_on(one_early),)),
    Mutant("score one slot late", (score_on(one_late),)),
    Mutant("score on the first action", (score_on(first_action),)),
    Mutant("score on every action", (score_on(lambda mask: mask),)),
    Mutant("score twice", (scores_become(lambda s, mask: 2 * s),)),
    Mutant("score divided by the length", (scores_become(lambda s, mask: s / mask.sum(1)),)),
    Mutant("score of another row", (scores_become(lambda s, mask: s.roll(1)),)),
    Mutant("score whitened per batch", (scores_become(lambda s, mask: (s - s.mean()) / s.std()),)),
    Mutant("score dropped without EOS", (scores_become(only_ended),)),
    Mutant("score clipped at 0.5", (replaced("clip_scores", lambda f: lambda s, limit: f(s, 0.5)),)),
    Mutant("score not clipped", (replaced("clip_scores", lambda f: lambda s, limit: s),)),
    Mutant("missing-EOS penalty on all", (replaced("missing_eos_penalty", lambda f: lambda s, r, c: [x - c.value for x in s]),)),
    Mutant("missing-EOS penalty never", (replaced("missing_eos_penalty", lambda f: lambda s, r, c: s),)),
    Mutant("rewards whitened without their mean", (replaced("whiten", lambda f: lambda *a, center: f(*a, center=True)),), {"whiten_rewards": True}),
    # The mask
    Mutant("EOS is no action", (after("make_batch", set_field("action_mask_BT", lambda b: b.action_mask_BT & (b.tokens_BT != EOS))),)),
    Mutant("first token is no action", (after("make_batch", set_field("action_mask_BT", lambda b: b.action_mask_BT & ~first_action(b.action_mask_BT))),)),
    Mutant("a padding token is an action", (after("make_batch", set_field("action_mask_BT", with_one_pad)),)),
    # Advantages and the critic
    Mutant("gamma 0.95", (), {"gamma": 0.95}),
    Mutant("gamma 0", (), {"gamma": 0.0}),
    Mutant("advantages one token late", (after("estimate_advantages", set_field("advantages_BT", lambda b: shifted(b.advantages_BT, 1) * b.action_mask_BT)),)),
    Mutant("advantages one token early", (after("estimate_advantages", set_field("advantages_BT", lambda b: shifted(b.advantages_BT, -1) * b.action_mask_BT)),)),
    Mutant("advantages negated", (after("estimate_advantages", set_field("advantages_BT", lambda b: -b.advantages_BT)),)),
    Mutant("advantages centred per response", (replaced("whiten", centred_per_row),)),
    Mutant("baseline sign", (replaced("gae", lambda gae: lambda r, v, m, **k: gae(r, -v, m, **k)),)),
    Mutant("critic sees the action", (replaced("forward", lambda f: lambda self, *a: self.scalar(*a), Critic),)),
    Mutant("critic never trained", (), {"value_coef": 0.0}),
    Mutant("value loss sign", (replaced("value_loss", lambda f: lambda *a, **k: (-f(*a, **k)[0], f(*a, **k)[1])),)),
    Mutant("cut answers bootstrapped", (), {"bootstrap_truncated": True}),
    # The policy loss
    Mutant("ratio inverted", (replaced("_log_ratio", lambda f: lambda *a: -f(*a), losses),)),
    Mutant("clipped term with the wrong sign", (larger_of(lambda a, b: torch.max(a, -b)),)),
    Mutant("entropy bonus", (), {"entropy_coef": 0.05, "whiten_advantages": False}),
    Mutant("old log-probabilities of another row", (after("evaluate_rollouts", set_field("logprobs_BT", lambda b: b.logprobs_BT.roll(1, 0))), after("evaluate_rollouts", set_field("ref_logprobs_BT", lambda b: b.ref_logprobs_BT.roll(1, 0))))),
    Mutant("update at temperature 1", (forward_at(1.0, "ppo_loss", 0),)),
    Mutant("training at temperature 1", (replaced("forward", untempered_policy, Policy),)),
    Mutant("dropout", (policy_logprobs_become(lambda x: torch.nn.functional.dropout(x, 0.1)),)),
    # The sampler
    Mutant("top-k 2", (samples_from(top_k),)),
    Mutant("top-p 0.7", (samples_from(top_p),)),
    Mutant("greedy sampling", (samples_from(lambda logits: 1e4 * logits),)),
    Mutant("EOS never sampled", (samples_from(without_eos),)),
    # Equal optimum
    Mutant("lambda 0", (), {"lam": 0.0}, False, "TD errors vanish at the optimum"),
    Mutant("lambda 1", (), {"lam": 1.0}, False, "unbiased whatever the critic says"),
    Mutant("advantages not whitened", (), {"whiten_advantages": False}, False, "a positive factor"),
    Mutant("returns from whitened advantages", (after("estimate_advantages", set_field("returns_BT", lambda b: b.advantages_BT + b.values_BT)),), {}, False, "the critic rests where the mean advantage is 0"),
    Mutant("KL from the sampler's log-probabilities", (reference_becomes(lambda b: b.ref_logprobs_BT + b.logprobs_BT - b.sampler_logprobs_BT),), {}, False, "equal to the old ones"),
    Mutant("mean over tokens, then rows", (replaced("policy_loss", per_sequence_mean),), {}, False, "positive weights"),
    Mutant("ratio always 1", (replaced("policy_loss", lambda f: lambda p, q, *a, **k: f(p, p.detach(), *a, **k)),), {}, False, "plain policy gradient"),
    Mutant("minimum instead of maximum", (larger_of(torch.minimum),), {}, False, "no trust region, same gradient at ratio 1"),
    Mutant("sampler at temperature 1", (samples_from(lambda logits: 0.8 * logits),), {}, False, "full support: TD errors still vanish"),
]  # fmt: skip
