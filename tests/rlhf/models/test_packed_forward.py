"""The packed forward against transformers' own: hidden states and every gradient; and which models it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import LLAMA_SHAPE as SHAPE
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from reward_model.packing import pack
from rlhf.config_schema import TuningConfig
from rlhf.models import packed_forward
from rlhf.models.load import load_causal_lm
from rlhf.models.policy import hidden_states
from rlhf.models.roles import recompute_activations
from rlhf.models.tuning import apply_tuning, lora_layers

ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
PACKED = {
    "llama": LlamaConfig(**SHAPE),
    "scaled rope": LlamaConfig(**SHAPE, rope_parameters=ROPE),
    "one key head, biases": LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}, attention_bias=True, mlp_bias=True),
    "qwen2 (biases)": Qwen2Config(**SHAPE),
    "qwen3 (norms of queries and keys)": Qwen3Config(**SHAPE),
    "mistral without a window": MistralConfig(**SHAPE, sliding_window=None),
}
OTHERS = {
    "gemma (norms times 1 + w, other activation)": GemmaConfig(**SHAPE),
    "sliding window": MistralConfig(**SHAPE, sliding_window=4),
    "gpt2": GPT2Config(vocab_size=60, n_positions=64, n_embd=32, n_layer=2, n_head=4),
}
LENGTHS = [7, 3, 5]


def model(config: Any) -> Any:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return lm


def rows(*, left: bool = False) -> tuple[Tensor, Tensor]:
    width = max(LENGTHS)
    column_T = torch.arange(width)
    lengths_B1 = torch.tensor(LENGTHS)[:, None]
    mask = column_T >= width - lengths_B1 if left else column_T < lengths_B1
    return torch.randint(1, 60, mask.shape, generator=torch.Generator().manual_seed(1)), mask


def both(lm: Any, monkeypatch: pytest.MonkeyPatch, *inputs: Tensor, real: Tensor) -> list[tuple[Tensor, dict]]:
    """(states of the real tokens, gradient of every trained parameter), packed and through transformers."""
    backbone = lm.base_model if not hasattr(lm, "model") else lm.model
    weights = torch.randn(int(real.sum()), 32, generator=torch.Generator().manual_seed(2))
    results = []
    for packs in (True, False):
        if not packs:
            monkeypatch.setattr("rlhf.models.policy.runs_packed", lambda *_: False)
        lm.zero_grad()
        states = hidden_states(backbone, *inputs)[real]
        (states * weights).sum().backward()
        results.append((states.detach(), {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}))
    return results


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", PACKED)
def test_states_and_gradients_are_those_of_transformers(name: str, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model(PACKED[name])
    tokens, mask = rows(left=left)
    assert packed_forward.runs_packed(lm.model, tokens.shape[1])
    ours, theirs = both(lm, monkeypatch, tokens, mask, real=mask)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)
    assert len(ours[1]) == len([n for n, _ in lm.named_parameters() if "lm_head" not in n])


def test_packed_answers_of_the_reward_model(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model(PACKED["llama"])
    packed = pack([[[2, 9, 12, 5], [2, 9, 30], [2, 9, 12, 14, 15]], [[7, 8, 3], [7, 8, 4]]])
    real = torch.zeros_like(packed.tokens_BS, dtype=torch.bool)
    real[packed.row_N, packed.last_N] = True
    inputs = (packed.tokens_BS, packed.mask_B1SS, packed.positions_BS)
    ours, theirs = both(lm, monkeypatch, *inputs, real=real)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_adapters_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model(PACKED["llama"])
    apply_tuning(lm, TuningConfig(kind="lora", rank=4), torch.float32)
    with torch.no_grad():
        for layer in lora_layers(lm):
            layer.lora_B["default"].weight.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    tokens, mask = rows()
    ours, theirs = both(lm, monkeypatch, tokens, mask, real=mask)
    assert ours[1]
    assert all("lora" in name for name in ours[1])
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_recomputed_activations_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model(PACKED["llama"])
    tokens, mask = rows()
    plain, _ = both(lm, monkeypatch, tokens, mask, real=mask)
    monkeypatch.undo()
    calls: list[Any] = []
    real_checkpoint = packed_forward.checkpoint
    monkeypatch.setattr(packed_forward, "checkpoint", lambda *a, **k: calls.append(a) or real_checkpoint(*a, **k))
    recompute_activations(lm)
    again, _ = both(lm, monkeypatch, tokens, mask, real=mask)
    assert len(calls) == 3
    torch.testing.assert_close(again, plain)


@torch.no_grad()
def test_padding_is_never_read() -> None:
    lm = model(PACKED["llama"])
    tokens, mask = rows()
    other = tokens.masked_fill(~mask, 59)
    assert torch.equal(hidden_states(lm.model, tokens, mask)[mask], hidden_states(lm.model, other, mask)[mask])


@torch.no_grad()
def test_autocast_rounds_as_transformers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = model(PACKED["llama"])
    tokens, mask = rows()
    exact = hidden_states(lm.model, tokens, mask)[mask]
    errors = []
    for packs in (True, False):
        if not packs:
            monkeypatch.setattr("rlhf.models.policy.runs_packed", lambda *_: False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors.append(float((hidden_states(lm.model, tokens, mask)[mask] - exact).square().mean()))
    assert 0 < errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_run_through_transformers(name: str) -> None:
    lm = model(OTHERS[name])
    assert not packed_forward.runs_packed(getattr(lm, lm.base_model_prefix), 8)


def test_long_rows_run_through_transformers() -> None:
    lm = model(PACKED["llama"])
    assert not packed_forward.runs_packed(lm.model, packed_forward.MAX_WIDTH + 1)


@pytest.mark.model
def test_the_packaged_model_runs_packed_in_bf16_with_and_without_adapters() -> None:
    lm = load_causal_lm("smollm2-135m", dtype=torch.bfloat16)
    assert packed_forward.runs_packed(lm.model, 60)
    adapted = load_causal_lm("smollm2-135m", dtype=torch.bfloat16)
    apply_tuning(adapted, TuningConfig(kind="lora"), torch.bfloat16)
    assert packed_forward.runs_packed(adapted.model, 60)
