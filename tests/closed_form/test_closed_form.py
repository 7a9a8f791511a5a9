"""PPO against exact values: it must reach pi_ref exp(r / beta) / Z, and its numbers must be the enumerated ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
import torch
from token_mdp import (
    BUDGET,
    EOS,
    TABLE_TOLERANCE,
    Experiment,
    TableClassifier,
    TableLM,
    TokenMDP,
    all_responses,
    exact_kl,
    objective,
    optimum,
    ppo_config,
    run_ppo,
    run_table,
    tiny_llama,
    total_variation,
)

from rlhf.stages import ppo

TRANSFORMER_TOLERANCE = 0.05
TRANSFORMER = {
    "steps": 60,
    "optim": {"lr": 0.003, "betas": (0.8, 0.95), "schedule": "cosine"},
    "critic_lr": 0.003,
}


@pytest.fixture(scope="module")
def table() -> Experiment:
    return run_table()


def largest_difference(a: Experiment, b: Experiment) -> float:
    pairs = zip(a.actor_critic.parameters(), b.actor_critic.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def test_all_121_responses_are_there() -> None:
    responses = all_responses()
    finished = Counter(len(y) for y in responses if y[-1] == EOS)
    assert finished == {1: 1, 2: 3, 3: 9, 4: 27}
    assert len(responses) - finished.total() == 81
    assert len(set(responses)) == len(responses) == 121
    assert all(EOS not in y[:-1] and len(y) <= BUDGET for y in responses)


@pytest.mark.parametrize("lm", [TableLM(), tiny_llama()[0]], ids=["table", "transformer"])
def test_response_probabilities_are_products_and_sum_to_one(lm: Any) -> None:
    mdp, y = TokenMDP(), (2, 0, EOS)
    logprobs_R = mdp.logprobs_R(lm, 0.8)
    with torch.no_grad():
        steps = [lm(input_ids=torch.tensor([[EOS, *y[:i]]])).logits[0, -1] / 0.8 for i in range(3)]
    by_hand = sum(float(torch.log_softmax(s, -1)[v]) for s, v in zip(steps, y, strict=True))
    assert float(logprobs_R.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(logprobs_R[mdp.index[y]]) == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [0.05, 0.5, 3.0])
def test_regret_is_beta_times_kl_to_the_optimum(seed: int, beta: float) -> None:
    """J(pi*) - J(pi) = beta KL(pi || pi*) for any policy and any reference, in float64."""
    generator = torch.Generator().manual_seed(seed)
    policy_R, reference_R = torch.randn(2, 121, generator=generator, dtype=torch.float64).log_softmax(-1)
    rewards_R = TokenMDP(seed).rewards_R
    best_R, log_z = optimum(reference_R, rewards_R, beta)
    at_best = objective(best_R, reference_R, rewards_R, beta)
    regret = at_best - objective(policy_R, reference_R, rewards_R, beta)
    assert at_best == pytest.approx(beta * float(log_z), abs=1e-9)
    assert regret == pytest.approx(beta * exact_kl(policy_R, best_R), abs=1e-9)
    assert regret > 0.01


def test_table_reaches_the_optimum(table: Experiment) -> None:
    assert total_variation(table.reference_R, table.optimum_R) > 0.4
    assert table.distance <= TABLE_TOLERANCE


def test_sampled_metrics_are_the_enumerated_values(table: Experiment) -> None:
    """At pi*, r - beta log(pi / pi_ref) is beta log Z for every response: the sampled mean has almost no variance."""
    rewards_R, beta = table.mdp.effective_rewards_R(table.cfg), table.cfg.kl.coef
    _, log_z = optimum(table.reference_R, rewards_R, beta)
    last = table.metrics[-1]
    assert last["objective/rlhf_reward"] == pytest.approx(beta * float(log_z), abs=0.01)
    assert last["objective/kl"] == pytest.approx(exact_kl(table.policy_R, table.reference_R), abs=0.15)
    assert last["objective/scores_penalised"] == pytest.approx(float(table.policy_R.exp() @ rewards_R), abs=0.15)
    assert last["val/sampler_gap"] < 1e-6
    assert fmean(line["val/explained_var"] for line in table.metrics[-20:]) > 0.9


def test_transformer_reaches_the_optimum() -> None:
    run = run_ppo(TokenMDP(), ppo_config(**TRANSFORMER), *tiny_llama())
    assert total_variation(run.reference_R, run.optimum_R) > 0.4
    assert run.distance <= TRANSFORMER_TOLERANCE


def table_models() -> tuple[Any, Any]:
    return TableLM(), TableClassifier()


@pytest.mark.parametrize("models", [table_models, tiny_llama], ids=["table", "transformer"])
def test_a_run_starts_at_the_reference_and_every_step_at_ratio_one(
    models: Callable[[], tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    deviations: list[float] = []
    checked = ppo.assert_first_ratio

    def recorded(deviation: Any, runtime: Any) -> None:
        deviations.append(float(deviation))
        checked(deviation, runtime)

    monkeypatch.setattr(ppo, "assert_first_ratio", recorded)
    run = run_ppo(TokenMDP(), ppo_config(steps=3, batch_size=64, micro_batch_size=16), *models())
    assert len(deviations) >= 3
    assert max(deviations) <= 1e-6
    assert run.metrics[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert run.metrics[1]["objective/kl"] > 1e-4


@pytest.mark.parametrize(("epochs", "minibatches", "micro_batch_size"), [(1, 1, 64), (3, 4, 7), (2, 8, 64)])
def test_optimizer_steps_are_epochs_times_minibatches(
    epochs: int, minibatches: int, micro_batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    step = torch.optim.AdamW.step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    shape = {"epochs": epochs, "minibatches": minibatches, "micro_batch_size": micro_batch_size}
    run = run_table(steps=2, batch_size=64, **shape)
    assert len(calls) == 2 * epochs * minibatches
    assert [m["train/updates"] for m in run.metrics] == [epochs * minibatches] * 2


@pytest.mark.parametrize("models", [table_models, tiny_llama], ids=["table", "transformer"])
def test_micro_batches_change_nothing(models: Callable[[], tuple[Any, Any]]) -> None:
    """Ragged responses, ragged parts: 64 rows at once, in eights, and in parts of at most 13."""
    small = {"steps": 3, "batch_size": 64, "optim": {"lr": 0.001}, "critic_lr": 0.001}
    whole, *split = [run_ppo(TokenMDP(), ppo_config(**small, micro_batch_size=size), *models()) for size in (64, 8, 13)]
    assert max(largest_difference(whole, other) for other in split) <= 1e-6
    untrained, _ = models()
    assert total_variation(whole.policy_R, whole.mdp.logprobs_R(untrained, 0.8)) > 1e-3


@pytest.mark.parametrize("coef", [0.2, 2.0], ids=["from-above", "from-below"])
def test_adaptive_kl_reaches_its_target(coef: float) -> None:
    """The coefficient settles where the optimum's own KL, known exactly, is the target.

    A horizon of three batches lets the coefficient move by 7% a step. Much faster, and it runs ahead of the policy
    and swings around the target instead.
    """
    target, size = 0.6, 512
    adaptive = {"kind": "adaptive", "coef": coef, "target": target, "horizon": 3 * size}
    run = run_table(steps=80, batch_size=size, kl=adaptive, optim={"lr": 0.1, "betas": (0.8, 0.95)})
    assert abs(exact_kl(run.optimum_R, run.reference_R) - target) > 0.4  # without control
    assert exact_kl(run.policy_R, run.reference_R) == pytest.approx(target, abs=0.1)
    settled = fmean(step["objective/kl_coef"] for step in run.metrics[-20:])
    best_R, _ = optimum(run.reference_R, run.mdp.effective_rewards_R(run.cfg), settled)
    assert exact_kl(best_R, run.reference_R) == pytest.approx(target, abs=0.1)
