"""Policy, critic, reference and sampler of one run: where each starts, and what is trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from reward_model.model import RewardModel
from rlhf.errors import ModelError
from rlhf.models.roles import build_roles
from rlhf.models.value import NORMALISATION_FILE, load_scalar_model
from rlhf.runtime import Runtime

TOKENS = torch.tensor([[2, 9, 12, 15, 3], [2, 7, 8, 3, 3]])
MASK = torch.tensor([[True] * 5, [True, True, True, True, False]])
ACTIONS = torch.tensor([[False, False, True, True, True], [False, True, True, True, False]])


@torch.no_grad()
def test_policy_and_reference_start_as_one_function(stage_config: Any, runtime: Runtime) -> None:
    roles = build_roles(stage_config("ppo"), runtime)
    mine, theirs = (model(TOKENS, MASK, ACTIONS)[0] for model in (roles.actor_critic.policy, roles.reference))
    assert torch.equal(mine, theirs)
    assert not any(p.requires_grad for p in roles.reference.parameters())
    assert all(p.requires_grad for p in roles.actor_critic.parameters())
    shared = {id(p) for p in roles.reference.parameters()} & {id(p) for p in roles.actor_critic.parameters()}
    assert not shared


@torch.no_grad()
def test_the_critic_starts_as_the_reward_model_one_token_earlier(
    stage_config: Any, runtime: Runtime, tiny: Any
) -> None:
    values = build_roles(stage_config("ppo"), runtime).actor_critic.critic(TOKENS, MASK)
    after = load_scalar_model(tiny.reward, dtype=torch.float32)(TOKENS, MASK)
    torch.testing.assert_close(values[:, 1:], after[:, :-1], atol=1e-6, rtol=0)
    assert values[:, 0].eq(0).all()


@torch.no_grad()
def test_a_critic_from_a_reward_model_of_others_is_read_after_every_token(
    stage_config: Any, runtime: Runtime, tiny: Any, tmp_path: Path
) -> None:
    """As a reward model it is not read after its pad token; the value of a cut answer that ends so is another thing."""
    shutil.copytree(tiny.reward, tmp_path / "others")
    (tmp_path / "others" / NORMALISATION_FILE).unlink()
    cfg = stage_config("ppo", reward_model=str(tmp_path / "others"))
    scalar = build_roles(cfg, runtime).actor_critic.critic.scalar
    tokens = TOKENS.clone()
    tokens[0, -1] = scalar.classifier.config.pad_token_id
    assert torch.equal(scalar.score_last(tokens, MASK)[0], scalar(tokens, MASK)[0, -1])


def test_a_critic_from_the_policy_has_its_trunk_and_a_new_head(stage_config: Any, runtime: Runtime) -> None:
    roles = build_roles(stage_config("ppo", critic_init="policy"), runtime)
    trunk = roles.actor_critic.critic.scalar.classifier.model.state_dict()
    policy = roles.actor_critic.policy.lm.model.state_dict()
    assert all(torch.equal(trunk[name], policy[name]) for name in policy)
    assert float(roles.actor_critic.critic.scalar.std) == 1.0
    assert roles.actor_critic.critic(TOKENS, MASK).eq(0).all(), "no advantage is disturbed"


@torch.no_grad()
def test_a_critic_of_an_earlier_run_goes_on_in_place_of_critic_init(
    stage_config: Any, runtime: Runtime, tiny: Any, tmp_path: Path
) -> None:
    build_roles(stage_config("ppo"), runtime).export(tmp_path, torch.float32)
    expected = load_scalar_model(tiny.reward, dtype=torch.float32)(TOKENS, MASK)
    for others in (
        {"critic_init": "policy"},
        {"critic_init": "reward_model", "reward_model": None, "scorer": "readability"},
    ):
        cfg = stage_config("ppo", critic=str(tmp_path / "critic"), **others)
        values = build_roles(cfg, runtime).actor_critic.critic(TOKENS, MASK)
        torch.testing.assert_close(values[:, 1:], expected[:, :-1], atol=1e-6, rtol=0)


def test_lora_trains_both_adapters_and_the_critic_s_head(stage_config: Any, runtime: Runtime) -> None:
    roles = build_roles(stage_config("ppo", tuning={"kind": "lora", "rank": 4}), runtime)
    names = [name for name, p in roles.actor_critic.named_parameters() if p.requires_grad]
    assert [n for n in names if "lora_" not in n] == ["critic.scalar.classifier.score.weight"]
    assert sum(n.startswith("policy") for n in names) == 28


def test_policy_and_critic_have_their_own_learning_rates(stage_config: Any, runtime: Runtime) -> None:
    cfg = stage_config("ppo", critic_lr=5e-3, optim={"lr": 1e-3, "weight_decay": 0.1})
    roles = build_roles(cfg, runtime)
    groups = roles.parameter_groups(cfg)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [
        (1e-3, 0.1),
        (1e-3, 0.0),
        (5e-3, 0.1),
        (5e-3, 0.0),
    ]
    counted = [id(p) for g in groups for p in g["params"]]
    assert sorted(counted) == sorted(id(p) for p in roles.actor_critic.parameters())


def test_everything_is_in_evaluation_mode_and_eos_is_known(stage_config: Any, runtime: Runtime) -> None:
    roles = build_roles(stage_config("ppo"), runtime)
    assert not any(m.training for model in (roles.actor_critic, roles.reference) for m in model.modules())
    assert roles.eos_ids == (3,)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sampler_has_the_policy_s_current_weights(stage_config: Any, precision: str) -> None:
    """Fully trained: cast once per step; in float32 it is the policy itself."""
    runtime = Runtime.start(seed=0, precision=precision)
    roles = build_roles(stage_config("ppo", precision=precision), runtime)
    lm = roles.actor_critic.policy.lm
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(0.05)
    with roles.sampler.ready() as sampling:
        assert (sampling is not lm) == (precision == "bf16")
        assert not sampling.training
        for mine, theirs in zip(sampling.parameters(), lm.parameters(), strict=True):
            assert torch.equal(mine, theirs.to(mine.dtype))


def test_the_sampler_has_the_current_adapters_folded_in(stage_config: Any, tiny: Any) -> None:
    """Step after step the same logits as the adapted policy, whose own weights stay; other weights are shared."""
    runtime = Runtime.start(seed=0, precision="fp32")
    roles = build_roles(stage_config("ppo", tuning={"kind": "lora", "rank": 4, "target_modules": ["q_proj"]}), runtime)
    lm = roles.actor_critic.policy.lm
    adapters = [p for p in lm.parameters() if p.requires_grad]
    frozen = [p.clone() for p in lm.parameters() if not p.requires_grad]
    tokens_BT = torch.randint(4, 30, (3, 9), generator=torch.Generator().manual_seed(0))
    before = lm(tokens_BT).logits
    for _ in range(2):
        with torch.no_grad():
            for p in adapters:
                p.add_(0.3 * torch.randn_like(p))
        with roles.sampler.ready() as sampling, torch.no_grad():
            assert not any("lora" in name for name, _ in sampling.named_parameters())
            torch.testing.assert_close(sampling(tokens_BT).logits, lm(tokens_BT).logits, atol=1e-5, rtol=1e-5)
    assert (lm(tokens_BT).logits - before).abs().max() > 1e-2
    assert all(map(torch.equal, frozen, [p for p in lm.parameters() if not p.requires_grad]))
    own = {p.data_ptr() for p in sampling.parameters()} - {p.data_ptr() for p in lm.parameters()}
    assert len(own) == lm.config.num_hidden_layers


def test_a_cast_sampler_keeps_its_float32_buffers(stage_config: Any) -> None:
    """Rotary frequencies in bf16 misplace far tokens: cos(640 * f) would be off by 0.7."""
    roles = build_roles(stage_config("ppo", precision="bf16"), Runtime.start(seed=0, precision="bf16"))
    with roles.sampler.ready() as sampling:
        assert sampling.dtype == torch.bfloat16
        theirs = dict(roles.actor_critic.policy.lm.named_buffers())
        for name, mine in sampling.named_buffers():
            assert mine.dtype == theirs[name].dtype, name
            assert torch.equal(mine, theirs[name]), name


def test_a_language_model_is_no_reward_model(stage_config: Any, runtime: Runtime, tiny: Any) -> None:
    """A path that was mixed up would be a random head, and train without a word."""
    with pytest.raises(ModelError, match="no trained `score` head"):
        build_roles(stage_config("ppo", reward_model=tiny.path), runtime)
    with pytest.raises(ModelError, match="no trained `score` head"):
        RewardModel.load(tiny.path, runtime, tokenizer=tiny.tokenizer)


def test_a_reference_with_other_tokens_is_refused(stage_config: Any, tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny.path, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"rain"', '"hail"'))
    with pytest.raises(ModelError, match=r"the reference .* has another tokenizer"):
        build_roles(stage_config("ppo", reference=str(tmp_path / "other")), Runtime.start(seed=0, precision="fp32"))
