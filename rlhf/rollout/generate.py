"""Sampling from a causal language model: batched, KV-cached, log-probabilities taken while sampling.

The prompt is read once for all of its completions, finished rows leave the batch, and a token is drawn by
inverting the cumulative distribution: `torch.multinomial` over 49,152 entries is an order of magnitude slower. What
runs the model, one token at a time, is in `decode.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.rollout.decode import decoder_for
from rlhf.types import StopReason

_BLOCK = 128
"""Vocabulary entries whose weights are added up before the draw."""
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


def draw(weights_BV: Tensor, generator: torch.Generator) -> Tensor:
    """One index per row by inverse CDF: the first v with `sum(w[:v + 1]) > u`, u uniform on [0, sum(w)).

    The weights need not add up to 1. First the block that u falls into is found, then the place in it: cumulative
    sums over the whole vocabulary would be passes over memory that the sums of blocks make needless.

    float32 sums of 49,152 terms are off by about 1e-6, which moves a draw with that probability.
    """
    vocabulary = weights_BV.shape[1]
    blocks_BNW = torch.nn.functional.pad(weights_BV, (0, -vocabulary % _BLOCK)).unflatten(1, (-1, _BLOCK))
    sums_BN = blocks_BNW.sum(2)
    ends_BN = sums_BN.cumsum(1)
    u_B1 = torch.rand(len(ends_BN), 1, generator=generator, device=ends_BN.device) * ends_BN[:, -1:]
    block_B1 = _first_beyond(ends_BN, u_B1, sums_BN)
    inner_BW = blocks_BNW.gather(1, block_B1[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
    before_B1 = (ends_BN - sums_BN).gather(1, block_B1)
    return (block_B1 * _BLOCK + _first_beyond(inner_BW.cumsum(1), u_B1 - before_B1, inner_BW)).squeeze(1)


def _first_beyond(ends_BN: Tensor, u_B1: Tensor, weights_BN: Tensor) -> Tensor:
    """First index whose end is above u; where rounding left u at the total, the last index with any weight. [B, 1]"""
    index_B1 = torch.searchsorted(ends_BN, u_B1, right=True)
    if bool((index_B1 >= ends_BN.shape[1]).any()):
        last_B1 = ends_BN.shape[1] - 1 - (weights_BN.flip(1) > 0).int().argmax(1, keepdim=True)
        index_B1 = torch.minimum(index_B1, last_B1)
    return index_B1


def sample_tokens(logits_BV: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens_B, their log-probabilities in nats) at `temperature`, in float32."""
    scaled_BV = logits_BV.float() if temperature == 1.0 else logits_BV.float() / temperature
    highest_B1 = scaled_BV.amax(1, keepdim=True)
    weights_BV = (scaled_BV - highest_B1).exp_()
    tokens_B = draw(weights_BV, generator)
    chosen_B = scaled_BV.gather(1, tokens_B[:, None]).squeeze(1)
    return tokens_B, chosen_B - highest_B1.squeeze(1) - weights_BV.sum(1).log()


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


def _generate_batch(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    rows: list[Completion],
    settings: GenerationSettings,
    generator: torch.Generator,
    on_tokens: Callable[[int], None],
) -> None:
    """Fill `rows` (prompt-major) token by token until all have ended or the budget is spent."""
    decoder = decoder_for(lm)
    logits_BV = decoder.prefill(prompts, len(rows) // len(prompts), settings.max_new_tokens)
    eos = torch.tensor(settings.eos_ids, device=logits_BV.device)
    done_B = torch.zeros(len(rows), dtype=torch.bool, device=logits_BV.device)
    for step in range(settings.max_new_tokens):
        tokens_B, logprobs_B = sample_tokens(logits_BV, settings.temperature, generator)
        finished_B = torch.isin(tokens_B, eos) & ~done_B
        _record(rows, tokens_B, logprobs_B, finished_B, done_B)
        on_tokens(len(rows) - int(done_B.sum()))
        done_B |= finished_B
        done = int(done_B.sum())
        if done == len(rows) or step + 1 == settings.max_new_tokens:
            return
        if done * _COMPACT_SHARE >= len(rows):
            alive = (~done_B).nonzero().squeeze(1)
            rows = [rows[i] for i in alive.tolist()]
            decoder.keep(alive)
            tokens_B, done_B = tokens_B[alive], done_B[alive]
        logits_BV = decoder.step(tokens_B)


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
