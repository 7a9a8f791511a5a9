"""What is trained, with which decay and learning rate, and that folding adapters in changes no function."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlhf.config_schema import OptimConfig, TuningConfig
from rlhf.errors import ConfigError
from rlhf.models.load import load_causal_lm, load_sequence_classifier
from rlhf.models.tuning import (
    apply_tuning,
    build_optimizer,
    load_trainable,
    lr_factor,
    merge_tuning,
    parameter_groups,
    set_lr,
    storage_dtype,
    trainable_tensors,
)

LORA = TuningConfig(kind="lora", rank=4, alpha=8)
TOKENS = torch.tensor([[2, 9, 12, 15, 3]])


def perturb(model: Any) -> None:
    """LoRA starts as the identity (B = 0); a function to fold in needs weights."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


@pytest.fixture
def lm(tiny: Any) -> Any:
    return load_causal_lm(tiny.path, dtype=torch.float32).eval()


@pytest.fixture
def classifier(tiny: Any) -> Any:
    return load_sequence_classifier(tiny.reward, dtype=torch.float32).eval()


def test_full_tuning_trains_everything(lm: Any) -> None:
    lm.requires_grad_(False)
    assert apply_tuning(lm, TuningConfig(), torch.float32) is lm
    assert all(p.requires_grad for p in lm.parameters())
    assert merge_tuning(lm) is lm


def test_lora_trains_adapters_alone_and_not_the_head_of_a_language_model(lm: Any) -> None:
    apply_tuning(lm, LORA, torch.float32)
    names = [name for name, p in lm.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 7  # layers x (A, B) x (q, k, v, o, gate, up, down)
    assert all("lora_" in name for name in names)


def test_lora_trains_the_score_head_of_a_classifier_too(classifier: Any) -> None:
    apply_tuning(classifier, LORA, torch.float32, head=classifier.score)
    names = [name for name, p in classifier.named_parameters() if p.requires_grad]
    assert [name for name in names if "lora_" not in name] == ["score.weight"]
    assert len(names) == 28 + 1


def test_lora_starts_as_the_same_function(lm: Any) -> None:
    with torch.no_grad():
        before = lm(TOKENS).logits
        apply_tuning(lm, LORA, torch.float32)
        assert torch.equal(lm(TOKENS).logits, before)


@pytest.mark.parametrize("kind", ["lm", "classifier"])
def test_merging_gives_the_same_function_with_plain_names(request: Any, kind: str) -> None:
    model = request.getfixturevalue(kind)
    names = set(model.state_dict())
    handle = apply_tuning(model, LORA, torch.float32, head=getattr(model, "score", None))
    torch.manual_seed(0)
    with torch.no_grad():
        before = model(TOKENS).logits
        perturb(model)
        adapted = model(TOKENS).logits
        merged = merge_tuning(handle)
        assert not torch.allclose(adapted, before, atol=1e-2)
        torch.testing.assert_close(merged(TOKENS).logits, adapted, atol=1e-4, rtol=0)
    assert set(merged.state_dict()) == names


def test_unknown_target_modules_are_a_configuration_error(lm: Any) -> None:
    with pytest.raises(ConfigError, match="target_modules"):
        apply_tuning(lm, TuningConfig(kind="lora", target_modules=["nowhere"]), torch.float32)


def test_trained_weights_are_stored_in_float32_frozen_ones_as_asked() -> None:
    assert storage_dtype(TuningConfig(), torch.bfloat16) is torch.float32
    assert storage_dtype(LORA, torch.bfloat16) is torch.bfloat16


def test_adapters_and_head_are_float32_over_a_bf16_model(tiny: Any) -> None:
    model = load_sequence_classifier(tiny.reward, dtype=torch.bfloat16)
    apply_tuning(model, LORA, torch.float32, head=model.score)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_what_is_trained_comes_back(lm: Any) -> None:
    apply_tuning(lm, LORA, torch.float32)
    perturb(lm)
    saved = {name: tensor.clone() for name, tensor in trainable_tensors(lm).items()}
    perturb(lm)
    load_trainable(lm, saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainable_tensors(lm).items())


def test_matrices_decay_norms_and_scalar_heads_do_not(classifier: Any) -> None:
    decayed, plain = parameter_groups(classifier, lr=1e-3, weight_decay=0.1)
    names = {id(p): name for name, p in classifier.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    undecayed = {names[id(p)] for p in plain["params"]}
    assert undecayed == {n for n in names.values() if "norm" in n} | {"score.weight"}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert {group["base_lr"] for group in (decayed, plain)} == {1e-3}


def test_frozen_parameters_are_in_no_group(classifier: Any) -> None:
    apply_tuning(classifier, LORA, torch.float32, head=classifier.score)
    groups = parameter_groups(classifier, lr=1e-3, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == 29


# --- learning rate --------------------------------------------------------------------------------------------


def factors(total: int, **optim: Any) -> list[float]:
    return [lr_factor(OptimConfig(lr=1.0, **optim), step, total) for step in range(total)]


def test_linear_by_hand() -> None:
    assert factors(4) == [1.0, 0.75, 0.5, 0.25]


def test_warm_up_by_hand() -> None:
    # 2 of 8 steps rise to 1/3 and 2/3; the other 6 fall from 1 by sixths
    assert factors(8, warmup_fraction=0.25) == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_cosine_by_hand() -> None:
    assert factors(4, schedule="cosine") == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )


def test_constant() -> None:
    assert factors(3, schedule="constant") == [1.0, 1.0, 1.0]
    assert factors(4, schedule="constant", warmup_fraction=0.5) == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
def test_no_step_is_wasted(schedule: Any, warmup: float) -> None:
    for total in (1, 2, 7, 100):
        assert all(0 < f <= 1 for f in factors(total, schedule=schedule, warmup_fraction=warmup))


def test_every_group_keeps_its_own_rate() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    other = torch.nn.Parameter(torch.ones(2))
    groups = [
        {"params": [p], "lr": lr, "base_lr": lr, "weight_decay": 0.0} for p, lr in ((weight, 1e-3), (other, 1e-2))
    ]
    cfg = OptimConfig(lr=1e-3, betas=(0.8, 0.9), eps=1e-6)
    optimizer = build_optimizer(groups, cfg)
    assert set_lr(optimizer, cfg, step=1, total=4) == pytest.approx(7.5e-4)
    assert set_lr(optimizer, cfg, step=2, total=4) == pytest.approx(5e-4)  # from the base, not from the last
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-3])
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.8, 0.9), 1e-6)}


def test_a_role_that_waits_goes_through_its_whole_schedule_afterwards() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": 1.0, "base_lr": 1.0, "role": role} for role in ("policy", "critic")]
    optimizer, cfg = torch.optim.AdamW(groups), OptimConfig(lr=1.0, warmup_fraction=0.0, schedule="linear")
    rates = []
    for step in range(6):
        set_lr(optimizer, cfg, step, 6, delay={"policy": 2})
        rates.append(tuple(group["lr"] for group in optimizer.param_groups))
    assert [policy for policy, _ in rates] == pytest.approx([0, 0, 1, 3 / 4, 2 / 4, 1 / 4])
    assert [critic for _, critic in rates] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
