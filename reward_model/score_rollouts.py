"""`rlhf rollouts score MODEL BUFFER.parquet`: a reward model's scores in a file of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reward_model.ensemble import disagreement
from reward_model.model import RewardModel
from rlhf.config_reward import RolloutsScore
from rlhf.data.templates import located, prompt_tokens, response_tokens
from rlhf.errors import DataError
from rlhf.models.load import load_tokenizer
from rlhf.progress import Progress
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.runtime import Runtime
from rlhf.types import Rollout, StopReason

_SHOWN = 3  # rows named in a message


def main(cfg: RolloutsScore) -> RolloutBuffer:
    """Replace `score`, and with an ensemble `score_std`, of every rollout; nothing else of them changes. The file
    appears whole or stays as it was.

    Raises:
        DataError: no rollouts, or their tokens mean something else to the model.
        ModelError: not a trained one-label classifier.
        ConfigError: an aggregate for a model that is no ensemble.
    """
    runtime = Runtime.start(seed=0, precision=cfg.precision)
    tokenizer = load_tokenizer(cfg.model)
    buffer = RolloutBuffer.from_parquet(cfg.rollouts)
    if not buffer.rollouts:
        raise DataError(f"{cfg.rollouts} holds no rollouts", fix="sample some first: rlhf sample")
    if cfg.retokenize:
        rows = retokenized(buffer.rollouts, tokenizer, cfg)
    else:
        refuse_other_tokens(buffer.rollouts, tokenizer, cfg)
        rows = [rollout.tokens for rollout in buffer.rollouts]
    scorer = RewardModel.load(cfg.model, runtime, tokenizer=tokenizer, micro_batch_size=cfg.micro_batch_size)
    scorer.aggregate_by(cfg.aggregate, cfg.std_coef)
    out = cfg.out or cfg.rollouts
    with Progress(stage="rollouts score", enabled=runtime.is_main) as progress:
        progress.phase("score", total=len(rows), unit="rows")
        scores_MN = scorer.score_members(rows, progress.advance)
        spreads = disagreement(scores_MN).tolist() if scorer.members > 1 else [None] * len(rows)
        scores = scorer.aggregate(scores_MN).tolist()
        for rollout, score, spread in zip(buffer.rollouts, scores, spreads, strict=True):
            rollout.score, rollout.score_std = score, spread
        tokens = "tokenised anew" if cfg.retokenize else "the tokens that were sampled"
        progress.say(f"{out}: {len(rows)} scores by {cfg.model}, mean {sum(scores) / len(scores):.4g}; {tokens}")
    if runtime.is_main:
        buffer.to_parquet(out)
    return buffer


def retokenized(rollouts: Sequence[Rollout], tokenizer: Any, cfg: RolloutsScore) -> list[list[int]]:
    """Prompt and response as the model's own tokens; EOS behind what came to its end."""
    return [
        located(f"{cfg.rollouts}, rollout {number}", prompt_tokens, tokenizer, rollout.prompt, chat=cfg.chat)
        + response_tokens(tokenizer, rollout.response, finished=rollout.stop.finished)
        for number, rollout in enumerate(rollouts, 1)
    ]


def refuse_other_tokens(rollouts: Sequence[Rollout], tokenizer: Any, cfg: RolloutsScore) -> None:
    """Sampled tokens are scored as they are if the model reads the responses' texts out of them.

    Raises:
        DataError: it does not, for some rollout.
    """
    strange = [str(number) for number, rollout in enumerate(rollouts, 1) if not _says(tokenizer, rollout)]
    if strange:
        named = ", ".join(strange[:_SHOWN]) + (", ..." if len(strange) > _SHOWN else "")
        raise DataError(
            f"{cfg.rollouts}: {len(strange)} of {len(rollouts)} rollouts ({named}) have tokens that {cfg.model} reads "
            "as another text: they were sampled with another tokenizer, or edited",
            fix="score the texts instead: retokenize=true",
        )


def _says(tokenizer: Any, rollout: Rollout) -> bool:
    """Whether the tokens decode to the response; what a stop string leaves out of a text stays in its tokens."""
    if max(rollout.tokens) >= len(tokenizer):
        return False
    text = tokenizer.decode(rollout.response_tokens, skip_special_tokens=True)
    return text.startswith(rollout.response) if rollout.stop is StopReason.STOP else text == rollout.response
