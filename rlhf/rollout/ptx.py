"""PPO-ptx (Ouyang 2022): pretraining texts mixed into the updates, against what alignment would make a model forget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf.config_schema import PPOStage
from rlhf.data.order import rows_for_step
from rlhf.data.records import read_demonstrations
from rlhf.data.templates import located, prompt_tokens, response_tokens
from rlhf.functional.masked import masked_sum
from rlhf.rollout.buffer import RolloutBuffer, micro_batch_rows
from rlhf.runtime import Runtime
from rlhf.types import Rollout, StopReason


def load_ptx(cfg: PPOStage, tokenizer: Any) -> list[Rollout]:
    """Pretraining texts as rollouts whose every response token counts (PPO-ptx, Ouyang 2022); [] when off."""
    if cfg.ptx is None:
        return []
    rows = []
    for record in read_demonstrations(cfg.ptx):
        prompt = located(record.where, prompt_tokens, tokenizer, record.prompt, chat=cfg.ptx.chat)
        response = response_tokens(tokenizer, record.completion, finished=True)
        mask = [False] * len(prompt) + [True] * len(response)
        rows.append(
            Rollout(record.prompt, record.completion, prompt + response, mask, [0.0] * len(mask), StopReason.EOS)
        )
    return rows


def ptx_texts(ptx: Sequence[Rollout], nth: int, count: int, cfg: PPOStage, runtime: Runtime) -> list[Rollout]:
    """This rank's `count` texts for the run's `nth` optimizer step: other ones each time, all of them in turn."""
    if not ptx:
        return []
    rows = rows_for_step(nth, count, len(ptx), seed=cfg.seed, rank=runtime.rank, world_size=runtime.world_size)
    return [ptx[i] for i in rows]


def add_ptx_gradients(actor_critic: Any, texts: Sequence[Rollout], cfg: PPOStage, runtime: Runtime) -> None:
    """The gradient of `ptx_coef` x mean negative log-likelihood of `texts` (Ouyang 2022, equation 2).

    The last one of an optimizer step: ranks exchange gradients with its last micro-batch.
    """
    batch = RolloutBuffer(texts).batch(runtime.device)
    denominator = runtime.denominator(int(batch.action_mask_BT.sum()))
    lengths_B = batch.attention_mask_BT.sum(1).cpu()
    parts = micro_batch_rows(torch.arange(len(texts)), lengths_B, cfg.micro_batch_size)
    for i, rows in enumerate(parts):
        part = batch.select(rows)
        with runtime.accumulate(actor_critic, last=i + 1 == len(parts)):
            with runtime.autocast():
                logprobs_BT, _, values_BT = actor_critic(part.tokens_BT, part.attention_mask_BT, part.action_mask_BT)
            loss = -cfg.ptx_coef * masked_sum(logprobs_BT, part.action_mask_BT) / denominator
            # The critic's zeros: every parameter must take part in the ranks' gradient exchange.
            runtime.backward(loss + 0.0 * values_BT.sum())
