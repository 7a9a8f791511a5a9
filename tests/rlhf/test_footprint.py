"""Memory of whole stages: against the tensors of built roles, and by what must not change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config_schema import RewardStage, SFTStage
from rlhf.footprint import Footprint, Models, Setup, gathered_layer, of_ppo, of_supervised
from rlhf.models.load import load_config
from rlhf.models.roles import build_roles
from rlhf.models.shape import dimensions_of
from rlhf.runtime import Runtime
from rlhf.stages.ppo import build_reward

GPUS = Setup(ranks=8, on_cpu=False)
WAYS: dict[str, dict[str, Any]] = {
    "separate": {},
    "layers": {"tuning": {"layers": 2}},
    "adapters": {"tuning": {"kind": "lora", "rank": 2}},
    "lora": {"sharing": "lora", "tuning": {"kind": "lora", "rank": 2}, "critic_init": "policy"},
    "hydra": {"sharing": "hydra", "tuning": {"layers": 3}, "critic_init": "policy", "critic_layers": 1},
    "hydra with the reward model's critic": {"sharing": "hydra", "tuning": {"layers": 3}, "critic_layers": 1},
}


@pytest.fixture(scope="module")
def deep(tiny: Any, tiny_lm: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of four layers: a language model, a reward model whose three top layers are others, one of which all."""
    from reward_model.model import save_reward_model
    from rlhf.models.load import load_sequence_classifier

    root = tmp_path_factory.mktemp("deep")
    tiny_lm(len(tiny.tokenizer), layers=4).to(torch.bfloat16).save_pretrained(root / "lm")
    tiny.tokenizer.save_pretrained(root / "lm")
    for name in ("top", "whole"):
        classifier = load_sequence_classifier(str(root / "lm"), dtype=torch.bfloat16, new_head=True)
        changed = classifier.model.layers[-3:] if name == "top" else classifier.model
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.mul_(1.5)
        save_reward_model(root / name, classifier, tiny.tokenizer, {"mean": 0.0, "std": 1.0})
    return {name: str(root / name) for name in ("lm", "top", "whole")}


def models_of(cfg: Any) -> Models:
    policy = dimensions_of(load_config(cfg.model))
    reward = dimensions_of(load_config(cfg.reward_model), scalar=True)
    whole = cfg.sharing == "lora"  # the reward model is no adapter
    return Models(policy, reward, policy, reward, not whole or cfg.critic_init == "policy", not whole)


def counted(cfg: Any, setup: Setup = GPUS) -> Footprint:
    return of_ppo(cfg, models_of(cfg), setup)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("way", WAYS)
def test_the_weights_are_those_of_the_built_roles(stage_config: Any, deep: Any, way: str, precision: str) -> None:
    """Every tensor that any role holds, once."""
    reward_model = deep["whole" if way == "lora" else "top"]
    cfg = stage_config("ppo", model=deep["lm"], reward_model=reward_model, precision=precision, **WAYS[way])
    runtime = Runtime.start(seed=0, precision=precision)
    roles = build_roles(cfg, runtime)
    reward: Any = build_reward(cfg, roles, runtime)
    modules = [roles.actor_critic, roles.reference, roles.sampler._lm, reward._model]
    modules += [module.branch for module in modules if getattr(module, "branch", None) is not None]
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in modules for p in m.parameters()}
    expected = sum(held.values())
    trained = sum(p.numel() for p in roles.actor_critic.parameters() if p.requires_grad)
    found = counted(cfg, Setup(on_cpu=False))
    assert found.total.weights == pytest.approx(expected, rel=1e-6)
    assert found.total.gradients == 4 * trained
    assert found.total.optimizer == 8 * trained
    assert found.total.logits > 0


def test_each_stage_of_zero_needs_less(stage_config: Any, deep: Any) -> None:
    cfg = stage_config("ppo", model=deep["lm"], reward_model=deep["top"])
    peaks = [counted(cfg, replace(GPUS, stage=stage)).peak for stage in range(4)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4


def test_of_what_learns_the_third_stage_leaves_an_nth(stage_config: Any, deep: Any) -> None:
    cfg = stage_config("ppo", model=deep["lm"], reward_model=deep["top"], tuning={"layers": 2})
    one, eight = (counted(cfg, Setup(3, ranks, on_cpu=False)).roles for ranks in (1, 8))
    for role in ("policy", "critic"):
        for kind in ("weights", "gradients", "optimizer"):
            assert getattr(eight[role], kind) * 8 == getattr(one[role], kind)
    for role in ("reference", "reward"):
        assert eight[role].weights * 8 == one[role].weights
    dims = dimensions_of(load_config(deep["lm"]))
    assert eight["sampler"].weights == 4 * dims.parameters, "gathered for sampling"


def test_what_is_gathered_for_sampling_is_there_while_sampling_alone(stage_config: Any, deep: Any) -> None:
    cfg = stage_config("ppo", model=deep["lm"], reward_model=deep["top"])
    second, third = (counted(cfg, Setup(stage, 1, on_cpu=False)) for stage in (2, 3))
    weights = third.roles["sampler"].weights
    assert weights > 0 == second.roles["sampler"].weights, "in float32 the policy samples"
    assert third.phases["sample"] - second.phases["sample"] == weights
    layer = gathered_layer(dimensions_of(load_config(deep["lm"])), Setup(3, 1))
    assert third.phases["update"] - second.phases["update"] == layer < weights


@pytest.mark.parametrize(
    ("changes", "phase"),
    [
        ({"micro_batch_size": 2}, "update"),
        ({"micro_batch_tokens": 600}, "update"),
        ({"gradient_checkpointing": True}, "update"),
        ({"sampling": {"max_new_tokens": 10, "batch_size": 2}}, "sample"),
        ({"tuning": {"kind": "lora", "rank": 2}}, "update"),
        ({"tuning": {"layers": 1}}, "update"),
        ({"max_prompt_tokens": 128}, "sample"),
        ({"precision": "bf16"}, "score"),
    ],
)
def test_what_lowers_memory(stage_config: Any, deep: Any, changes: dict[str, Any], phase: str) -> None:
    names = {"model": deep["lm"], "reward_model": deep["top"], "batch_size": 8, "micro_batch_size": 8}
    before = counted(stage_config("ppo", **names)).phases[phase]
    assert counted(stage_config("ppo", **{**names, **changes})).phases[phase] < before


def test_minibatches_bound_the_rows_of_a_backward(stage_config: Any, deep: Any) -> None:
    names = {"model": deep["lm"], "reward_model": deep["top"], "batch_size": 8}
    cut = counted(stage_config("ppo", **names, micro_batch_size=8, minibatches=4))
    small = counted(stage_config("ppo", **names, micro_batch_size=2, minibatches=4))
    assert cut.phases == small.phases


def test_a_reward_model_that_is_shared_leaves_its_adapters(stage_config: Any, deep: Any) -> None:
    cfg = stage_config(
        "ppo", model=deep["lm"], reward_model=deep["top"], **{**WAYS["lora"], "critic_init": "reward_model"}
    )
    models = replace(models_of(cfg), shared_critic=True, shared_reward=True)
    roles = of_ppo(cfg, models, Setup(on_cpu=False)).roles
    adapters = models.policy.adapters(2, 4)
    assert roles["reward"].weights == 4 * (adapters + 32)
    assert roles["critic"].weights == 4 * (adapters + 32)
    assert roles["reference"].weights == 0


def test_a_programmatic_scorer_has_no_weights(stage_config: Any, deep: Any) -> None:
    cfg = stage_config("ppo", model=deep["lm"], reward_model=None, scorer="readability", critic_init="policy")
    policy = dimensions_of(load_config(deep["lm"]))
    roles = of_ppo(cfg, Models(policy, policy, policy), GPUS).roles
    assert roles["reward"].total == 0


def test_the_logits_of_sft_are_those_of_all_tokens(stage_config: Any, tiny: Any, demonstrations_file: str) -> None:
    cfg: SFTStage = stage_config("sft", dataset={"path": demonstrations_file}, max_length=50, micro_batch_size=2)
    dims = dimensions_of(load_config(tiny.path))
    memory = of_supervised(cfg, dims, Setup()).roles["model"]
    assert memory.logits == 2 * (4 + 4) * 2 * 50 * len(tiny.tokenizer)
    assert memory.optimizer == 8 * dims.parameters


def test_a_reward_model_reads_pairs(stage_config: Any, tiny: Any, tmp_path: Path) -> None:
    file = tmp_path / "rankings.jsonl"
    file.write_text(json.dumps({"prompt": "why", "responses": ["a", "b"], "ranks": [1, 2]}) + "\n")
    dims = dimensions_of(load_config(tiny.reward), scalar=True)
    one, two = (
        of_supervised(stage_config("reward", dataset={"path": str(file)}, micro_batch_size=n), dims, Setup())
        for n in (1, 2)
    )
    assert isinstance(stage_config("reward", dataset={"path": str(file)}), RewardStage)
    assert two.total.activations == 2 * one.total.activations
    assert two.total.logits == 0
