"""Sampling from a causal language model: batched, KV-cached, log-probabilities taken while sampling.

The prompt is read once for all of its completions, finished rows leave the batch, and a token is drawn by
inverting the cumulative distribution: `torch.multinomial` over 49,152 entries is an order of magnitude slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.types import StopReason

_COMPACT_SHARE = 5
"""Finished rows leave once they are a fifth of the batch: moving the cache costs more than a few idle rows."""


@dataclass
class Completion:
    """Sampled tokens (a sampled EOS included) and their log-probabilities in nats."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop: StopReason = StopReason.LENGTH


@dataclass(frozen=True)
class GenerationSettings:
    """How to sample; `eos_ids` end an answer, `max_new_tokens` is the budget."""

    eos_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int = 32


def draw(probabilities_BV: Tensor, generator: torch.Generator) -> Tensor:
    """One index per row by inverse CDF: the first v with `sum(p[:v + 1]) > u`, u uniform on [0, sum(p)).

    float32 sums of 49,152 terms are off by about 1e-6, which moves a draw with that probability.
    """
    cdf_BV = probabilities_BV.cumsum(1)
    u_B1 = torch.rand(len(cdf_BV), 1, generator=generator, device=cdf_BV.device) * cdf_BV[:, -1:]
    index_B = torch.searchsorted(cdf_BV, u_B1, right=True).squeeze(1)
    # Rounding can make u equal to the total; the last index with any probability is the answer then.
    last_B = (
        cdf_BV.shape[1] - 1 - (probabilities_BV.flip(1) > 0).int().argmax(1)
        if bool((index_B >= cdf_BV.shape[1]).any())
        else None
    )
    return index_B if last_B is None else torch.minimum(index_B, last_B)


@torch.no_grad()
def generate(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    generator: torch.Generator,
    copies: int = 1,
    on_tokens: Callable[[int], None] = lambda n: None,
) -> list[Completion]:
    """Sample `copies` completions of each prompt; result `[i * copies + k]` is the k-th of prompt i.

    Args:
        lm: a causal language model of transformers, in evaluation mode.
        prompts: token ids, at least one each.
        generator: of the model's device; the only source of chance.
        on_tokens: told the number of new tokens after every decoding step.
    """
    prompts_per_batch = max(1, settings.batch_size // copies)
    # Prompts of similar length share a batch, so that little padding is read.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[Completion] = [Completion() for _ in range(len(prompts) * copies)]
    for start in range(0, len(order), prompts_per_batch):
        chosen = order[start : start + prompts_per_batch]
        rows = [results[i * copies + k] for i in chosen for k in range(copies)]
        _generate_batch(lm, [prompts[i] for i in chosen], rows, settings, generator, on_tokens)
    return results


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(p) for p in prompts)
    tokens_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        tokens_BT[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[i, longest - len(prompt) :] = 1
    return tokens_BT.to(device), mask_BT.to(device)


def _prefill(lm: Any, prompts: Sequence[Sequence[int]], copies: int) -> tuple[Tensor, Any, Tensor]:
    """Read each prompt once; then repeat logits, cache and mask for its completions."""
    from transformers import DynamicCache

    tokens_BT, mask_BT = _left_padded(prompts, lm.device)
    output = lm(
        input_ids=tokens_BT,
        attention_mask=mask_BT,
        position_ids=(mask_BT.cumsum(1) - 1).clamp(min=0),
        past_key_values=DynamicCache(config=lm.config),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    return output.logits[:, -1].repeat_interleave(copies, 0), cache, mask_BT.repeat_interleave(copies, 0)


def _generate_batch(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    rows: list[Completion],
    settings: GenerationSettings,
    generator: torch.Generator,
    on_tokens: Callable[[int], None],
) -> None:
    """Fill `rows` (prompt-major) token by token until all have ended or the budget is spent."""
    logits_BV, cache, mask_BT = _prefill(lm, prompts, len(rows) // len(prompts))
    eos = torch.tensor(settings.eos_ids, device=lm.device)
    done_B = torch.zeros(len(rows), dtype=torch.bool, device=lm.device)
    for step in range(settings.max_new_tokens):
        logprobs_BV = torch.log_softmax(logits_BV.float() / settings.temperature, dim=-1)
        tokens_B = draw(logprobs_BV.exp(), generator)
        finished_B = torch.isin(tokens_B, eos) & ~done_B
        _record(rows, tokens_B, logprobs_BV.gather(1, tokens_B[:, None]).squeeze(1), finished_B, done_B)
        on_tokens(len(rows) - int(done_B.sum()))
        if bool((finished_B | done_B).all()) or step + 1 == settings.max_new_tokens:
            return
        done_B |= finished_B
        if int(done_B.sum()) * _COMPACT_SHARE >= len(rows):
            alive = (~done_B).nonzero().squeeze(1)
            rows = [rows[i] for i in alive.tolist()]
            cache.batch_select_indices(alive)
            tokens_B, mask_BT, done_B = tokens_B[alive], mask_BT[alive], done_B[alive]
        mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=1)
        positions_B1 = mask_BT.sum(1, keepdim=True) - 1
        logits_BV = lm(
            input_ids=tokens_B[:, None],
            attention_mask=mask_BT,
            position_ids=positions_B1,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]


def _record(rows: list[Completion], tokens_B: Tensor, logprobs_B: Tensor, finished_B: Tensor, done_B: Tensor) -> None:
    """Append to every row that has not ended before this token."""
    columns = zip(tokens_B.tolist(), logprobs_B.tolist(), finished_B.tolist(), done_B.tolist(), strict=True)
    for row, (token, logprob, finished, done) in zip(rows, columns, strict=True):
        if done:
            continue
        row.tokens.append(token)
        row.logprobs.append(logprob)
        if finished:
            row.stop = StopReason.EOS
