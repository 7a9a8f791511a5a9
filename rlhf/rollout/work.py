"""How much work one PPO step needs: model FLOPs per phase, from the shapes of the four roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config_schema import PPOStage
from rlhf.errors import ModelError
from rlhf.functional.flops import Shape, causal_load, forward_flops, sampling_flops, training_flops
from rlhf.models.shape import shape_from_config
from rlhf.types import RolloutBatch


@dataclass(frozen=True)
class StepWork:
    """Shapes of the roles, and what of policy and critic is trained; `reward` is None for a programmatic scorer."""

    policy: Shape
    critic: Shape
    reference: Shape
    reward: Shape | None
    trains_weights: bool = True

    @classmethod
    def of(cls, cfg: PPOStage) -> StepWork | None:
        """Of a configuration; None where a model has a shape that cannot be counted."""
        critic = cfg.reward_model if cfg.critic_init == "reward_model" else cfg.model
        try:
            return cls(
                policy=shape_from_config(cfg.model),
                critic=shape_from_config(critic or cfg.model, scalar=True),
                reference=shape_from_config(cfg.reference or cfg.model),
                reward=shape_from_config(cfg.reward_model, scalar=True) if cfg.reward_model else None,
                trains_weights=cfg.tuning.kind == "full",
            )
        except ModelError:
            return None

    def flops(self, rows: Sequence[tuple[int, int]], *, epochs: float) -> dict[str, float]:
        """Model FLOPs of each phase.

        Args:
            rows: (prompt tokens, sampled tokens) of every rollout.
            epochs: passes of the update over them; fewer than configured where `target_kl` ended it early.

        Pretraining texts (`ptx`) are not counted.
        """
        load = causal_load(prompt + sampled for prompt, sampled in rows)
        actions = sum(sampled for _, sampled in rows)
        score = sum(forward_flops(lm, load, head_positions=actions) for lm in (self.policy, self.reference))
        score += forward_flops(self.critic, load, head_positions=load.tokens)
        if self.reward:
            score += forward_flops(self.reward, load, head_positions=load.tokens)
        update = training_flops(
            self.policy,
            load,
            head_positions=actions,
            trains_weights=self.trains_weights,
            trains_head=self.trains_weights,
        ) + training_flops(self.critic, load, head_positions=load.tokens, trains_weights=self.trains_weights)
        return {
            "generate": float(sampling_flops(self.policy, rows)),
            "score": float(score),
            "update": float(update * epochs),
        }


def row_lengths(batch: RolloutBatch) -> list[tuple[int, int]]:
    """(prompt tokens, sampled tokens) of every row."""
    sampled_B = batch.action_mask_BT.sum(1)
    prompt_B = batch.attention_mask_BT.sum(1) - sampled_B
    return list(zip(prompt_B.tolist(), sampled_B.tolist(), strict=True))
