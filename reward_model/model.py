"""The trained reward model at work: load, save, score rollouts; and the same layout for plain transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reward_model.ensemble import Aggregate, Ensemble, described, disagreement, load_ensemble
from rlhf.checkpoint import export_folder
from rlhf.errors import ConfigError
from rlhf.models.load import require_same_tokens
from rlhf.models.sharing import Share, keep_apart
from rlhf.models.value import NORMALISATION_FILE, ScalarModel, load_scalar_model
from rlhf.rollout.buffer import micro_batch_rows, pad_right
from rlhf.runtime import Runtime
from rlhf.types import Rollout


class RewardModel:
    """A frozen scalar model, or an ensemble of them, as a `RewardFn`: it reads the very tokens that the policy sampled,
    EOS included."""

    def __init__(
        self,
        model: ScalarModel | Ensemble,
        runtime: Runtime,
        *,
        micro_batch_size: int = 16,
        micro_batch_tokens: int | None = None,
    ) -> None:
        self._model = runtime.freeze(model)
        self._runtime = runtime
        self._limits = micro_batch_size, micro_batch_tokens
        self.aggregate = Aggregate() if isinstance(model, ScalarModel) else model.aggregate
        self.members: int = 1 if isinstance(model, ScalarModel) else model.members

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
            name: folder or hub id; the folder of an adapter, too, which stays one, over its unchanged base. With an
                `ensemble.json` it is an ensemble, else a single model.

        Raises:
            ModelError: not a trained one-label classifier, a damaged ensemble, or its tokens mean something else than
                the policy's.
        """
        require_same_tokens(name, tokenizer, role="reward model")
        model = load_model(name, runtime, share=share)
        runtime.shard(model.eval())
        return cls(model, runtime, micro_batch_size=micro_batch_size, micro_batch_tokens=micro_batch_tokens)

    def aggregate_by(self, kind: str | None, coef: float | None) -> None:
        """From now on the members' scores become one in another way; None: as the model says.

        Raises:
            ConfigError: there is one member only.
        """
        if kind is None and coef is None:
            return
        if self.members == 1:
            raise ConfigError(
                "an aggregate of the members' scores is set, but the reward model is a single one",
                fix="remove it, or train the reward model with `ensemble`",
            )
        self.aggregate = Aggregate(kind or self.aggregate.kind, self.aggregate.coef if coef is None else coef)

    @property
    def branch(self) -> nn.Module | None:
        """What it has of its own, where it stands on layers of others (`models.sharing`)."""
        return self._model.branch

    @property
    def passes(self) -> int:
        """Forwards through its layers per row."""
        return 1 if isinstance(self._model, ScalarModel) else self._model.passes

    @property
    def mean(self) -> float:
        """Raw score, of an ensemble the members' mean, that is 0 after normalisation."""
        return float(self._model.mean if isinstance(self._model, ScalarModel) else self._model.means_M.mean())

    @property
    def std(self) -> float:
        """Units of the raw score, the log odds of training, per unit of the normalised one."""
        return float(self._model.std)

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Score of each rollout (`ScalarModel.score_last`); an ensemble's disagreement is written into the rollouts."""
        scores_MN = self.score_members([r.tokens for r in rollouts])
        if self.members > 1:
            for rollout, std in zip(rollouts, disagreement(scores_MN).tolist(), strict=True):
                rollout.score_std = std
        return self.aggregate(scores_MN).tolist()

    def score_tokens(
        self, rows: Sequence[Sequence[int]], on_rows: Callable[[int], None] = lambda n: None
    ) -> list[float]:
        """Scores of prompt + response token rows, the members' as one."""
        return self.aggregate(self.score_members(rows, on_rows)).tolist()

    @torch.no_grad()
    def score_members(self, rows: Sequence[Sequence[int]], on_rows: Callable[[int], None] = lambda n: None) -> Tensor:
        """Every member's normalised score of prompt + response token rows: float32, [M, N], on the CPU; M is 1 for a
        single model. Neighbours in length are read together."""
        lengths_N = torch.tensor([len(row) for row in rows], dtype=torch.long)
        scores_NM = torch.zeros(len(rows), self.members)
        parts = [part_B.tolist() for part_B in micro_batch_rows(torch.arange(len(rows)), lengths_N, *self._limits)]
        for part in self._runtime.in_step(parts, filler=[]):
            tokens_BT, mask_BT = pad_tokens([rows[i] for i in part] or [[0]])
            device = self._runtime.device
            with self._runtime.autocast():
                scores_B = self._model.score_last(tokens_BT.to(device), mask_BT.to(device))
            if part:
                scores_NM[part] = scores_B.reshape(len(part), self.members).float().cpu()
            on_rows(len(part))
        return scores_NM.T


def load_model(name: str, runtime: Runtime, *, share: Share = keep_apart) -> ScalarModel | Ensemble:
    """A reward model in the run's precision, frozen, on the device; an ensemble where the folder holds one.

    Raises:
        ModelError: see `load_scalar_model` and `load_ensemble`.
    """
    found = described(name)
    if found is not None:
        return load_ensemble(name, found, dtype=runtime.dtype, share=share).to(runtime.device)
    scalar = load_scalar_model(name, dtype=runtime.dtype, keep_adapter=True)
    scalar.requires_grad_(False).to(runtime.device)
    share(scalar)
    return scalar


def pad_tokens(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens_BT, attention_mask_BT) padded on the right."""
    return pad_right(rows, 0, torch.long), pad_right([[True] * len(row) for row in rows], False, torch.bool)


def save_reward_model(
    folder: Path, classifier: Any, tokenizer: Any, normalisation: dict[str, Any], ensemble: Ensemble | None = None
) -> None:
    """Write an `AutoModelForSequenceClassification` folder with its normalisation beside it, atomically; with the
    members of the ensemble that it is the plain model of.

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
        if ensemble is not None:
            ensemble.save(Path(staging))


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
