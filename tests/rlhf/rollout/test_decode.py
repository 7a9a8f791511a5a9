"""The lean decoder against transformers' own, step by step; and which models it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import LLAMA_SHAPE as SHAPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhf.models.load import load_causal_lm
from rlhf.rollout import decode
from rlhf.rollout.decode import TransformersDecoder, decoder_for, has_llama_shape, shared_prefix
from rlhf.rollout.llama import LlamaDecoder

PROMPTS = [[2, 9, 12], [2, 30], [2, 14, 15, 16, 17, 18]]


def model(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


LLAMAS = {
    "llama": LlamaConfig(**SHAPE),
    "llama3 rope": LlamaConfig(
        **SHAPE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "one key head": LlamaConfig(**{**SHAPE, "num_key_value_heads": 1}, attention_bias=True, mlp_bias=True),
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2 (biases)": Qwen2Config(**SHAPE),
    "qwen3 (norms of queries and keys)": Qwen3Config(**SHAPE),
    "gemma (scaled embeddings)": GemmaConfig(**SHAPE),
    "mistral without a window": MistralConfig(**SHAPE, sliding_window=None),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize("copies", [1, 2])
def test_logits_are_those_of_transformers(name: str, copies: int) -> None:
    """Ragged prompts, several steps, rows that leave in the middle."""
    lm = model(LLAMAS[name])
    assert has_llama_shape(lm)
    decoders = [TransformersDecoder(lm), LlamaDecoder(lm, 8, 8)]
    logits = [decoder.admit(PROMPTS, copies) for decoder in decoders]
    torch.testing.assert_close(logits[1], logits[0])
    generator = torch.Generator().manual_seed(1)
    rows = len(PROMPTS) * copies
    for step in range(8):
        tokens_B = torch.randint(0, 60, (rows,), generator=generator)
        logits = [decoder.step(tokens_B) for decoder in decoders]
        torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
        if step in (2, 4):
            alive = torch.arange(rows)[torch.arange(rows) != step % rows]
            rows = len(alive)
            for decoder in decoders:
                decoder.keep(alive)


@torch.no_grad()
def test_rows_that_join_and_leave_see_their_own_tokens_only() -> None:
    """Every row's logits are those of its own sequence read anew, through joins, leaves, moves and wider caches."""
    lm, budget = model(LLAMAS["llama"]), 6
    decoder = LlamaDecoder(lm, 2, budget)
    generator = torch.Generator().manual_seed(2)
    queue = [torch.randint(0, 60, (n,), generator=generator).tolist() for n in (3, 3, 1, 4, 6, 2, 5, 12, 3, 30)]
    rows: list[list[int]] = []
    began: list[int] = []
    last = torch.zeros(0, 60)
    for turn in range(60):
        if turn % 2 == 0 and queue:
            new = [queue.pop() if turn % 4 else queue.pop(0)]
            last = torch.cat((last, decoder.admit(new, 1)))
            rows, began = rows + new, [*began, len(new[0])]
        if not rows:
            break
        for row, logits_V in zip(rows, last, strict=True):
            torch.testing.assert_close(logits_V, lm(torch.tensor([row])).logits[0, -1], atol=1e-4, rtol=1e-4)
        tokens_B = torch.randint(0, 60, (len(rows),), generator=generator)
        rows = [[*row, int(token)] for row, token in zip(rows, tokens_B, strict=True)]
        # Row i stays at most until its budget, every third one shorter; the last rows take the places of the first.
        alive = [i for i, row in enumerate(rows) if len(row) - began[i] < budget - 3 * (began[i] % 3 == 0)][::-1]
        decoder.keep(torch.tensor(alive, dtype=torch.long))
        rows, began, tokens_B = [rows[i] for i in alive], [began[i] for i in alive], tokens_B[alive]
        last = decoder.step(tokens_B) if rows else torch.zeros(0, 60)
    assert not rows
    assert not queue


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [1, 2])
def test_a_prefix_that_is_read_once_changes_no_logits(copies: int, dtype: torch.dtype) -> None:
    """With and without: ragged prompts, one of them the prefix and one token; rows that leave and join; a wider cache.

    In float32 also against every row's own sequence read anew.
    """
    lm, prefix = model(LLAMAS["qwen3 (norms of queries and keys)"]).to(dtype), [2, 9, 12, 5, 30]
    batches = [[[*prefix, 7], [*prefix, 8, 9, 10]], [[*prefix, 11, 12], [*prefix, *range(20, 50)]]]
    decoders = [LlamaDecoder(lm, 3, 9), LlamaDecoder(lm, 3, 9, prefix)]
    generator = torch.Generator().manual_seed(3)
    rows: list[list[int]] = []
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.25, "rtol": 0.05}
    logits = [torch.zeros(0, 60, dtype=dtype)] * 2
    for turn in range(8):
        if turn in (0, 4):
            batch = batches.pop(0)
            rows += [prompt for prompt in batch for _ in range(copies)]
            logits = [torch.cat((x, d.admit(batch, copies))) for x, d in zip(logits, decoders, strict=True)]
        torch.testing.assert_close(logits[1], logits[0], **close)
        if dtype == torch.float32:
            for row, logits_V in zip(rows, logits[1], strict=True):
                torch.testing.assert_close(logits_V, lm(torch.tensor([row])).logits[0, -1], **close)
        tokens_B = torch.randint(0, 60, (len(rows),), generator=generator)
        rows = [[*row, int(token)] for row, token in zip(rows, tokens_B, strict=True)]
        if turn == 2:
            kept = torch.arange(1, len(rows)).flip(0)
            for decoder in decoders:
                decoder.keep(kept)
            rows, tokens_B = [rows[int(i)] for i in kept], tokens_B[kept]
        logits = [decoder.step(tokens_B) for decoder in decoders]


@torch.no_grad()
def test_a_prompt_without_the_prefix_is_refused() -> None:
    decoder = LlamaDecoder(model(LLAMAS["llama"]), 2, 2, [2, 9])
    for prompt in ([2, 8, 7], [2, 9]):
        with pytest.raises(AssertionError, match="begin otherwise"):
            decoder.admit([prompt], 1)


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([[1, 2, 3, 4], [1, 2, 9], [1, 2, 3, 5]], [1, 2]),
        ([[1, 2], [1, 2, 3], [1, 2, 4]], [1]),  # the first needs a token of its own
        ([[1, 2, 3], [1, 2, 3], [1, 2, 3]], [1, 2]),
        ([[1, 2, 3], [1, 2, 4]], []),  # saves 2 tokens: fewer than 3
        ([[5, 2, 3], [1, 2, 3], [1, 2, 4]], []),
        ([[7], [7], [7], [7]], []),
        ([[1, 2, 3, 4, 5, 6]], []),
        ([], []),
    ],
)
def test_the_longest_common_beginning(
    prompts: list[list[int]], shared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_PREFIX_PAYS", 2 if len(prompts) == 3 else 3)
    assert shared_prefix(prompts) == shared


@torch.no_grad()
@pytest.mark.parametrize("kind", [TransformersDecoder, LlamaDecoder])
def test_the_head_reads_rows_that_lie_side_by_side(kind: Any) -> None:
    """Of a strided [B, 1, H] torch makes a batched product, with the head's weight copied for every row."""
    lm = model(LLAMAS["llama"])
    seen: list[bool] = []
    lm.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].is_contiguous()))
    decoder = kind(lm) if kind is TransformersDecoder else kind(lm, 3, 2)
    decoder.admit(PROMPTS, 1)
    decoder.step(torch.tensor([1, 2, 3]))
    assert seen == [True, True]


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SHAPE, sliding_window=4),
        GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    ],
    ids=["sliding window", "gpt2"],
)
def test_other_shapes_decode_through_transformers(config: Any) -> None:
    assert isinstance(decoder_for(model(config), 8, 8), TransformersDecoder)


def test_the_tiny_model_decodes_lean_in_both_precisions(tiny: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert isinstance(decoder_for(load_causal_lm(tiny.path, dtype=dtype), 8, 8), LlamaDecoder)


@pytest.mark.model
@torch.no_grad()
def test_the_packaged_model_decodes_lean_in_bf16() -> None:
    lm = load_causal_lm("smollm2-135m", dtype=torch.bfloat16)
    assert AutoConfig.from_pretrained(lm.config._name_or_path).model_type == "llama"
    assert isinstance(decoder_for(lm, 8, 8), LlamaDecoder)
