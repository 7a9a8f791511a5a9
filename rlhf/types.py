"""The records that travel between stages, and the letters that name tensor axes.

Letters
    B  sequences (rows of a batch)
    T  tokens, on one aligned axis: prompt and response together
    V  vocabulary            H  hidden units            N  action tokens of a batch, flattened
    K  completions ranked per prompt                    G  rollouts per prompt

`x_BT[b, t]` always speaks of token `tokens_BT[b, t]`:
    `logprobs_BT[b, t] = log pi(tokens_BT[b, t] | tokens_BT[b, :t])`, `values_BT[b, t] = V(tokens_BT[b, :t])`.
`action_mask_BT` is True exactly where the policy sampled the token. A mask is carried, never inferred from a pad id.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor


class Message(TypedDict):
    """One turn of a chat; `role` is system, user or assistant."""

    role: str
    content: str


Prompt = str | list[Message]
"""Plain text (TRL's standard format) or the turns of a chat (TRL's conversational format)."""


class StopReason(enum.StrEnum):
    """Why a rollout ended."""

    EOS = "eos"
    STOP = "stop"  # a stop string: its tokens stay actions, the text leaves it out
    LENGTH = "length"

    @property
    def finished(self) -> bool:
        """Whether the answer came to its end, rather than to that of the budget."""
        return self is not StopReason.LENGTH


@dataclass
class Rollout:
    """One sampled response; a row of the rollout buffer.

    `tokens`, `action_mask` and `logprobs` have the same length: the prompt and the response, without padding.
    `logprobs` are those of the sampler, in nats, 0 on tokens that are not actions. `score` is None before it was
    scored, and stays so where no score could be had: PPO then leaves the rollout out, a 0 would be a reward.
    `score_std` is the disagreement of an ensemble's members over the score, None where there is one model.
    """

    prompt: Prompt
    response: str
    tokens: list[int]
    action_mask: list[bool]
    logprobs: list[float]
    stop: StopReason
    prompt_id: str = ""
    score: float | None = None
    gold_score: float | None = None
    policy: str = ""
    step: int = 0
    score_std: float | None = None

    @property
    def response_tokens(self) -> list[int]:
        """The sampled tokens alone, a sampled EOS included."""
        return [token for token, action in zip(self.tokens, self.action_mask, strict=True) if action]


def _unfilled() -> Tensor:
    """What stands for a tensor that a later step fills in."""
    return torch.empty(0)


@dataclass
class RolloutBatch:
    """Padded tensors of `B` rollouts on one time axis; what PPO works on. Filled in stage by stage."""

    tokens_BT: Tensor
    attention_mask_BT: Tensor
    action_mask_BT: Tensor
    scores_B: Tensor
    truncated_B: Tensor
    sampler_logprobs_BT: Tensor
    logprobs_BT: Tensor = field(default_factory=_unfilled)
    ref_logprobs_BT: Tensor = field(default_factory=_unfilled)
    entropy_BT: Tensor = field(default_factory=_unfilled)
    values_BT: Tensor = field(default_factory=_unfilled)
    rewards_BT: Tensor = field(default_factory=_unfilled)
    advantages_BT: Tensor = field(default_factory=_unfilled)
    returns_BT: Tensor = field(default_factory=_unfilled)

    def __len__(self) -> int:
        return self.tokens_BT.shape[0]

    def select(self, rows: Tensor) -> RolloutBatch:
        """The given rows, cut to the longest of them; what is not filled in yet stays so."""
        longest = int(self.attention_mask_BT[rows].sum(1).max())
        picked = {}
        for f in fields(self):
            value: Tensor = getattr(self, f.name)
            if value.numel():
                value = value[rows][:, :longest] if value.dim() == 2 else value[rows]
            picked[f.name] = value
        return RolloutBatch(**picked)

    def to(self, device: torch.device | str) -> RolloutBatch:
        """A copy whose tensors live on `device`."""
        return RolloutBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass
class Preference:
    """`chosen` was preferred to `rejected` with probability `probability` (1.0: a hard label)."""

    prompt: Prompt
    chosen: str
    rejected: str
    probability: float = 1.0
    margin: float = 0.0
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Ranking:
    """`K` responses to one prompt. `ranks[i]` is the rank of `responses[i]`, 1 the best, ties allowed.

    `wins[i][j]`, when known, is the aggregated probability that response i beats response j (diagonal 0.5).
    `tokens`, when the responses come from the rollout buffer, hold prompt + response as sampled.
    `margin`, when given, is the lead in score asked of every pair's better side (Touvron et al. 2023).
    """

    prompt: Prompt
    responses: list[str]
    ranks: list[int]
    wins: list[list[float]] | None = None
    tokens: list[list[int]] | None = None
    gold_scores: list[float] | None = None
    prompt_id: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
    margin: float | None = None


@dataclass
class Rating:
    """A number for one response, the higher the better, on a scale that the data set alone knows."""

    prompt: Prompt
    response: str
    rating: float
    prompt_id: str = ""


class RewardFn(Protocol):
    """Scores finished rollouts, None where it cannot; the only thing PPO knows about rewards."""

    def __call__(self, rollouts: Sequence[Rollout], /) -> Sequence[float | None]: ...


class KLController(Protocol):
    """The coefficient of the KL penalty, and how it changes."""

    coef: float

    def update(self, mean_kl: float, n: int) -> None: ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


class Ranks(Protocol):
    """The processes that save together, as one of them sees it (`rlhf.runtime.Runtime` is one)."""

    rank: int
    world_size: int

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """The ranks' lists joined, in rank order, on every rank."""
        ...


class Alone:
    """One process."""

    rank, world_size = 0, 1

    def gather_objects(self, values: list[Any]) -> list[Any]:
        """The list itself."""
        return values


@dataclass
class RunResult:
    """What a stage leaves: its folder, its headline numbers, and the files the next stage reads."""

    run_dir: str
    summary: dict[str, Any]
    outputs: dict[str, str] = field(default_factory=dict)
