"""How much work one PPO step needs: model FLOPs per phase, from the shapes of the four roles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.config_schema import PPOStage
from rlhf.errors import ModelError
from rlhf.functional.flops import Load, Shape, causal_load, forward_flops, sampling_flops, training_flops
from rlhf.models.shape import shape_from_config
from rlhf.types import RolloutBatch


@dataclass(frozen=True)
class StepWork:
    """Shapes of the roles, and what of policy and critic is trained.

    Attributes:
        reward: None for a programmatic scorer.
        trained_layers: of policy and critic, from the top; None: all.
        trains_weights: False for adapters over frozen weights.
        trains_head: of the policy; the critic's always learns.
        has_trunk: what lies below the trained layers is computed once for all roles and epochs (`sharing: hydra`).
        trunk_is_sampled: that happens while sampling.
    """

    policy: Shape
    critic: Shape
    reference: Shape
    reward: Shape | None
    trained_layers: int | None
    trains_weights: bool = True
    trains_head: bool = True
    has_trunk: bool = False
    trunk_is_sampled: bool = False

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
                trained_layers=cfg.tuning.layers,
                trains_weights=cfg.tuning.kind == "full",
                trains_head=cfg.tuning.kind == "full" and cfg.tuning.layers is None,
                has_trunk=cfg.sharing == "hydra",
                trunk_is_sampled=cfg.sharing == "hydra" and cfg.sampling.engine == "native",
            )
        except ModelError:
            return None

    def flops(self, rows: Sequence[tuple[int, int]], *, epochs: float, reused: float = 0.0) -> dict[str, float]:
        """Model FLOPs of each phase.

        Args:
            rows: (prompt tokens, sampled tokens) of every rollout.
            epochs: passes of the update over them; fewer than configured where `target_kl` ended it early.
            reused: of these passes, how much of a forward was the scoring's own.

        Pretraining texts (`ptx`) are not counted. With a trunk every role is taken to stand on it.
        """
        load = causal_load(prompt + sampled for prompt, sampled in rows)
        actions = sum(sampled for _, sampled in rows)
        heads = [(self.policy, actions), (self.reference, actions), (self.critic, load.tokens)]
        heads += [(self.reward, load.tokens)] if self.reward else []
        own = self.trained_layers if self.has_trunk else None
        score = sum(forward_flops(shape, load, head_positions=at, layers=own) for shape, at in heads)
        if self.has_trunk and not self.trunk_is_sampled:
            score += self._below(self.policy, load)
        forward = update = 0
        for shape, at, trains_head in ((self.policy, actions, self.trains_head), (self.critic, load.tokens, True)):
            below = 0 if self.has_trunk else self._below(shape, load)
            forward += below + forward_flops(shape, load, head_positions=at, layers=self.trained_layers)
            update += below + training_flops(
                shape,
                load,
                head_positions=at,
                trained_layers=self.trained_layers,
                trains_weights=self.trains_weights,
                trains_head=trains_head,
            )
        return {
            "generate": float(sampling_flops(self.policy, rows)),
            "score": float(score),
            "update": float(update * epochs - forward * reused),
        }

    def _below(self, shape: Shape, load: Load) -> int:
        """A forward through the layers that are not trained."""
        layers = 0 if self.trained_layers is None else shape.layers - self.trained_layers
        return forward_flops(shape, load, head_positions=0, layers=layers)


def row_lengths(batch: RolloutBatch) -> list[tuple[int, int]]:
    """(prompt tokens, sampled tokens) of every row."""
    sampled_B = batch.action_mask_BT.sum(1)
    prompt_B = batch.attention_mask_BT.sum(1) - sampled_B
    return list(zip(prompt_B.tolist(), sampled_B.tolist(), strict=True))
