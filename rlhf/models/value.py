"""Scalar models: one number after every token. The critic reads it before a token, the reward model at the last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from rlhf.errors import ModelError
from rlhf.models.adapters import adapter_folder
from rlhf.models.load import load_sequence_classifier, resolve_model
from rlhf.models.policy import hidden_states
from rlhf.models.tuning import backbone_of

NORMALISATION_FILE = "reward_normalisation.json"


class ScalarModel(nn.Module):
    """An `AutoModelForSequenceClassification` with one label, read at every token, shifted and scaled.

    `mean` and `std` are the raw scores' on SFT demonstrations, so that 0 means "as good as a demonstration".
    They are buffers outside of the checkpointed weights; on disk they stand in `reward_normalisation.json`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Any, *, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.classifier = classifier
        self.branch: nn.Module | None = None
        """Computes the hidden states instead of the classifier's own backbone (`models.sharing`)."""
        self.unread_id: int | None = None
        """A token after which no score is read, though it is none of the padding."""
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def set_normalisation(self, mean: float, std: float) -> None:
        """From now on scores are (raw - mean) / std."""
        self.mean.fill_(mean)
        self.std.fill_(std)

    def states(self, tokens_BT: Tensor, attention_mask: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """What the head reads, [B, T, H]; masks as `hidden_states`."""
        if self.branch is not None:
            return self.branch(tokens_BT, attention_mask, positions_BT)
        return hidden_states(backbone_of(self.classifier), tokens_BT, attention_mask, positions_BT)

    def forward(self, tokens_BT: Tensor, attention_mask: Tensor, positions_BT: Tensor | None = None) -> Tensor:
        """Normalised score after reading `tokens_BT[b, :t + 1]`, float32, shape [B, T]; masks as `hidden_states`."""
        hidden_BTH = self.states(tokens_BT, attention_mask, positions_BT)
        raw_BT = read_with(self.classifier.score, hidden_BTH).squeeze(-1)
        return (raw_BT - self.mean) / self.std

    def score_last(self, tokens_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """Normalised score at the last real token but `unread_id`, shape [B], wherever the padding stands."""
        scores_BT = self(tokens_BT, attention_mask_BT)
        if self.unread_id is None:
            return at_last_token(scores_BT, attention_mask_BT)
        return at_last_token(scores_BT, attention_mask_BT.bool() & (tokens_BT != self.unread_id))


def read_with(head: nn.Linear, hidden_BTH: Tensor) -> Tensor:
    """What a head of M scores makes of hidden states, [B, T, M], in float32: in bf16 a score has 3 digits."""
    with torch.autocast(hidden_BTH.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return nn.functional.linear(hidden_BTH.float(), head.weight.float(), bias)


def at_last_token(scores_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """The scores at the last real token of every row, wherever the padding stands: [B], or [B, M] of [B, T, M]."""
    positions_T = torch.arange(attention_mask_BT.shape[1], device=attention_mask_BT.device)
    last_B = (positions_T * attention_mask_BT.long()).argmax(1)
    return scores_BT[torch.arange(len(last_B), device=last_B.device), last_B]


class Critic(nn.Module):
    """`values_BT[b, t] = V(tokens_BT[b, :t])`: the scalar model's output one token earlier; 0 at t = 0."""

    def __init__(self, scalar: ScalarModel) -> None:
        super().__init__()
        self.scalar = scalar

    def forward(self, tokens_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        after_BT = self.scalar(tokens_BT, attention_mask_BT)
        return nn.functional.pad(after_BT[:, :-1], (1, 0))


def load_scalar_model(
    name: str, *, dtype: torch.dtype, new_head: bool = False, keep_adapter: bool = False
) -> ScalarModel:
    """A scalar model with its normalisation, if it comes with one; arguments as `load_sequence_classifier`.

    A trained one that comes without is not of ours. transformers, by which others train and measure theirs, never reads
    a score at the pad token: where that is the EOS, as often, their head knows the token before it.

    Raises:
        ModelError: as `load_sequence_classifier`, or its normalisation cannot be read.
    """
    classifier = load_sequence_classifier(name, dtype=dtype, new_head=new_head, keep_adapter=keep_adapter)
    file = file_beside(name, NORMALISATION_FILE)
    try:
        moments = json.loads(file.read_text()) if file else {}
        scalar = ScalarModel(classifier, mean=float(moments.get("mean", 0.0)), std=float(moments.get("std", 1.0)))
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is damaged ({error})", fix="restore it, or train the reward model again") from None
    if file is None and not new_head:
        scalar.unread_id = classifier.config.pad_token_id
    return scalar


def file_beside(name: str, file: str) -> Path | None:
    """A file of ours in the folder of a model or adapter, or in its repository on the hub; None where there is none."""
    found = cached_file(
        str(adapter_folder(name) or resolve_model(name)),
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None
