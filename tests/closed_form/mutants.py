"""Classic PPO bugs, each injected into the real functions, one at a time.

A mutant is a change of the configuration, a replacement of functions, or both. `BUGS` keep the run from pi*; `HARMLESS`
changes still lead there, and say why. Most of the latter follow from one fact: tokens move the state without chance, so
at (pi*, V*) every action has r_t - beta log(pi / pi_ref) + V(next) - V = 0 (Nachum et al. 2017, arXiv:1702.08892,
equation 11). All TD errors and advantages are 0 there, whatever lambda is, and positive weights on them move nothing.

Not injectable, because nothing would change: "advantages not detached" (they carry no graph) and "log-ratio not masked"
(the masked sum drops what lies outside).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from token_mdp import BUDGET, EOS
from torch import Tensor, nn

from rlhf.functional import kl, losses
from rlhf.functional.masked import masked_sum
from rlhf.models import roles
from rlhf.models.policy import Policy
from rlhf.models.value import Critic
from rlhf.stages import ppo
from rlhf.types import RolloutBatch

Patch = Callable[[pytest.MonkeyPatch], None]
KL_AS_LOSS = {"kind": "fixed", "coef": 0.5, "place": "loss", "estimator": "k2"}


@dataclass(frozen=True)
class Mutant:
    """`patches` are applied before a run under `ppo_config(**changes)`; `why` says why a change is harmless."""

    name: str
    patches: tuple[Patch, ...]
    changes: dict[str, Any]
    why: str = ""


def bug(name: str, *patches: Patch, **changes: Any) -> Mutant:
    """A mutant that must be caught."""
    return Mutant(name, patches, changes)


def harmless(name: str, why: str, *patches: Patch, **changes: Any) -> Mutant:
    """A mutant that must reach the optimum all the same."""
    return Mutant(name, patches, changes, why)


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
    """`change(batch)` after a function of the stage that returns or is given the batch."""

    def mutate(original: Any) -> Any:
        def mutated(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            change(next(x for x in (result, *args) if isinstance(x, RolloutBatch)))
            return result

        return mutated

    return replaced(name, mutate)


def actions_become(change: Callable[[Any], Tensor]) -> Patch:
    """`change(batch)` instead of the action mask."""
    return after("make_batch", lambda b: setattr(b, "action_mask_BT", change(b)))


def advantages_become(change: Callable[[Any], Tensor]) -> Patch:
    """`change(batch)` instead of the whitened advantages; the critic's targets stay."""
    return after("estimate_advantages", lambda b: setattr(b, "advantages_BT", change(b) * b.action_mask_BT))


def rolled_logprobs(batch: Any) -> None:
    """Old and reference log-probabilities of the row before, as after an unstable sort."""
    batch.logprobs_BT, batch.ref_logprobs_BT = batch.logprobs_BT.roll(1, 0), batch.ref_logprobs_BT.roll(1, 0)


# --- mutations of the models, the sampler and the losses --------------------------------------------------------


class OtherSampler:
    """A language model whose logits are changed while sampling, and nowhere else."""

    def __init__(self, lm: Any, change: Callable[[Tensor], Tensor]) -> None:
        self.lm, self.change = lm, change
        self.config, self.device = lm.config, lm.device
        self.get_output_embeddings = lm.get_output_embeddings

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


def called_at_temperature_1(name: str, *, model: int) -> Patch:
    """Function `name` calls the model that is its argument number `model` without the configured temperature."""

    def mutate(original: Any) -> Any:
        def mutated(*args: Any, **kwargs: Any) -> Any:
            def untempered_model(*a: Any, **settings: Any) -> Any:
                return args[model](*a, **{**settings, "temperature": 1.0})

            return original(*args[:model], untempered_model, *args[model + 1 :], **kwargs)

        return mutated

    return replaced(name, mutate)


def updated_at_temperature_1(original: Any) -> Any:
    """The update's forward without the configured temperature."""

    def mutated(learner: Any, part: Any) -> Any:
        sampling = learner.cfg.sampling.model_copy(update={"temperature": 1.0})
        return original(replace(learner, cfg=learner.cfg.model_copy(update={"sampling": sampling})), part)

    return mutated


def untempered(original: Any) -> Any:
    """Old, new and reference log-probabilities agree, but not with the sampler."""
    return lambda self, *args, **settings: original(self, *args, **{**settings, "temperature": 1.0})


def with_dropout(original: Any) -> Any:
    """A policy that is not deterministic."""

    def mutated(self: Any, *args: Any, **kwargs: Any) -> Any:
        logprobs_BT, entropy_BT = original(self, *args, **kwargs)
        return nn.functional.dropout(logprobs_BT, 0.1), entropy_BT

    return mutated


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


def ratio_one(original: Any) -> Any:
    """The old policy is always the current one."""
    return lambda logprobs_BT, old_BT, *a, **k: original(logprobs_BT, logprobs_BT.detach(), *a, **k)


def negated_loss(original: Any) -> Any:
    """Minimised becomes maximised; the statistics stay."""

    def mutated(*args: Any, **kwargs: Any) -> Any:
        loss, stats = original(*args, **kwargs)
        return -loss, stats

    return mutated


def always_centred(original: Any) -> Any:
    """Whitening removes the mean of rewards, too."""
    return lambda *a, center: original(*a, center=True)


def centred_per_row(original: Any) -> Any:
    """Advantages minus the mean of their own response."""

    def mutated(x_BT: Tensor, mask_BT: Tensor, moments_3: Tensor, *, center: bool) -> Tensor:
        means_B1 = (x_BT * mask_BT).sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)
        return original((x_BT - means_B1) * mask_BT, mask_BT, moments_3, center=center)

    return mutated


def k1_loss(original: Any) -> Any:
    """What `kl_loss` refuses."""

    def mutated(logprobs_BT: Tensor, ref_BT: Tensor, mask_BT: Tensor, *, estimator: str, denominator: float) -> Tensor:
        return masked_sum(kl.k1(logprobs_BT, ref_BT), mask_BT) / denominator

    return mutated


# --- the table --------------------------------------------------------------------------------------------------

BUGS = [
    # The KL penalty
    bug("KL sign", replaced("k1", lambda k1: lambda p, q: k1(q, p))),
    bug("KL mean over the response", kl_becomes(lambda x, mask: x / mask.sum(1, keepdim=True))),
    bug("KL absolute value", kl_becomes(lambda x, mask: x.abs())),
    bug("KL clamped at 0", kl_becomes(lambda x, mask: x.clamp(min=0))),
    bug("k2 in the reward", replaced("k1", lambda k1: kl.k2)),
    bug("k3 in the reward", replaced("k1", lambda k1: kl.k3)),
    bug("beta halved", kl_becomes(lambda x, mask: x / 2)),
    bug("beta doubled", kl_becomes(lambda x, mask: x * 2)),
    bug("KL dropped", kl_becomes(lambda x, mask: x * 0)),
    bug("KL of EOS dropped", reference_becomes(lambda b: b.ref_logprobs_BT.where(b.tokens_BT != EOS, b.logprobs_BT))),
    bug("KL of the last action dropped", kl_becomes(lambda x, mask: x * ~last_action(mask))),
    bug("KL of the first action dropped", kl_becomes(lambda x, mask: x * ~first_action(mask))),
    bug("k1 as a loss", replaced("kl_loss", k1_loss), kl=KL_AS_LOSS),
    bug("k2 as a loss per token", kl=KL_AS_LOSS),
    bug("k3 as a loss", kl={**KL_AS_LOSS, "estimator": "k3"}),
    # The reference
    bug("reference is the old policy", reference_becomes(lambda b: b.logprobs_BT)),
    bug("reference shifted by one token", reference_becomes(lambda b: shifted(b.ref_logprobs_BT, 1))),
    bug("reference of another row", reference_becomes(lambda b: b.ref_logprobs_BT.roll(1, 0))),
    bug("reference at temperature 1", called_at_temperature_1("evaluate_rollouts", model=3)),
    # The score
    bug("score one token early", score_on(one_early)),
    bug("score one slot late", score_on(one_late)),
    bug("score on the first action", score_on(first_action)),
    bug("score on every action", score_on(lambda mask: mask)),
    bug("score twice", scores_become(lambda s, mask: 2 * s)),
    bug("score divided by the length", scores_become(lambda s, mask: s / mask.sum(1))),
    bug("score of another row", scores_become(lambda s, mask: s.roll(1))),
    bug("score whitened per batch", scores_become(lambda s, mask: (s - s.mean()) / s.std())),
    bug("score dropped at the budget", scores_become(lambda s, mask: s * (mask.sum(1) < BUDGET))),
    bug("score clipped at 0.5", replaced("clip_scores", lambda clip: lambda s, limit: clip(s, 0.5))),
    bug("score not clipped", replaced("clip_scores", lambda clip: lambda s, limit: s)),
    bug(
        "missing-EOS penalty on all",
        replaced("missing_eos_penalty", lambda _: lambda s, r, c: [x - c.value for x in s]),
    ),
    bug("missing-EOS penalty never", replaced("missing_eos_penalty", lambda _: lambda s, r, c: s)),
    bug("rewards whitened without their mean", replaced("whiten", always_centred), whiten_rewards=True),
    # The mask
    bug("EOS is no action", actions_become(lambda b: b.action_mask_BT & (b.tokens_BT != EOS))),
    bug("first token is no action", actions_become(lambda b: b.action_mask_BT & ~first_action(b.action_mask_BT))),
    bug("a padding token is an action", actions_become(lambda b: b.action_mask_BT | one_late(b.action_mask_BT))),
    # Advantages and the critic
    bug("gamma 0.95", gamma=0.95),
    bug("gamma 0", gamma=0.0),
    bug("advantages one token late", advantages_become(lambda b: shifted(b.advantages_BT, 1))),
    bug("advantages one token early", advantages_become(lambda b: shifted(b.advantages_BT, -1))),
    bug("advantages negated", advantages_become(lambda b: -b.advantages_BT)),
    bug("advantages centred per response", replaced("whiten", centred_per_row)),
    bug("baseline sign", replaced("gae", lambda gae: lambda r, v, mask, **k: gae(r, -v, mask, **k))),
    bug("critic sees the action", replaced("forward", lambda _: lambda self, *a: self.scalar(*a), Critic)),
    bug("critic never trained", value_coef=0.0),
    bug("value loss sign", replaced("value_loss", negated_loss)),
    bug(
        # Whitening makes small advantages large: near pi* the critic's targets are noise of size 1.
        "returns from whitened advantages",
        after("estimate_advantages", lambda b: setattr(b, "returns_BT", b.advantages_BT + b.values_BT)),
    ),
    bug("cut answers bootstrapped", bootstrap_truncated=True),
    # The policy loss
    bug("ratio inverted", replaced("_log_ratio", lambda ratio: lambda *a: -ratio(*a), losses)),
    bug("clipped term with the wrong sign", larger_of(lambda a, b: torch.max(a, -b))),
    bug("entropy bonus", entropy_coef=0.05, whiten_advantages=False),
    bug("old log-probabilities of another row", after("evaluate_rollouts", rolled_logprobs)),
    bug("update at temperature 1", replaced("forward", updated_at_temperature_1)),
    bug("training at temperature 1", replaced("forward", untempered, Policy)),
    bug("dropout", replaced("forward", with_dropout, Policy)),
    # The sampler
    bug("top-k 2", samples_from(top_k)),
    bug("top-p 0.7", samples_from(top_p)),
    bug("EOS never sampled", samples_from(without_eos)),
    bug("sampler at temperature 1", samples_from(lambda z: 0.8 * z)),  # full support, so only the assertion sees it
]

HARMLESS = [
    harmless("no mutation", "the experiment itself"),
    harmless("lambda 0", "TD errors vanish at the optimum", lam=0.0),
    harmless("lambda 1", "unbiased whatever the critic says", lam=1.0),
    harmless(
        "advantages not whitened",
        "a positive factor, which the optimizer's step follows with a delay: more and smaller steps",
        whiten_advantages=False,
        steps=60,
        optim={"lr": 0.04, "betas": (0.8, 0.95), "schedule": "cosine"},
    ),
    harmless(
        "KL from the sampler's log-probabilities",
        "they are the old ones, up to rounding",
        reference_becomes(lambda b: b.ref_logprobs_BT + b.logprobs_BT - b.sampler_logprobs_BT),
    ),
    harmless("mean over tokens, then rows", "positive weights", replaced("policy_loss", per_sequence_mean)),
    harmless("ratio always 1", "the plain policy gradient", replaced("policy_loss", ratio_one)),
    harmless("minimum instead of maximum", "no trust region, the same gradient at ratio 1", larger_of(torch.minimum)),
]
