"""The policy: log-probabilities of sampled tokens under a causal language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf.functional.logprobs import gather_action_states, scatter_actions, tiled_logprobs_and_entropy
from rlhf.models.packed_forward import Packing, packed_hidden_states, runs_packed
from rlhf.models.tuning import backbone_of


def position_ids(attention_mask_BT: Tensor) -> Tensor:
    """Positions that count real tokens only, so that padding on either side changes nothing."""
    return (attention_mask_BT.long().cumsum(1) - 1).clamp(min=0)


def hidden_states(
    backbone: Any,
    tokens_BT: Tensor,
    attention_mask: Tensor,
    positions_BT: Tensor | None = None,
    *,
    inputs_BTH: Tensor | None = None,
) -> Tensor:
    """Last hidden state of every real token; shape [B, T, H]; undefined on padding.

    A causal model never looks to the right, so padding on the right needs no mask; without one the attention
    kernel is several times faster on a CPU. Its positions then go on through the padding: repeated ones would be
    taken for packed sequences, and a mask made for them.

    Args:
        attention_mask: which tokens are real, [B, T]; or, with `positions_BT`, which token sees which, [B, 1, T, T].
        inputs_BTH: states that go into the first layer instead of the tokens' embeddings.
    """
    if runs_packed(backbone, tokens_BT.shape[1]):
        if positions_BT is None:
            return packed_hidden_states(backbone, tokens_BT, attention_mask, inputs_BTH=inputs_BTH)
        every_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
        packing = Packing(torch.zeros(attention_mask.shape).masked_fill_(~attention_mask, -torch.inf), positions_BT)
        return packed_hidden_states(backbone, tokens_BT, every_BT, packing=packing, inputs_BTH=inputs_BTH)
    given: dict[str, Tensor] = {"input_ids": tokens_BT} if inputs_BTH is None else {"inputs_embeds": inputs_BTH}
    if positions_BT is not None:
        given |= {"attention_mask": attention_mask, "position_ids": positions_BT}
    elif bool((attention_mask[:, 1:] & ~attention_mask[:, :-1]).any()):  # padding on the left
        given |= {"attention_mask": attention_mask.long(), "position_ids": position_ids(attention_mask)}
    return backbone(use_cache=False, **given).last_hidden_state


class Policy(nn.Module):
    """A causal language model whose forward returns what PPO needs, and never a [B, T, V] tensor."""

    def __init__(self, lm: Any, branch: nn.Module | None = None) -> None:
        """`branch`: computes the hidden states instead of the model's own backbone (`models.sharing`)."""
        super().__init__()
        self.lm = lm
        self.branch = branch

    def forward(
        self,
        tokens_BT: Tensor,
        attention_mask_BT: Tensor,
        action_mask_BT: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """`log pi(token_t | tokens_<t)` and the entropy of that distribution (0 if not asked for), in nats; 0 off the
        actions.

        The head runs on action positions only: with a vocabulary of 49,152 it is most of a small model's work.
        """
        if self.branch is not None:
            states_BTH = self.branch(tokens_BT, attention_mask_BT)
        else:
            states_BTH = hidden_states(backbone_of(self.lm), tokens_BT, attention_mask_BT)
        states_NH = gather_action_states(states_BTH, action_mask_BT)
        head = self.lm.get_output_embeddings()
        logprobs_N, entropy_N = tiled_logprobs_and_entropy(
            states_NH,
            head.weight,
            tokens_BT[action_mask_BT],
            temperature=temperature,
            bias_V=getattr(head, "bias", None),
            with_entropy=with_entropy,
        )
        return scatter_actions(logprobs_N, action_mask_BT), scatter_actions(entropy_N, action_mask_BT)


class ActorCritic(nn.Module):
    """Policy and critic under one roof, so that one engine, one optimizer and one gradient clip serve both."""

    def __init__(self, policy: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def forward(
        self,
        tokens_BT: Tensor,
        attention_mask_BT: Tensor,
        action_mask_BT: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logprobs_BT, entropy_BT, values_BT), each 0 off the actions."""
        logprobs_BT, entropy_BT = self.policy(
            tokens_BT, attention_mask_BT, action_mask_BT, temperature=temperature, with_entropy=with_entropy
        )
        values_BT = self.critic(tokens_BT, attention_mask_BT).masked_fill(~action_mask_BT, 0.0)
        return logprobs_BT, entropy_BT, values_BT
