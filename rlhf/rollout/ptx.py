"""PPO-ptx (Ouyang 2022): pretraining texts mixed into the updates, against what alignment would make a model forget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlhf.config_schema import PPOStage
from rlhf.data.order import rows_for_step
from rlhf.data.records import read_demonstrations
from rlhf.data.templates import located, prompt_tokens, response_tokens
from rlhf.functional.masked import masked_sum
from rlhf.rollout.buffer import RolloutBuffer
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
    """This rank's pretraining texts for the run's `nth` optimizer step: other ones each time, all of them in turn."""
    if not ptx:
        return []
    rows = rows_for_step(
        nth, min(count, len(ptx)), len(ptx), seed=cfg.seed, rank=runtime.rank, world_size=runtime.world_size
    )
    return [ptx[i] for i in rows]


def ptx_loss(actor_critic: Any, texts: Sequence[Rollout], cfg: PPOStage, runtime: Runtime) -> Tensor:
    """`ptx_coef` x mean negative log-likelihood of pretraining texts (Ouyang 2022, equation 2)."""
    batch = RolloutBuffer(texts).batch(runtime.device)
    with runtime.autocast():
        logprobs_BT, _, values_BT = actor_critic(batch.tokens_BT, batch.attention_mask_BT, batch.action_mask_BT)
    denominator = runtime.denominator(int(batch.action_mask_BT.sum()))
    return -cfg.ptx_coef * masked_sum(logprobs_BT, batch.action_mask_BT) / denominator + 0.0 * values_BT.sum()
