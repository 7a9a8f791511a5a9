"""An adapter's folder in the place of a model: the function that peft's own loading gives, over a base to share."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reward_model.model import RewardModel
from rlhf.config_schema import TuningConfig
from rlhf.dry_run import describe
from rlhf.errors import ConfigError, ModelError
from rlhf.files import content_digest
from rlhf.models.adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_folder, save_adapter
from rlhf.models.load import load_causal_lm, load_tokenizer, resolve_model
from rlhf.models.roles import build_roles
from rlhf.models.tuning import apply_tuning, lora_layers, merge_tuning
from rlhf.models.value import NORMALISATION_FILE, load_scalar_model
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime
from rlhf.stages import ppo

TOKENS = torch.tensor([[2, 9, 12, 15, 3], [2, 7, 8, 3, 3]])
MASK = torch.tensor([[True] * 5, [True, True, True, True, False]])
TUNING = TuningConfig(kind="lora", rank=4)
LORA = {"sharing": "lora", "tuning": {"kind": "lora", "rank": 2}}


def moved(model: Any) -> Any:
    """Its adapters are no longer the identity."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.lora_B["default"].weight.normal_(std=0.1, generator=generator)
    return model


@pytest.fixture
def policy(tiny: Any, tmp_path: Path) -> str:
    lm = load_causal_lm(tiny.path, dtype=torch.float32)
    handle = apply_tuning(lm, TUNING, torch.float32)
    moved(lm)
    save_adapter(handle, tmp_path / "policy_adapter")
    return str(tmp_path / "policy_adapter")


@pytest.fixture
def reward(tiny: Any, tmp_path: Path) -> str:
    """The adapter of a reward model over the policy's base, with normalisation."""
    torch.manual_seed(5)
    classifier = load_scalar_model(tiny.path, dtype=torch.float32, new_head=True).classifier
    handle = apply_tuning(classifier, TUNING, torch.float32, head=classifier.score)
    moved(classifier)
    moments = json.dumps({"mean": 0.5, "std": 2.0})
    save_adapter(
        handle,
        tmp_path / "reward_adapter",
        head=classifier.score,
        further=lambda folder: (folder / NORMALISATION_FILE).write_text(moments),
    )
    return str(tmp_path / "reward_adapter")


@torch.no_grad()
def test_a_policy_is_what_peft_makes_of_base_and_adapter(policy: str, tiny: Any) -> None:
    from peft import AutoPeftModelForCausalLM

    ours = load_causal_lm(policy, dtype=torch.float32)
    assert not lora_layers(ours), "folded in"
    theirs = AutoPeftModelForCausalLM.from_pretrained(policy)
    torch.testing.assert_close(ours(TOKENS).logits, theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(TOKENS).logits, load_causal_lm(tiny.path, dtype=torch.float32)(TOKENS).logits)
    assert resolve_model(policy) == tiny.path
    assert load_tokenizer(policy).get_vocab() == tiny.tokenizer.get_vocab()


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "folded"])
@torch.no_grad()
def test_a_reward_model_is_what_peft_makes_of_base_adapter_and_head(reward: str, keep: bool) -> None:
    from peft import AutoPeftModelForSequenceClassification

    ours = load_scalar_model(reward, dtype=torch.float32, keep_adapter=keep)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(reward, num_labels=1)
    theirs.config.pad_token_id = 0
    raw_B = torch.stack([theirs(row[mask][None]).logits[0, 0] for row, mask in zip(TOKENS, MASK, strict=True)])
    torch.testing.assert_close(ours.score_last(TOKENS, MASK), (raw_B - 0.5) / 2.0, atol=1e-5, rtol=1e-5)
    assert bool(lora_layers(ours.classifier)) == keep


def test_policy_critic_and_reward_model_stand_on_one_base(
    stage_config: Callable[..., Any], runtime: Runtime, tiny: Any, reward: str
) -> None:
    roles = build_roles(stage_config("ppo", **LORA, reward_model=reward), runtime)
    critic = roles.actor_critic.critic.scalar
    model = RewardModel.load(reward, runtime, tokenizer=tiny.tokenizer, share=roles.share)
    base = {id(p) for p in roles.actor_critic.policy.lm.parameters() if not p.requires_grad}
    for scalar in (critic, model._model):
        others = [name for name, p in scalar.classifier.model.named_parameters() if id(p) not in base]
        assert others
        assert all("lora_" in name for name in others)


def test_the_critic_goes_on_with_the_reward_model_s_adapter(
    stage_config: Callable[..., Any], runtime: Runtime, reward: str
) -> None:
    """Its rank, not the policy's; its scores at the start; adapters and head learn."""
    critic = build_roles(stage_config("ppo", **LORA, reward_model=reward), runtime).actor_critic.critic.scalar
    learning = {name for name, p in critic.classifier.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in critic.classifier.named_parameters() if "lora_" in n or n == "score.weight"}
    assert {layer.r["default"] for layer in lora_layers(critic.classifier)} == {4}
    whole = load_scalar_model(reward, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(critic(TOKENS, MASK)[MASK], whole(TOKENS, MASK)[MASK], atol=1e-5, rtol=1e-5)


def test_ppo_with_a_shared_adapter_scores_as_with_the_folded_reward_model(
    stage_config: Callable[..., Any], metrics_of: Any, tiny: Any, reward: str, tmp_path: Path
) -> None:
    def lines_of(name: str, **changes: Any) -> Any:
        cfg = stage_config("ppo", run_dir=str(tmp_path / name), critic_init="policy", reward_model=reward, **changes)
        ppo.main(cfg, RunOptions())
        return metrics_of(cfg.run_dir)

    ours, theirs = lines_of("ours", **LORA), lines_of("theirs", tuning=LORA["tuning"])
    for a, b in zip(ours, theirs, strict=True):
        for key in ("objective/scores", "objective/kl", "loss/value_avg"):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-4)


def test_a_critic_with_an_adapter_of_its_own_is_exported_whole(
    stage_config: Callable[..., Any], runtime: Runtime, reward: str, tmp_path: Path
) -> None:
    """Policy and critic stand on one base: neither's adapter may get into the other's export."""
    roles = build_roles(stage_config("ppo", **LORA, reward_model=reward), runtime)
    moved(roles.actor_critic)
    critic = roles.actor_critic.critic.scalar
    with torch.no_grad():
        values, logits = critic(TOKENS, MASK), roles.actor_critic.policy.lm(TOKENS).logits
        roles.export(tmp_path, torch.float32)
        saved = load_scalar_model(str(tmp_path / "critic"), dtype=torch.float32)
        torch.testing.assert_close(saved(TOKENS, MASK)[MASK], values[MASK], atol=1e-5, rtol=1e-5)
        for folder in ("final", "adapter"):
            policy = load_causal_lm(str(tmp_path / folder), dtype=torch.float32)
            torch.testing.assert_close(policy(TOKENS).logits, logits, atol=1e-4, rtol=1e-4)
    assert (float(saved.mean), float(saved.std)) == (0.5, 2.0)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_elsewhere_the_adapter_is_folded_before_training(
    stage_config: Callable[..., Any], runtime: Runtime, reward: str, kind: str
) -> None:
    roles = build_roles(stage_config("ppo", tuning={"kind": kind, "rank": 2}, reward_model=reward), runtime)
    critic = roles.actor_critic.critic.scalar
    assert {layer.r["default"] for layer in lora_layers(critic.classifier)} == ({2} if kind == "lora" else set())
    whole = load_scalar_model(reward, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(critic(TOKENS, MASK)[MASK], whole(TOKENS, MASK)[MASK], atol=1e-5, rtol=1e-5)


def test_a_reward_model_that_shares_nothing_is_named(
    stage_config: Callable[..., Any], reward: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, tiny: Any
) -> None:
    """Folded, its matrices are no longer the policy's."""
    folded = load_scalar_model(reward, dtype=torch.float32).classifier
    folded.save_pretrained(tmp_path / "folded")
    tiny.tokenizer.save_pretrained(tmp_path / "folded")
    cfg = stage_config("ppo", **LORA, reward_model=str(tmp_path / "folded"), steps=1)
    ppo.main(cfg, RunOptions())
    assert "give its adapter folder" in caplog.text
    assert caplog.text.count("stays whole") == 1, "the reward model shares with the critic that came from it"
    caplog.clear()
    ppo.main(stage_config("ppo", **LORA, reward_model=reward, steps=1), RunOptions())
    assert "stays whole" not in caplog.text


def changed_config(folder: str, **changes: Any) -> None:
    file = Path(folder) / CONFIG_FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message", "fix"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "holds an adapter of kind PREFIX_TUNING", "use plain LoRA"),
        ({"base_model_name_or_path": None}, "does not say which model it adapts", "set base_model_name_or_path"),
        ({"base_model_name_or_path": "/no/such"}, "is an adapter: no model folder /no/such", "correct base_model"),
        ({"target_modules": ["q_proj"]}, "cannot be put into .*weights of other layers", "trained over"),
        ({"r": 3}, "cannot be put into .*size mismatch", "trained over"),
        ({"use_dora": True}, "LoRA with use_dora", "use plain LoRA"),
        ({"lora_bias": True, "layer_replication": [[0, 2]]}, "LoRA with lora_bias, LoRA with layer_rep", "plain LoRA"),
        ({"modules_to_save": ["score"]}, "its head is in only one of", "trained over"),
        ({"base_model_name_or_path": 123}, "does not say which model it adapts", "set base_model_name_or_path"),
    ],
    ids=["kind", "no base", "base gone", "other layers", "other rank", "dora", "bias", "no head", "number"],
)
def test_what_is_wrong_with_an_adapter_is_said(policy: str, changes: Any, message: str, fix: str) -> None:
    changed_config(policy, **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load_causal_lm(policy, dtype=torch.float32)
    assert fix in caught.value.fix


def test_a_damaged_description_is_named(policy: str) -> None:
    (Path(policy) / CONFIG_FILE).write_text("{")
    with pytest.raises(ModelError, match=f"{CONFIG_FILE} is damaged"):
        load_causal_lm(policy, dtype=torch.float32)


def test_an_incomplete_adapter_is_refused(policy: str) -> None:
    file = Path(policy) / WEIGHTS_FILE
    weights = load_file(file)
    gone = next(name for name in weights if "lora_B" in name)
    save_file({name: w for name, w in weights.items() if name != gone}, file)
    with pytest.raises(ModelError, match="weights of other layers"):
        load_causal_lm(policy, dtype=torch.float32)
    file.unlink()
    file.with_suffix(".bin").touch()
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        load_causal_lm(policy, dtype=torch.float32)


def test_an_adapter_that_is_its_own_base_is_refused(policy: str, tmp_path: Path) -> None:
    shutil.copytree(policy, tmp_path / "other")
    changed_config(policy, base_model_name_or_path=str(tmp_path / "other"))
    changed_config(str(tmp_path / "other"), base_model_name_or_path=policy)
    with pytest.raises(ModelError, match="is its own base"):
        load_causal_lm(policy, dtype=torch.float32)
    assert content_digest(Path(policy), exact=True)


def test_an_adapter_of_tied_embeddings_is_refused(tiny: Any, tmp_path: Path) -> None:
    """It would change the matrix at both ends."""
    lm = load_causal_lm(tiny.path, dtype=torch.float32)
    lm.config.tie_word_embeddings = True
    lm.tie_weights()
    lm.save_pretrained(tmp_path / "tied")
    tiny.tokenizer.save_pretrained(tmp_path / "tied")
    tuning = TuningConfig(kind="lora", rank=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match="names lm_head, which is tied"):
        apply_tuning(load_causal_lm(str(tmp_path / "tied"), dtype=torch.float32), tuning, torch.float32)
    save_adapter(
        apply_tuning(load_causal_lm(tiny.path, dtype=torch.float32), tuning, torch.float32), tmp_path / "adapter"
    )
    load_causal_lm(str(tmp_path / "adapter"), dtype=torch.float32)
    changed_config(str(tmp_path / "adapter"), base_model_name_or_path=str(tmp_path / "tied"))
    with pytest.raises(ModelError, match="lm_head is tied to another matrix"):
        load_causal_lm(str(tmp_path / "adapter"), dtype=torch.float32)


@torch.no_grad()
def test_an_adapter_over_an_adapter_is_both(policy: str, tmp_path: Path) -> None:
    """What is saved names the folder that it was trained over, not that one's base."""
    lm = load_causal_lm(policy, dtype=torch.float32)
    handle = apply_tuning(lm, TUNING, torch.float32)
    moved(lm)
    logits = lm(TOKENS).logits
    save_adapter(handle, tmp_path / "second")
    again = load_causal_lm(str(tmp_path / "second"), dtype=torch.float32)
    torch.testing.assert_close(again(TOKENS).logits, logits, atol=1e-5, rtol=1e-5)


def test_a_run_from_an_adapter_leaves_an_adapter_that_is_its_final_model(
    stage_config: Callable[..., Any], policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is read from, and though the folder was named from here."""
    monkeypatch.chdir(tmp_path)
    cfg = stage_config("ppo", model="policy_adapter", tuning=LORA["tuning"], optim={"lr": 1e-2})
    ppo.main(cfg, RunOptions())
    monkeypatch.chdir("/")
    run = tmp_path / "ppo"
    final, adapter = (load_causal_lm(str(run / name), dtype=torch.float32) for name in ("final", "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(adapter(TOKENS).logits, final(TOKENS).logits, atol=1e-4, rtol=1e-4)


def test_an_earlier_run_s_adapter_does_not_stay(tiny: Any, policy: str) -> None:
    assert not save_adapter(load_causal_lm(tiny.path, dtype=torch.float32), Path(policy))
    assert not Path(policy).exists()


def test_an_adapter_may_bring_its_tokenizer(policy: str, tiny: Any) -> None:
    assert load_tokenizer(policy).chat_template == tiny.tokenizer.chat_template
    tiny.tokenizer.save_pretrained(policy)
    (Path(policy) / "chat_template.jinja").write_text("other")
    assert load_tokenizer(policy).chat_template == "other"


def test_policy_and_reward_model_are_not_taken_for_one_another(policy: str, reward: str) -> None:
    with pytest.raises(ModelError, match="is the adapter of a reward model"):
        load_causal_lm(reward, dtype=torch.float32)
    with pytest.raises(ModelError, match="no trained `score` head"):
        load_scalar_model(policy, dtype=torch.float32)


def test_a_reward_model_can_be_trained_from_a_policy_s_adapter(policy: str) -> None:
    scalar = load_scalar_model(policy, dtype=torch.float32, new_head=True)
    folded = load_causal_lm(policy, dtype=torch.float32)
    assert torch.equal(scalar.classifier.model.layers[1].mlp.up_proj.weight, folded.model.layers[1].mlp.up_proj.weight)


def test_folding_leaves_a_plain_model(tiny: Any) -> None:
    lm = load_causal_lm(tiny.path, dtype=torch.float32)
    names = [name for name, _ in lm.named_parameters()]
    handle = apply_tuning(lm, TUNING, torch.float32)
    assert merge_tuning(handle) is lm
    assert [name for name, _ in lm.named_parameters()] == names


def test_an_adapter_over_another_base_is_another_one(policy: str, tiny: Any, tmp_path: Path) -> None:
    """A finished stage runs again when what it read has changed."""
    shutil.copytree(tiny.path, tmp_path / "base")
    changed_config(policy, base_model_name_or_path=str(tmp_path / "base"))
    before = content_digest(Path(policy), exact=True)
    assert content_digest(Path(policy), exact=True) == before
    (tmp_path / "base" / "config.json").write_text("{}")
    assert content_digest(Path(policy), exact=True) != before


def test_a_folder_with_model_and_adapter_is_refused(policy: str, tiny: Any, tmp_path: Path) -> None:
    """transformers would put the adapter in by itself, and nothing of ours would know of it."""
    shutil.copytree(tiny.path, tmp_path / "both")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copy(Path(policy) / name, tmp_path / "both")
    assert adapter_folder(str(tmp_path / "both")) is None
    with pytest.raises(ModelError, match="holds a model and an adapter"):
        load_causal_lm(str(tmp_path / "both"), dtype=torch.float32)


def test_a_dry_run_knows_whose_adapter_it_is(stage_config: Callable[..., Any], policy: str, reward: str) -> None:
    describe("ppo", stage_config("ppo", **LORA, reward_model=reward), quiet=True)
    with pytest.raises(ModelError, match="no trained `score` head"):
        describe("ppo", stage_config("ppo", **LORA, reward_model=policy), quiet=True)
    with pytest.raises(ModelError, match="adapter of a reward model, not of a policy"):
        describe("ppo", stage_config("ppo", model=reward), quiet=True)
    (Path(reward) / WEIGHTS_FILE).unlink()
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        describe("ppo", stage_config("ppo", **LORA, reward_model=reward), quiet=True)
