"""The models of a PPO run in their roles: policy and critic (trained), reference (frozen), and the sampler."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.checkpoint import export_folder
from rlhf.config_schema import PPOStage
from rlhf.errors import ConfigError
from rlhf.models.adapters import save_adapter
from rlhf.models.load import eos_token_ids, load_causal_lm, load_tokenizer, require_same_tokens
from rlhf.models.policy import ActorCritic, Policy
from rlhf.models.sharing import Branch, Share, Trunk, keep_apart, sharing_of
from rlhf.models.tuning import (
    adapted_layers,
    apply_tuning,
    folded_weight,
    merge_tuning,
    parameter_groups,
    shared_copy,
    storage_dtype,
)
from rlhf.models.value import NORMALISATION_FILE, Critic, ScalarModel, load_scalar_model
from rlhf.runtime import Runtime


class Sampler:
    """The policy as rollouts are drawn from it: a plain language model in the run's precision.

    Decoding reads every weight for every token. So what training needs is taken out of its way once per step:
    float32 weights that are sampled in bf16 are cast, adapters are folded in. Only parameters that this changes
    take memory of their own; without any, the sampler is the policy itself.
    """

    def __init__(self, lm: Any, runtime: Runtime, *, plain: Any = None) -> None:
        """`plain`: for a policy with adapters, its `shared_copy` from before they were put in."""
        self._source, self._runtime = lm, runtime
        self._adapted = adapted_layers(lm, plain) if plain is not None else []
        # ZeRO-3 drops weights behind every module that it knows: it must not know the modules that decode.
        self._is_copy = plain is None and (runtime.dtype != torch.float32 or runtime.zero_stage == 3)
        filled = runtime.zero_stage != 3  # there weights come for each rollout, and go
        for layer, folded in self._adapted:
            weight = layer.get_base_layer().weight.detach()
            folded.weight = nn.Parameter(weight.clone() if filled else weight.new_empty(0))
        self._lm = lm
        if plain is not None:
            self._lm = runtime.freeze(plain)
        elif self._is_copy:
            self._lm = runtime.freeze(cast_copy(lm, runtime.dtype, filled=filled))

    @contextlib.contextmanager
    def ready(self) -> Iterator[Any]:
        """The language model with the policy's current weights, in evaluation mode.

        Under ZeRO-3 all ranks enter together; the weights are whole until they leave.
        """
        theirs = {id(parameter) for parameter in self._source.parameters()}
        shared = [parameter for parameter in self._lm.parameters() if id(parameter) in theirs]
        with self._runtime.gathered(shared if self._lm is not self._source else []):
            self._refresh()
            with _without_checkpointing(self._lm):
                yield self._lm
        if self._runtime.zero_stage == 3:
            for parameter in self._lm.parameters():
                if id(parameter) not in theirs:
                    parameter.data = parameter.data.new_empty(0)

    @torch.no_grad()
    def _refresh(self) -> None:
        for layer, folded in self._adapted:
            with self._runtime.gathered(layer.parameters()):
                folded.weight.data = folded_weight(layer).to(folded.weight.dtype)
        if self._is_copy:
            for mine, source in zip(self._lm.parameters(), self._source.parameters(), strict=True):
                if mine is not source:
                    with self._runtime.gathered([source]):
                        _put(mine, source)


def _put(mine: Tensor, source: Tensor) -> None:
    if mine.numel():
        mine.copy_(source)
    else:  # given up after the last rollout
        mine.data = source.detach().to(mine.dtype, copy=True)


@contextlib.contextmanager
def _without_checkpointing(lm: Any) -> Iterator[None]:
    """Recomputed layers keep no cache."""
    checkpointed = [layer for layer in checkpointing_layers(lm) if layer.training]
    for layer in checkpointed:
        layer.training = False
    try:
        yield
    finally:
        for layer in checkpointed:
            layer.training = True


def cast_copy(lm: Any, dtype: torch.dtype, *, filled: bool = True) -> Any:
    """A copy with its parameters in `dtype`; frozen ones that have it already are shared.

    Buffers stay as they are, for rotary frequencies in bf16 misplace far tokens.

    Args:
        filled: False leaves the copied parameters empty, to be filled later.
    """
    memo = {id(p): p for p in lm.parameters() if not p.requires_grad and p.dtype == dtype}
    if not filled:
        empty = {id(p): nn.Parameter(p.detach().new_empty(0), requires_grad=False) for p in lm.parameters()}
        memo = {**empty, **memo}
    copied = copy.deepcopy(lm, memo)
    for parameter in copied.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return copied


def checkpointing_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that recompute their activations in the backward while they are in training mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@dataclass
class Roles:
    """Everything `stages/ppo.py` runs on, besides the reward."""

    tokenizer: Any
    eos_ids: tuple[int, ...]
    actor_critic: ActorCritic
    reference: Policy
    sampler: Sampler
    policy_handle: Any
    critic_handle: Any
    share: Share = keep_apart
    """Makes a further scalar model (the reward model) use what the roles have in common."""
    trunk: Trunk | None = None

    def begins(self, reward_fn: Any) -> dict[str, int]:
        """Role -> the layers that lie below its own, where it stands on the trunk; `reward_fn`: perhaps a model."""
        critic: Any = self.actor_critic.critic
        branches = {
            "policy": self.actor_critic.policy.branch,
            "reference": self.reference.branch,
            "critic": critic.scalar.branch,
            "reward": getattr(reward_fn, "branch", None),
        }
        return {role: branch.level for role, branch in branches.items() if isinstance(branch, Branch)}

    def parameter_groups(self, cfg: PPOStage) -> list[dict[str, Any]]:
        """AdamW groups: policy and critic with their own learning rates."""
        policy, critic = self.actor_critic.policy, self.actor_critic.critic
        decay = cfg.optim.weight_decay
        return [
            *parameter_groups(policy, lr=cfg.optim.lr, weight_decay=decay, role="policy"),
            *parameter_groups(critic, lr=cfg.critic_lr or cfg.optim.lr, weight_decay=decay, role="critic"),
        ]

    def export(self, run_dir: Path, dtype: torch.dtype) -> None:
        """Write `final/` (policy) and `critic/`, in Hugging Face layout, adapters folded in; ends training.

        The policy's adapter also stands by itself in `adapter/`.
        """
        save_adapter(self.policy_handle, run_dir / "adapter")
        for name, handle in (("final", self.policy_handle), ("critic", self.critic_handle)):
            with export_folder(run_dir / name) as folder:
                merge_tuning(handle).to(dtype).save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
                if name == "critic":
                    moments = (
                        self.actor_critic.critic.get_buffer("scalar.mean"),
                        self.actor_critic.critic.get_buffer("scalar.std"),
                    )
                    record = {"mean": float(moments[0]), "std": float(moments[1])}
                    (folder / NORMALISATION_FILE).write_text(json.dumps(record))


def build_roles(cfg: PPOStage, runtime: Runtime) -> Roles:
    """Load policy, critic and reference; nothing is trained or wrapped yet.

    Raises:
        ConfigError: ZeRO-3 for roles that share weights.
        ModelError: a model cannot be found, or does not fit its role.
    """
    if runtime.zero_stage == 3 and cfg.sharing != "separate":
        raise ConfigError(
            f"sharing: {cfg.sharing} keeps common weights whole on every process, ZeRO-3 cuts them up",
            fix="set sharing: separate (tuning.kind: lora may stay), or use launch/zero2.yaml",
        )
    lm = load_causal_lm(cfg.model, dtype=storage_dtype(cfg.tuning, runtime.dtype))
    with_lora = cfg.tuning.kind == "lora"
    plain, untrained = (shared_copy(lm), shared_copy(lm)) if with_lora else (None, None)
    policy_handle = apply_tuning(lm, cfg.tuning, runtime.dtype)
    trunk = _trunk(cfg, lm)
    policy = Policy(lm, trunk.branch(lm) if trunk is not None else None)
    reference = runtime.shard(runtime.freeze(_reference(cfg, lm, untrained, trunk, runtime)))
    share = sharing_of(cfg.sharing, lm, trunk)
    scalar = _critic_scalar(cfg, runtime.dtype)
    tuning = cfg.tuning.model_copy(update={"layers": cfg.critic_layers or cfg.tuning.layers})
    critic_handle = apply_tuning(scalar.classifier, tuning, runtime.dtype, head=scalar.classifier.score)
    share(scalar)
    actor_critic = ActorCritic(policy, Critic(scalar)).to(runtime.device).eval()
    sampler = Sampler(lm, runtime, plain=plain)
    if cfg.gradient_checkpointing:
        recompute_activations(lm, scalar.classifier)
    tokenizer = load_tokenizer(cfg.model)
    if cfg.reference is not None:
        require_same_tokens(cfg.reference, tokenizer, role="reference")
    return Roles(
        tokenizer=tokenizer,
        eos_ids=tuple(eos_token_ids(lm, tokenizer)),
        actor_critic=actor_critic,
        reference=reference,
        sampler=sampler,
        policy_handle=policy_handle,
        critic_handle=critic_handle,
        share=share,
        trunk=trunk,
    )


def _trunk(cfg: PPOStage, lm: Any) -> Trunk | None:
    if cfg.sharing != "hydra":
        return None
    assert cfg.tuning.layers is not None, "config_schema.PPOStage checks this"
    return Trunk.of(lm, top=cfg.tuning.layers, remembered_rows=2 * cfg.batch_size)


def _reference(cfg: PPOStage, lm: Any, untrained: Any, trunk: Trunk | None, runtime: Runtime) -> Policy:
    """The policy as it begins; over what the roles share, where they share.

    Args:
        untrained: for a policy with adapters, its `shared_copy` from before they were put in.
    """
    if cfg.sharing == "separate" or cfg.reference not in (None, cfg.model):
        reference = load_causal_lm(cfg.reference or cfg.model, dtype=runtime.dtype).requires_grad_(False)
        if trunk is None or trunk.common_layers(reference) < trunk.depth:
            return Policy(reference)
        trunk.branch(reference)  # the policy goes on from an earlier run over the same trunk
    else:
        reference = untrained if untrained is not None else cast_copy(lm, runtime.dtype)
        if trunk is None:
            return Policy(reference)
    trunk.grow(reference)
    return Policy(reference, trunk.branch(reference))


def recompute_activations(*models: Any) -> None:
    """Gradient checkpointing. transformers does it in training mode only, so its layers, and nothing in them, get it:
    dropout stays off."""
    for model in models:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in checkpointing_layers(model):
            layer.training = True


def _critic_scalar(cfg: PPOStage, precision: torch.dtype) -> ScalarModel:
    source = cfg.critic or (cfg.reward_model if cfg.critic_init == "reward_model" else cfg.model)
    assert source is not None, "config_schema.PPOStage checks this"
    dtype = storage_dtype(cfg.tuning, precision)
    is_new = cfg.critic is None and cfg.critic_init != "reward_model"
    scalar = load_scalar_model(source, dtype=dtype, new_head=is_new, keep_adapter=cfg.sharing == "lora" and not is_new)
    scalar.unread_id = None  # a value is that of the state after any token
    if is_new:  # values of 0 disturb no advantage; those of a random head are as large as the rewards
        nn.init.zeros_(scalar.classifier.score.weight)
    return scalar
