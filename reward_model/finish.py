"""The end of training: an adapter by itself, and the normalisation that comes with every reward model of ours."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reward_model.data import RankedTokens
from reward_model.ensemble import Ensemble
from reward_model.model import RewardModel
from rlhf.config_schema import RewardStage
from rlhf.data.records import read_demonstrations
from rlhf.data.templates import located, prompt_tokens, response_tokens
from rlhf.models.adapters import save_adapter
from rlhf.models.tuning import merge_tuning
from rlhf.models.value import NORMALISATION_FILE, ScalarModel
from rlhf.progress import Progress
from rlhf.runtime import Runtime

NORMALISATION_ROWS = 160
"""Training responses, about, whose deviation becomes the unit of the score: known to 6% (1 / sqrt(2 * 160))."""


def end_training(model: ScalarModel | Ensemble, handle: Any, dtype: torch.dtype) -> Any:
    """End training; the plain transformers model in `dtype`, adapters folded in."""
    if not isinstance(model, ScalarModel):
        return model.plain(dtype)
    model.classifier = merge_tuning(handle).to(dtype)
    return model.classifier


def keep_adapter(
    handle: Any,
    model: ScalarModel | Ensemble,
    train: Sequence[RankedTokens],
    cfg: RewardStage,
    runtime: Runtime,
    tokenizer: Any,
    progress: Progress,
) -> None:
    """With LoRA write `adapter/`: adapter and head, unrounded, with a normalisation of their own, and an ensemble's
    members; else take away an earlier run's."""
    folder = Path(cfg.run_dir) / "adapter"
    if cfg.tuning.kind != "lora":
        if runtime.is_main:
            save_adapter(None, folder)
        return
    scorer = RewardModel(model, runtime, micro_batch_size=2 * cfg.micro_batch_size)
    moments = normalise(scorer, model, train, cfg, tokenizer, progress)

    def write(staging: Path) -> None:
        (staging / NORMALISATION_FILE).write_text(json.dumps(moments, indent=1), encoding="utf-8")
        if not isinstance(model, ScalarModel):
            model.save(staging)

    if runtime.is_main:
        head = model.classifier.score if isinstance(model, ScalarModel) else model.plain_head()
        save_adapter(handle, folder, head=head, further=write)
    set_moments(model, [0.0] * scorer.members, 1.0)


def set_moments(model: ScalarModel | Ensemble, means: Sequence[float], std: float) -> None:
    """From now on member m's scores are (raw - means[m]) / std."""
    if isinstance(model, ScalarModel):
        model.set_normalisation(means[0], std)
    else:
        model.set_normalisation(means, std)


def drawn_responses(train: Sequence[RankedTokens], seed: int) -> list[list[int]]:
    """Rows of items drawn by lot, all of an item: of rows at even distances all would be the better one of their pair,
    or by the same one of several policies."""
    share = NORMALISATION_ROWS / sum(len(item.rows) for item in train)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = sorted(order[: math.ceil(share * len(train))])
    return [row for i in drawn for row in train[i].rows]


def normalise(
    scorer: RewardModel,
    model: ScalarModel | Ensemble,
    train: Sequence[RankedTokens],
    cfg: RewardStage,
    tokenizer: Any,
    progress: Progress,
) -> dict[str, Any]:
    """Set and return mean (of demonstrations, else of training responses) and std (of training responses).

    An ensemble's members get a mean each and one std, that of their mean score; what is returned is the plain model's.
    """
    responses = drawn_responses(train, cfg.seed)
    if cfg.normalise_on is not None:
        zero = [
            located(d.where, prompt_tokens, tokenizer, d.prompt, chat=cfg.normalise_on.chat)
            + response_tokens(tokenizer, d.completion, finished=True)
            for d in read_demonstrations(cfg.normalise_on)
        ]
    else:
        zero = responses
    progress.phase("normalise", total=len(zero) + len(responses), unit="rows")
    zero_MN = scorer.score_members([row[-cfg.max_length :] for row in zero], progress.advance)
    response_N = scorer.score_members(responses, progress.advance).mean(0)
    means, std = zero_MN.mean(1).tolist(), max(float(response_N.std(correction=0)), 1e-6)
    set_moments(model, means, std)
    mean = means[0] if isinstance(model, ScalarModel) else model.plain_mean
    return {"mean": mean, "std": std, "zero_is": cfg.normalise_on.path if cfg.normalise_on else "training responses"}
