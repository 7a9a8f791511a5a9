"""The trained reward model at work: load, save, score rollouts; and the same layout for plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf.checkpoint import export_folder
from rlhf.models.load import require_same_tokens
from rlhf.models.sharing import Share, keep_apart
from rlhf.models.value import NORMALISATION_FILE, ScalarModel, load_scalar_model
from rlhf.rollout.buffer import micro_batch_rows, pad_right
from rlhf.runtime import Runtime
from rlhf.types import Rollout


class RewardModel:
    """A frozen scalar model as a `RewardFn`: it reads the very tokens that the policy sampled, EOS included."""

    def __init__(
        self,
        scalar: ScalarModel,
        runtime: Runtime,
        *,
        micro_batch_size: int = 16,
        micro_batch_tokens: int | None = None,
    ) -> None:
        self._scalar = runtime.freeze(scalar)
        self._runtime = runtime
        self._limits = micro_batch_size, micro_batch_tokens

    @classmethod
    def load(
        cls,
        name: str,
        runtime: Runtime,
        *,
        tokenizer: Any,
        micro_batch_size: int = 16,
        micro_batch_tokens: int | None = None,
        share: Share = keep_apart,
    ) -> RewardModel:
        """Load a reward model that shares the policy's tokenizer, and weights where `share` finds equal ones.

        Args:
            name: folder or hub id; the folder of an adapter, too, which stays one, over its unchanged base.

        Raises:
            ModelError: not a trained one-label classifier, or its tokens mean something else than the policy's.
        """
        require_same_tokens(name, tokenizer, role="reward model")
        scalar = load_scalar_model(name, dtype=runtime.dtype, keep_adapter=True)
        scalar.requires_grad_(False).to(runtime.device)
        share(scalar)
        runtime.shard(scalar.eval())
        return cls(scalar, runtime, micro_batch_size=micro_batch_size, micro_batch_tokens=micro_batch_tokens)

    @property
    def branch(self) -> nn.Module | None:
        """What it has of its own, where it stands on layers of others (`models.sharing`)."""
        return self._scalar.branch

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Normalised score of each rollout at its last real token."""
        return self.score_tokens([r.tokens for r in rollouts])

    @torch.no_grad()
    def score_tokens(
        self, rows: Sequence[Sequence[int]], on_rows: Callable[[int], None] = lambda n: None
    ) -> list[float]:
        """Normalised scores of prompt + response token rows; neighbours in length are read together."""
        lengths_B = torch.tensor([len(row) for row in rows], dtype=torch.long)
        scores = [0.0] * len(rows)
        parts = [part_B.tolist() for part_B in micro_batch_rows(torch.arange(len(rows)), lengths_B, *self._limits)]
        for part in self._runtime.in_step(parts, filler=[]):
            tokens_BT, mask_BT = pad_tokens([rows[i] for i in part] or [[0]])
            device = self._runtime.device
            with self._runtime.autocast():
                scores_B = self._scalar.score_last(tokens_BT.to(device), mask_BT.to(device))
            for i, score in zip(part, scores_B.tolist(), strict=False):
                scores[i] = score
            on_rows(len(part))
        return scores


def pad_tokens(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens_BT, attention_mask_BT) padded on the right."""
    return pad_right(rows, 0, torch.long), pad_right([[True] * len(row) for row in rows], False, torch.bool)


def save_reward_model(folder: Path, classifier: Any, tokenizer: Any, normalisation: dict[str, Any]) -> None:
    """Write an `AutoModelForSequenceClassification` folder with its normalisation beside it, atomically.

    transformers finds the last token of a padded row by its pad id. Where pad == eos it would score one token
    before the EOS, so the saved model pads with another special token; unpadded rows are scored alike everywhere.
    """
    pad_id = _pad_other_than_eos(tokenizer)
    classifier.config.pad_token_id = pad_id
    classifier.config.num_labels = 1
    with export_folder(folder) as staging:
        classifier.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if pad_id is not None and pad_id != tokenizer.pad_token_id:
            file = Path(staging) / "tokenizer_config.json"
            settings = json.loads(file.read_text())
            settings["pad_token"] = tokenizer.convert_ids_to_tokens(pad_id)
            file.write_text(json.dumps(settings, indent=2))
        (Path(staging) / NORMALISATION_FILE).write_text(json.dumps(normalisation, indent=1))


def _pad_other_than_eos(tokenizer: Any) -> int | None:
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return tokenizer.pad_token_id
    others = [
        i
        for i in [tokenizer.unk_token_id, *tokenizer.all_special_ids, *sorted(tokenizer.added_tokens_decoder)]
        if i is not None
    ]
    return next(
        (i for i in others if i not in (tokenizer.eos_token_id, tokenizer.bos_token_id)), tokenizer.pad_token_id
    )
