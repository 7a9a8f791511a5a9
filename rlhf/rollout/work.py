"""How much work one PPO step needs: model FLOPs per phase, from the shapes of the four roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlhf.config_schema import PPOStage
from rlhf.errors import ModelError
from rlhf.functional.flops import Load, Shape, causal_load, forward_flops, sampling_flops, training_flops
from rlhf.models.shape import shape_from_config
from rlhf.types import Rollout


@dataclass(frozen=True)
class StepWork:
    """Shapes of the roles, and what of policy and critic is trained.

    Attributes:
        reward: None for a programmatic scorer.
        trained_layers: of the policy, from the top; None: all.
        critic_layers: of the critic.
        trains_weights: False for adapters over frozen weights.
        trains_head: of the policy; the critic's always learns.
        begins: role -> the layers below its own, which are computed once for all roles and epochs (`sharing: hydra`).
        trunk_is_sampled: those below the policy's own are computed while sampling.
        reward_passes: through the reward model's layers per row; an ensemble of adapters has one for each.
    """

    policy: Shape
    critic: Shape
    reference: Shape
    reward: Shape | None
    trained_layers: int | None
    critic_layers: int | None
    trains_weights: bool = True
    trains_head: bool = True
    begins: Mapping[str, int] = field(default_factory=dict)
    trunk_is_sampled: bool = False
    reward_passes: int = 1

    @classmethod
    def of(cls, cfg: PPOStage, begins: Mapping[str, int] | None = None, *, reward_passes: int = 1) -> StepWork | None:
        """Of a configuration, and of what its models have in common; None where a shape cannot be counted."""
        critic = cfg.reward_model if cfg.critic_init == "reward_model" else cfg.model
        try:
            return cls(
                policy=shape_from_config(cfg.model),
                critic=shape_from_config(critic or cfg.model, scalar=True),
                reference=shape_from_config(cfg.reference or cfg.model),
                reward=shape_from_config(cfg.reward_model, scalar=True) if cfg.reward_model else None,
                trained_layers=cfg.tuning.layers,
                critic_layers=cfg.critic_layers or cfg.tuning.layers,
                trains_weights=cfg.tuning.kind == "full",
                trains_head=cfg.tuning.kind == "full" and cfg.tuning.layers is None,
                begins=begins or {},
                trunk_is_sampled=cfg.sharing == "hydra" and cfg.sampling.engine == "native",
                reward_passes=reward_passes,
            )
        except ModelError:
            return None

    def flops(self, rows: Sequence[tuple[int, int]], *, epochs: float, reused: float = 0.0) -> dict[str, float]:
        """Model FLOPs of each phase.

        Args:
            rows: (prompt tokens, sampled tokens) of every rollout.
            epochs: passes of the update over them; fewer than configured where `target_kl` ended it early.
            reused: of these passes, how much of a forward was the scoring's own.

        Pretraining texts (`ptx`) are not counted.
        """
        load = causal_load(prompt + sampled for prompt, sampled in rows)
        actions = sum(sampled for _, sampled in rows)
        passes = {
            "policy": self._forward("policy", self.policy, load, actions),
            "reference": self._forward("reference", self.reference, load, actions),
            "critic": self._forward("critic", self.critic, load, load.tokens),
        }
        if self.reward:
            passes["reward"] = self.reward_passes * self._forward("reward", self.reward, load, load.tokens)
        sampled = self.begins.get("policy", 0) if self.trunk_is_sampled else 0
        common = max(self.begins.values(), default=0) - sampled
        score = sum(passes.values()) + forward_flops(self.policy, load, head_positions=0, layers=common)
        update = 0
        for role, shape, at, trained, trains_head in (
            ("policy", self.policy, actions, self.trained_layers, self.trains_head),
            ("critic", self.critic, load.tokens, self.critic_layers, True),
        ):
            frozen = 0 if trained is None else shape.layers - self.begins.get(role, 0) - trained
            update += forward_flops(shape, load, head_positions=0, layers=frozen) + training_flops(
                shape,
                load,
                head_positions=at,
                trained_layers=trained,
                trains_weights=self.trains_weights,
                trains_head=trains_head,
            )
        forward = passes["policy"] + passes["critic"]
        return {
            "generate": float(sampling_flops(self.policy, rows)),
            "score": float(score),
            "update": float(update * epochs - forward * reused),
        }

    def _forward(self, role: str, shape: Shape, load: Load, head_positions: int) -> int:
        """Through the layers of its own."""
        layers = shape.layers - self.begins.get(role, 0)
        return forward_flops(shape, load, head_positions=head_positions, layers=layers)


def row_lengths(rollouts: Sequence[Rollout]) -> list[tuple[int, int]]:
    """(prompt tokens, sampled tokens) of every row, those without a score too."""
    return [(r.action_mask.count(False), r.action_mask.count(True)) for r in rollouts]
