"""The work of one PPO step: against a count that adds up every forward by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlhf.functional.flops import Load, causal_load, forward_flops
from rlhf.models.shape import shape_from_config
from rlhf.rollout.work import StepWork, row_lengths
from rlhf.types import Rollout, StopReason

ROWS = [(5, 3), (2, 7)]
SCORER = {"reward_model": None, "scorer": "readability", "critic_init": "policy"}


def passes(tiny: Any) -> tuple[float, float]:
    """(policy, scalar model): FLOPs of one forward over ROWS, heads included."""
    lm, scalar = shape_from_config(tiny.path), shape_from_config(tiny.reward, scalar=True)
    load = causal_load([8, 9])
    return forward_flops(lm, load, head_positions=10), forward_flops(scalar, load, head_positions=17)


@pytest.mark.parametrize("epochs", [1, 3])
def test_full_fine_tuning_is_three_forwards_per_model_and_epoch(stage_config: Any, tiny: Any, epochs: int) -> None:
    lm, scalar = passes(tiny)
    work = StepWork.of(stage_config("ppo"))
    assert work is not None
    flops = work.flops(ROWS, epochs=epochs)
    assert flops["score"] == 2 * lm + 2 * scalar
    assert flops["update"] == 3 * epochs * (lm + scalar)


def test_a_forward_that_the_scoring_left_is_not_counted_again(stage_config: Any, tiny: Any) -> None:
    lm, scalar = passes(tiny)
    work = StepWork.of(stage_config("ppo"))
    assert work is not None
    assert work.flops(ROWS, epochs=2, reused=0.25)["update"] == 5.75 * (lm + scalar)


def test_a_critic_of_another_depth_counts_its_own_layers(stage_config: Any, tiny: Any) -> None:
    lm, _ = passes(tiny)
    work = StepWork.of(stage_config("ppo"))
    assert work is not None
    flat = replace(work, critic=replace(work.critic, layers=1))
    critic = forward_flops(work.critic, causal_load([8, 9]), head_positions=17, layers=1)
    assert flat.flops(ROWS, epochs=1)["update"] == 3 * (lm + critic)


def test_sampling_is_one_forward_without_the_last_tokens(stage_config: Any, tiny: Any) -> None:
    work = StepWork.of(stage_config("ppo"))
    assert work is not None
    lm, _ = passes(tiny)
    last = Load(tokens=2, pairs=8 + 9)
    assert work.flops(ROWS, epochs=1)["generate"] == lm - forward_flops(work.policy, last, head_positions=0)


def test_a_programmatic_scorer_is_no_forward(stage_config: Any, tiny: Any) -> None:
    lm, scalar = passes(tiny)
    work = StepWork.of(stage_config("ppo", **SCORER))
    assert work is not None
    assert work.flops(ROWS, epochs=1)["score"] == 2 * lm + scalar


def test_adapters_make_no_gradient_of_the_weights(stage_config: Any, tiny: Any) -> None:
    full, lora = StepWork.of(stage_config("ppo")), StepWork.of(stage_config("ppo", tuning={"kind": "lora"}))
    assert full is not None
    assert lora is not None
    shape = full.policy
    saved = 2 * 2 * (shape.layers * shape.layer_weights * 17) + 2 * shape.head_weights * 10
    assert full.flops(ROWS, epochs=1)["update"] - lora.flops(ROWS, epochs=1)["update"] == saved


def test_layers_that_are_not_trained_have_no_backward(stage_config: Any, tiny: Any) -> None:
    """Of two layers the lower one has a forward alone, once per model; the policy's head no gradient of its weights."""
    full = StepWork.of(stage_config("ppo"))
    top = StepWork.of(stage_config("ppo", tuning={"kind": "full", "layers": 1}))
    assert full is not None
    assert top is not None
    layer = forward_flops(full.policy, causal_load([8, 9]), head_positions=0, layers=1)
    head = 2 * full.policy.head_weights * 10
    before, after = (work.flops(ROWS, epochs=3) for work in (full, top))
    assert before["update"] - after["update"] == 3 * (2 * 2 * layer + head)
    assert after["score"] == before["score"]


@pytest.mark.parametrize(("engine", "saved"), [("native", 4), ("transformers", 3)])
def test_a_trunk_is_read_once_for_all_roles_and_epochs(stage_config: Any, tiny: Any, engine: str, saved: int) -> None:
    """By the native engine while it samples, else in the scoring."""
    changes = {"tuning": {"kind": "full", "layers": 1}, "sampling": {"engine": engine}}
    begins = dict.fromkeys(("policy", "reference", "critic", "reward"), 1)
    separate = StepWork.of(stage_config("ppo", **changes))
    hydra = StepWork.of(stage_config("ppo", **changes, sharing="hydra"), begins)
    assert separate is not None
    assert hydra is not None
    layer = forward_flops(hydra.policy, causal_load([8, 9]), head_positions=0, layers=1)
    apart, shared = (work.flops(ROWS, epochs=3) for work in (separate, hydra))
    assert apart["score"] - shared["score"] == saved * layer
    assert apart["update"] - shared["update"] == 3 * 2 * layer
    top = forward_flops(hydra.policy, causal_load([8, 9]), head_positions=10, layers=1)
    top += forward_flops(hydra.critic, causal_load([8, 9]), head_positions=17, layers=1)
    assert hydra.flops(ROWS, epochs=3, reused=1.0)["update"] == shared["update"] - top


@pytest.mark.parametrize("sampled", [True, False])
def test_each_role_counts_the_layers_above_its_own_beginning(stage_config: Any, sampled: bool) -> None:
    """Of 9 layers: policy and reference 4, critic 2 of which 1 learns, reward model 3; layers 5 to 7 once for all."""
    plain = StepWork.of(stage_config("ppo"))
    assert plain is not None
    deep = {role: replace(getattr(plain, role), layers=9) for role in ("policy", "critic", "reference", "reward")}
    begins = {"policy": 5, "reference": 5, "critic": 7, "reward": 6}
    work = replace(
        plain, **deep, trained_layers=4, critic_layers=1, trains_head=False, begins=begins, trunk_is_sampled=sampled
    )
    load = causal_load([8, 9])
    layer = forward_flops(plain.policy, load, head_positions=0, layers=1)
    lm_head = forward_flops(plain.policy, load, head_positions=10, layers=0)
    scalar_head = forward_flops(plain.critic, load, head_positions=17, layers=0)
    flops = work.flops(ROWS, epochs=2)
    below = 2 if sampled else 7
    assert flops["score"] == (4 + 4 + 2 + 3 + below) * layer + 2 * lm_head + 2 * scalar_head
    # a frozen head has a forward and its input's gradient
    assert flops["update"] == 2 * (3 * 4 * layer + 2 * lm_head + (1 + 3) * layer + 3 * scalar_head)
    first = (4 + 2) * layer + lm_head + scalar_head
    assert flops["update"] - work.flops(ROWS, epochs=2, reused=1.0)["update"] == first


def test_a_row_counts_what_was_read_and_sampled_whether_it_was_scored_or_not() -> None:
    actions = ([False, True, False, True], [False, False, True])
    rows = [Rollout("p", "r", [1] * len(a), list(a), [0.0] * len(a), StopReason.EOS, score=None) for a in actions]
    assert row_lengths(rows) == [(2, 2), (2, 1)]
