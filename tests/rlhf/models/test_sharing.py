"""One base in several roles: the same numbers as with separate models, from fewer tensors and fewer layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from reward_model.model import RewardModel
from rlhf.errors import ConfigError, ModelError
from rlhf.models import sharing
from rlhf.models.load import load_causal_lm
from rlhf.models.packed_forward import runs_packed
from rlhf.models.policy import hidden_states
from rlhf.models.roles import Roles, build_roles
from rlhf.models.sharing import Trunk
from rlhf.models.value import load_scalar_model
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime
from rlhf.stages import ppo

TOKENS = torch.tensor([[2, 9, 12, 15, 3], [2, 7, 8, 3, 3]])
MASK = torch.tensor([[True] * 5, [True, True, True, True, False]])
HYDRA = {"sharing": "hydra", "tuning": {"kind": "full", "layers": 1}}
HYDRA_LORA = {"sharing": "hydra", "tuning": {"kind": "lora", "rank": 4, "layers": 1}}
LORA = {"sharing": "lora", "tuning": {"kind": "lora", "rank": 4}}


def tensors(model: torch.nn.Module) -> set[int]:
    return {p.data_ptr() for p in model.parameters()}


@pytest.fixture
def trained(stage_config: Callable[..., Any], metrics_of: Any, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def run(name: str, **changes: Any) -> list[dict[str, Any]]:
        cfg = stage_config("ppo", run_dir=str(tmp_path / name), **changes)
        ppo.main(cfg, RunOptions())
        lines = metrics_of(cfg.run_dir)
        return [{k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in lines]

    return run


@pytest.mark.parametrize("shared", [HYDRA, HYDRA_LORA, LORA], ids=["hydra", "hydra with lora", "lora"])
def test_training_is_that_of_separate_models(trained: Any, shared: dict[str, Any]) -> None:
    ours, theirs = trained("ours", **shared), trained("theirs", **{**shared, "sharing": "separate"})
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-4)
    assert ours[1]["objective/kl"] != 0.0


@pytest.fixture
def deep(tiny: Any, tiny_lm: Callable[..., Any], tmp_path: Path) -> dict[str, Any]:
    """Of 4 layers the policy learns 3 and the critic 1; the reward model is the policy up to its 2 top layers."""
    lm = tiny_lm(len(tiny.tokenizer), layers=4)
    lm.save_pretrained(tmp_path / "deep")
    tiny.tokenizer.save_pretrained(tmp_path / "deep")
    torch.manual_seed(2)
    scalar = load_scalar_model(str(tmp_path / "deep"), dtype=torch.float32, new_head=True)
    with torch.no_grad():
        for layer in scalar.classifier.model.layers[2:]:
            layer.mlp.up_proj.weight.mul_(1.1)
    scalar.classifier.save_pretrained(tmp_path / "deep_reward")
    tiny.tokenizer.save_pretrained(tmp_path / "deep_reward")
    models = {"model": str(tmp_path / "deep"), "reward_model": str(tmp_path / "deep_reward")}
    return {**models, "sharing": "hydra", "tuning": {"kind": "full", "layers": 3}, "critic_layers": 1}


@pytest.mark.parametrize("init", ["policy", "reward_model"])
def test_branches_that_begin_higher_train_as_separate_models(trained: Any, deep: dict[str, Any], init: str) -> None:
    ours, theirs = (trained(kind, **{**deep, "sharing": kind, "critic_init": init}) for kind in ("hydra", "separate"))
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-4)


@pytest.mark.parametrize(
    ("init", "trained", "critic"), [("policy", 1, 3), ("policy", 2, 2), ("policy", 3, 1), ("reward_model", 1, 2)]
)
def test_a_branch_begins_where_a_model_learns_or_differs(
    stage_config: Any, runtime: Runtime, tiny: Any, deep: dict[str, Any], init: str, trained: int, critic: int
) -> None:
    cfg = stage_config("ppo", **{**deep, "critic_init": init, "critic_layers": trained})
    roles = build_roles(cfg, runtime)
    reward = RewardModel.load(cfg.reward_model, runtime, tokenizer=tiny.tokenizer, share=roles.share)
    assert roles.begins(reward) == {"policy": 1, "reference": 3, "critic": critic, "reward": 2}
    below = {id(p) for layer in roles.reference.lm.model.layers[:1] for p in layer.parameters()}
    assert below <= {id(p) for p in reward._model.classifier.parameters()}
    assert below <= {id(p) for p in roles.actor_critic.critic.scalar.classifier.parameters()}
    trained_layers = {
        n.split(".layers.")[1][0]
        for n, p in roles.actor_critic.critic.named_parameters()
        if p.requires_grad and ".layers." in n
    }
    assert trained_layers == {str(layer) for layer in range(4 - trained, 4)}


def test_every_frozen_layer_reads_a_row_once(trained: Any, deep: dict[str, Any], monkeypatch: Any) -> None:
    """Level 1 is known from sampling; the reward model asks for level 2, the critic goes on from there to 3, where the
    reference finds it."""
    read: list[tuple[int, int, int]] = []
    real = Trunk._part
    monkeypatch.setattr(Trunk, "_part", lambda self, start, stop: read.append((start, stop)) or real(self, start, stop))
    monkeypatch.setattr(sharing, "_check_split", lambda backbone, trunk: None)  # reads rows of its own
    trained("run", **deep, critic_init="policy", micro_batch_size=8, steps=2)
    assert read == [(1, 2), (2, 3)] * 2


def reward_of(roles: Roles, runtime: Runtime, tiny: Any) -> Any:
    return RewardModel.load(tiny.reward, runtime, tokenizer=tiny.tokenizer, share=roles.share)


@pytest.mark.parametrize("shared", [HYDRA, HYDRA_LORA, LORA], ids=["hydra", "hydra with lora", "lora"])
def test_every_frozen_tensor_is_there_once(stage_config: Any, runtime: Runtime, tiny: Any, shared: Any) -> None:
    """The lower of two layers and the embeddings in hydra, everything but adapters and heads in lora."""
    roles = build_roles(stage_config("ppo", **shared), runtime)
    frozen = {id(p) for p in roles.actor_critic.policy.lm.parameters() if not p.requires_grad}
    in_common = 1 + 9 * (2 if shared is LORA else 1) + (shared is LORA)
    others = [roles.reference.lm.model, roles.actor_critic.critic.scalar.classifier.model]
    others.append(reward_of(roles, runtime, tiny)._model.classifier.model)
    for other in others:
        assert len(frozen & {id(p) for p in other.parameters()}) >= in_common


def test_a_trained_reward_model_shares_with_the_critic_that_starts_from_it(
    stage_config: Any, runtime: Runtime, tiny: Any, tmp_path: Path
) -> None:
    """Its weights are no longer the policy's, but the critic's base is the same."""
    scalar = load_scalar_model(tiny.reward, dtype=torch.float32)
    with torch.no_grad():
        for layer in scalar.classifier.model.layers:
            layer.mlp.up_proj.weight.mul_(1.01)
    scalar.classifier.save_pretrained(tmp_path / "reward")
    tiny.tokenizer.save_pretrained(tmp_path / "reward")
    roles = build_roles(stage_config("ppo", **LORA, reward_model=str(tmp_path / "reward")), runtime)
    model = RewardModel.load(str(tmp_path / "reward"), runtime, tokenizer=tiny.tokenizer, share=roles.share)
    critic = {id(p) for p in roles.actor_critic.critic.scalar.classifier.model.parameters()}
    assert all(id(p) in critic for p in model._model.classifier.model.parameters())


def test_only_the_top_layers_and_the_head_are_trained(stage_config: Any, runtime: Runtime) -> None:
    roles = build_roles(stage_config("ppo", **HYDRA), runtime)
    names = {n for n, p in roles.actor_critic.named_parameters() if p.requires_grad}
    tops = {f"{who}.model.{what}" for who in ("policy.lm", "critic.scalar.classifier") for what in ("layers.1", "norm")}
    assert {n for n in names if not any(n.startswith(top) for top in tops)} == {"critic.scalar.classifier.score.weight"}
    assert len(names) == 2 * (9 + 1) + 1


def test_frozen_weights_are_kept_in_the_precision_of_the_run(stage_config: Any) -> None:
    runtime = Runtime.start(seed=0, precision="bf16")
    roles = build_roles(stage_config("ppo", precision="bf16", **HYDRA), runtime)
    for p in roles.actor_critic.parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)


@pytest.mark.parametrize("top", [1, 2], ids=["upper layer", "all layers"])
@torch.no_grad()
def test_a_branch_over_its_trunk_is_the_whole_model(tiny: Any, top: int) -> None:
    lm = load_causal_lm(tiny.path, dtype=torch.float32)
    whole = hidden_states(lm.model, TOKENS, MASK)[MASK]
    branch = Trunk.of(lm, top=top, remembered_rows=4).branch(lm)
    torch.testing.assert_close(branch(TOKENS, MASK)[MASK], whole)


@pytest.mark.parametrize("shared", [HYDRA, HYDRA_LORA], ids=["full", "lora"])
@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_the_trunk_reads_no_row_that_our_own_code_sampled(
    trained: Any, shared: dict[str, Any], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding took all tokens through the same layers, the last one of an answer included."""
    read: list[int] = []
    real = Trunk.states

    def noting(self: Trunk, tokens_BT: torch.Tensor, mask_BT: torch.Tensor, level: int) -> torch.Tensor:
        known = self._levels[level]
        read.extend(sharing._key(tokens[mask]) not in known for tokens, mask in zip(tokens_BT, mask_BT, strict=True))
        return real(self, tokens_BT, mask_BT, level)

    monkeypatch.setattr(sharing, "_check_split", lambda backbone, trunk: None)  # reads rows of its own
    monkeypatch.setattr(Trunk, "states", noting)
    trained("run", **shared, sampling={"engine": engine, "max_new_tokens": 8})
    assert len(read) > 16
    assert any(read) == (engine == "transformers")


@torch.no_grad()
def test_the_trunk_reads_a_row_once(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load_causal_lm(tiny.path, dtype=torch.float32)
    trunk = Trunk.of(lm, top=1, remembered_rows=2)
    read: list[int] = []
    real = sharing.hidden_states
    monkeypatch.setattr(sharing, "hidden_states", lambda b, t, *a, **k: read.append(len(t)) or real(b, t, *a, **k))
    first = trunk.states(TOKENS, MASK)
    again = trunk.states(TOKENS.flip(0), MASK.flip(0))
    assert torch.equal(first[MASK], again.flip(0)[MASK])
    wider = torch.nn.functional.pad(TOKENS, (0, 2))  # padding is no part of a row
    assert torch.equal(trunk.states(wider, torch.nn.functional.pad(MASK, (0, 2)))[:, :5][MASK], first[MASK])
    assert read == [2]
    trunk.states(torch.tensor([[2, 30, 31]]), torch.ones(1, 3, dtype=torch.bool))  # the oldest row makes room
    trunk.states(TOKENS, MASK)
    assert read == [2, 1, 1]


def test_a_reward_model_of_another_base_stays_whole(
    stage_config: Any, runtime: Runtime, tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    roles = build_roles(stage_config("ppo", **HYDRA), runtime)
    scalar = load_scalar_model(tiny.reward, dtype=torch.float32)
    with torch.no_grad():
        scalar.classifier.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    before = scalar(TOKENS, MASK)
    roles.share(scalar)
    assert scalar.branch is None
    assert torch.equal(scalar(TOKENS, MASK), before)
    assert "stays whole" in caplog.text
    assert "tuning.layers: 1 or fewer" in caplog.text


def test_a_model_that_cannot_be_cut_is_refused() -> None:
    lm = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=60, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(ModelError, match="gpt2 models cannot be cut"):
        Trunk.of(lm, top=1, remembered_rows=4)


@torch.no_grad()
def test_a_model_that_does_more_between_its_layers_is_refused(tiny: Any) -> None:
    """One that scales whatever comes in as embeddings, as early Gemma code did."""
    lm = load_causal_lm(tiny.path, dtype=torch.float32)
    forward = lm.model.forward

    def scaling(input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
        embeds = lm.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return forward(inputs_embeds=embeds * 3.0, **kwargs)

    lm.model.forward = scaling
    with pytest.raises(ModelError, match="cannot be cut"):
        Trunk.of(lm, top=1, remembered_rows=4)


def test_more_layers_than_there_are_is_an_error(stage_config: Any, runtime: Runtime) -> None:
    with pytest.raises(ConfigError, match=r"tuning.layers is 3, the model has 2"):
        build_roles(stage_config("ppo", sharing="hydra", tuning={"kind": "full", "layers": 3}), runtime)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharing": "lora"}, "sharing: lora needs tuning.kind: lora"),
        ({"sharing": "hydra"}, "sharing: hydra needs tuning.layers"),
        ({**HYDRA, "critic_layers": 2}, "critic_layers 2 is more than tuning.layers 1"),
    ],
)
def test_contradictions_are_named(stage_config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_config("ppo", **changes)


def test_float32_layers_over_a_frozen_trunk_in_bf16_run_packed(stage_config: Any) -> None:
    runtime = Runtime.start(seed=0, precision="bf16")
    roles = build_roles(stage_config("ppo", precision="bf16", **HYDRA), runtime)
    branch = roles.actor_critic.policy.branch
    assert isinstance(branch, sharing.Branch)
    assert runs_packed(branch.part, 8)
    assert runs_packed(roles.actor_critic.policy.lm.model, 8)
