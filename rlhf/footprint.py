"""Memory of one process of a run, from its configuration and the shapes of its models: nothing is loaded.

    of_ppo(cfg, models, setup).resident(setup)

Rows are taken to be as long as the configuration allows. What a run shares depends on weights, which are not read:
with `sharing` a reward model is taken for one that was trained for it (README.md), unless its folder shows that it is a
whole model. Texts of `ptx` are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlhf.config_schema import PPOStage, RewardStage, SFTStage, TuningConfig
from rlhf.functional.logprobs import CPU_TILE, GPU_TILE
from rlhf.functional.memory import (
    MASTER,
    Dimensions,
    Forward,
    Memory,
    activations,
    converted_weights,
    head_tile,
    kv_cache,
    sampling_logits,
    trained_state,
    working_set,
)
from rlhf.models.packed_forward import MAX_WIDTH

SIZES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Setup:
    """How a run is spread: ZeRO stage (0: DDP, or alone), processes in all, and whether they run on CPUs."""

    stage: int = 0
    ranks: int = 1
    on_cpu: bool = True

    @property
    def parts(self) -> int:
        """Into which weights are cut."""
        return self.ranks if self.stage == 3 else 1


PROCESS = {True: 0.52e9, False: 0.6e9}
"""Bytes that are there without a model. On a CPU: Python, torch, transformers and what they load on first use, measured
as `rlhf ppo` with a model of 0.05M parameters. On a GPU: the CUDA context and the libraries' own, assumed."""

SPREAD = {True: 1.15, False: 1.1}
"""What the allocator holds of every byte that tensors need at the peak. On a CPU: glibc's heap, which `rlhf.runtime`
tells to keep what is freed; blocks of all sizes come and go in it and leave holes. Measured: 1.1 to 1.2 in most runs
(tests/benchmarks/bench_plan.py), 1.4 where LoRA's activations are most of it. On a GPU assumed."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of tensors in one process.

    Attributes:
        roles: by what they are for, each column at its own largest; they need not be large at one time.
        phases: all that is there at once.
    """

    roles: dict[str, Memory]
    phases: dict[str, float]

    @property
    def total(self) -> Memory:
        """Of all roles."""
        return sum(self.roles.values(), Memory())

    @property
    def peak(self) -> float:
        """Of the largest phase."""
        return max(self.phases.values())

    def resident(self, setup: Setup) -> float:
        """Bytes that the process takes at its peak."""
        return PROCESS[setup.on_cpu] + SPREAD[setup.on_cpu] * self.peak


@dataclass(frozen=True)
class Learner:
    """A model that learns, or a part of one.

    Attributes:
        trained: parameters.
        frozen: parameters that it has for itself.
        layers: how many of its layers have a backward.
    """

    dims: Dimensions
    how: Forward
    trained: int
    frozen: int
    layers: int

    @classmethod
    def of(cls, dims: Dimensions, tuning: TuningConfig, how: Forward, *, scalar: bool = False) -> Learner:
        """As `models.tuning.apply_tuning` makes it."""
        layers = min(tuning.layers or dims.shape.layers, dims.shape.layers)
        head = dims.outputs if scalar else 0
        if tuning.kind == "lora":
            trained = dims.adapters(tuning.rank, layers) + head
            return cls(dims, how, trained, dims.parameters - head, layers)
        trained = dims.parameters if tuning.layers is None else dims.top(layers) + head
        return cls(dims, how, trained, dims.parameters - trained, layers)

    def memory(self, setup: Setup, *, rows: int, width: int, actions: int) -> Memory:
        """State and activations on each rank; with ZeRO-3 frozen weights are sharded, too."""
        state = trained_state(self.trained, stage=setup.stage, ranks=setup.ranks)
        frozen = self.how.size * self.frozen / setup.parts
        kept = activations(self.dims, self.how, rows=rows, width=width, layers=self.layers)
        kept += converted_weights(self.dims, self.how, layers=self.layers)
        tile = CPU_TILE if setup.on_cpu else GPU_TILE
        logits = head_tile(self.dims, tile, actions=actions, size=self.how.size) if actions else 0
        return state + Memory(weights=frozen, activations=kept, logits=logits)


def forward_of(tuning: TuningConfig, precision: str, setup: Setup, *, width: int, recomputes: bool = False) -> Forward:
    """How the trained models of a run are read."""
    size, full = SIZES[precision], tuning.kind == "full"
    return Forward(
        size=size,
        stream=MASTER if full and tuning.layers is None else size,
        packed=setup.on_cpu and width <= MAX_WIDTH,
        trains_weights=full,
        rank=0 if full else tuning.rank,
        recomputes=recomputes,
    )


def gathered_layer(dims: Dimensions, setup: Setup) -> float:
    """Bytes of the weights that ZeRO-3 gathers at a time, at most in float32."""
    return float(MASTER * max(dims.layer_parameters, dims.embedding)) if setup.stage == 3 else 0.0


# --- PPO ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Models:
    """Dimensions of the roles; `reward`: None for a programmatic scorer.

    `shared_critic`, `shared_reward`: with `sharing: lora` it stands on the policy's weights.
    """

    policy: Dimensions
    critic: Dimensions
    reference: Dimensions
    reward: Dimensions | None = None
    shared_critic: bool = True
    shared_reward: bool = True


def micro_batch(cfg: PPOStage) -> tuple[int, int]:
    """(rows, tokens of each) of the largest forward and backward."""
    width = cfg.max_prompt_tokens + cfg.sampling.max_new_tokens
    rows = min(cfg.micro_batch_size, cfg.batch_size // cfg.minibatches)
    if cfg.micro_batch_tokens:
        rows = min(rows, max(1, cfg.micro_batch_tokens // width))
    return rows, width


def of_ppo(cfg: PPOStage, models: Models, setup: Setup) -> Footprint:
    """Policy, critic, reference, reward model and sampler, and the phases of a step."""
    rows, width = micro_batch(cfg)
    how = forward_of(cfg.tuning, cfg.precision, setup, width=width, recomputes=cfg.gradient_checkpointing)
    policy = Learner.of(models.policy, cfg.tuning, how)
    critic = _critic(cfg, models, how)
    actions = rows * cfg.sampling.max_new_tokens
    roles = {
        "policy": policy.memory(setup, rows=rows, width=width, actions=actions),
        "critic": critic.memory(setup, rows=rows, width=width, actions=0),
        "reference": Memory(weights=how.size * _reference_parameters(cfg, models, setup) / setup.parts),
        "reward": Memory(weights=how.size * _reward_parameters(cfg, models, setup) / setup.parts),
        "sampler": _sampler(cfg, policy, setup),
    }
    if cfg.sharing == "hydra":
        roles["trunk"] = _trunk_states(cfg, models, how.size, width)
    return Footprint(roles, _phases(cfg, policy, critic, roles, setup))


def _critic(cfg: PPOStage, models: Models, how: Forward) -> Learner:
    """On what the other roles have, where they share."""
    layers = cfg.critic_layers or cfg.tuning.layers
    learner = Learner.of(models.critic, cfg.tuning.model_copy(update={"layers": layers}), how, scalar=True)
    frozen = learner.frozen
    if cfg.sharing == "lora" and models.shared_critic:
        frozen = 0
    if cfg.sharing == "hydra":  # from the policy's layers on they are the reward model's, if it starts from that
        own = cfg.tuning.layers if cfg.critic_init == "reward_model" else layers
        frozen = ((own or 0) - (layers or 0)) * models.critic.layer_parameters
    return Learner(learner.dims, learner.how, learner.trained, frozen, learner.layers)


def _reference_parameters(cfg: PPOStage, models: Models, setup: Setup) -> int:
    is_other = cfg.reference not in (None, cfg.model)
    if cfg.sharing == "hydra" and is_other and not setup.on_cpu:  # as of a reward model
        return models.reference.top(cfg.tuning.layers or 0)
    if cfg.sharing == "separate" or is_other:
        return models.reference.parameters
    adapted = cfg.tuning.kind == "lora"
    return 0 if adapted else models.reference.top(cfg.tuning.layers or 0)


def _reward_parameters(cfg: PPOStage, models: Models, setup: Setup) -> int:
    reward = models.reward
    if reward is None:
        return 0
    if cfg.sharing == "separate" or (cfg.sharing == "lora" and not models.shared_reward):
        return reward.parameters
    if cfg.sharing == "lora":
        return reward.adapters(cfg.tuning.rank, reward.shape.layers) + reward.outputs
    # On a CPU weights are pages of their file, and one tensor of it that is used keeps all that were looked at.
    return reward.parameters if setup.on_cpu else reward.top(cfg.tuning.layers or 0) + reward.outputs


def _sampler(cfg: PPOStage, policy: Learner, setup: Setup) -> Memory:
    """Its own weights (`models.roles.Sampler`), cache and logits. With ZeRO-3 the weights are gathered for the time of
    sampling: all of them, and with LoRA once more those with adapters folded in."""
    dims, size = policy.dims, policy.how.size
    rows = min(cfg.sampling.batch_size, cfg.batch_size)
    width = cfg.max_prompt_tokens + cfg.sampling.max_new_tokens
    if setup.stage == 3:
        own = dims.parameters + (policy.layers * dims.shape.layer_weights if cfg.tuning.kind == "lora" else 0)
    elif cfg.tuning.kind == "lora":
        own = policy.layers * dims.shape.layer_weights
    else:
        own = policy.trained if size < MASTER else 0
    return Memory(
        weights=size * own,
        kv_cache=kv_cache(dims, rows=rows, width=width, size=size),
        logits=sampling_logits(dims, rows=rows, size=size),
    )


def _trunk_states(cfg: PPOStage, models: Models, size: int, width: int) -> Memory:
    """Of the rows of two steps, at every layer where a branch begins; decoding has those of its rows in its cache."""
    begins = {cfg.tuning.layers, (cfg.critic_layers or cfg.tuning.layers) if cfg.critic_init == "policy" else None}
    rows = 2 * cfg.batch_size * len(begins - {None}) + min(cfg.sampling.batch_size, cfg.batch_size)
    return Memory(activations=float(rows * width * models.policy.hidden * size))


def _phases(
    cfg: PPOStage, policy: Learner, critic: Learner, roles: Mapping[str, Memory], setup: Setup
) -> dict[str, float]:
    """Bytes at once. In the update: both graphs before the backward; the policy's and the critic's gradients, for the
    critic, which was read last, has its backward first; all gradients."""
    rows, width = micro_batch(cfg)
    both = roles["policy"] + roles["critic"]
    sampler, states = roles["sampler"], roles.get("trunk", Memory()).activations
    # Caches of decoding stay for the next step: on a CPU by our own doing, on a GPU in the allocator, for others' use.
    cache = sampler.kv_cache if setup.on_cpu else 0.0
    buckets = both.gradients / 2 if setup.stage == 0 and setup.ranks > 1 else 0.0
    held = sum(role.weights for role in roles.values()) + both.optimizer + states + buckets
    gathered = sampler.weights if setup.stage == 3 else 0.0
    held -= gathered
    held += _holes(policy, setup, trained=policy.trained + critic.trained)
    parts = math.ceil(cfg.batch_size / cfg.minibatches / rows)
    share = 0.5 if buckets else 1.0
    learned = {name: share * roles[name].gradients for name in ("policy", "critic")}
    before = sum(learned.values()) if parts > 1 else 0.0
    tied = MASTER * policy.dims.embedding if policy.trained >= policy.dims.parameters and not policy.dims.outputs else 0
    most = max(
        before + both.activations,
        max(learned["critic"], before) + roles["policy"].activations,
        sum(learned.values()) + tied,  # of the one matrix there are the head's and the embedding's gradients
    )
    converted = sum(converted_weights(model.dims, model.how, layers=model.layers) for model in (policy, critic))
    reading = 4.0 * policy.how.size * policy.dims.mlp_width
    work = working_set(policy.dims, policy.how, rows=rows, width=width) + gathered_layer(policy.dims, setup)
    prompts = min(cfg.sampling.batch_size, cfg.batch_size) * cfg.max_prompt_tokens
    whole = sum(MASTER * model.trained + model.how.size * model.frozen for model in (policy, critic))
    start = {"start": float(whole)} if setup.stage == 3 else {}  # before they are cut up
    return {
        **start,
        "sample": held
        + gathered
        + sampler.kv_cache
        + sampler.logits
        + _packed_weights(policy, setup)
        + reading * prompts,
        "score": held + cache + converted + 2 * reading * rows * width + both.logits,
        "update": held + cache + most + work + both.logits,
    }


def _holes(learner: Learner, setup: Setup, *, trained: int) -> float:
    """Bytes on a CPU that were given up, between what stays, so that nothing as large fits there: the float32 of layers
    that do not learn, for the model is loaded before they are converted; of several processes, DDP's first buckets,
    which it makes anew after the first backward, or the weights that ZeRO flattened."""
    how = learner.how
    if not setup.on_cpu:
        return 0.0
    converted = learner.frozen if how.trains_weights and how.size < MASTER else 0
    return float(MASTER * (converted + (trained if setup.ranks > 1 else 0)))


def _packed_weights(policy: Learner, setup: Setup) -> float:
    """Decoding in bf16 on a CPU packs the weights of all products (`rollout.products`)."""
    if not setup.on_cpu or policy.how.size == MASTER:
        return 0.0
    return policy.how.size * (policy.dims.products + policy.dims.shape.head_weights)


# --- SFT and the reward model ---------------------------------------------------------------------------------


def of_supervised(cfg: SFTStage | RewardStage, dims: Dimensions, setup: Setup) -> Footprint:
    """One model's optimizer step: before the last of its backwards, or at its end.

    SFT goes through transformers' own layers, and has the logits of all tokens at once: in the dtype of the products,
    in float32, and the gradient of each. A reward model reads pairs, and has one number for each token.
    """
    is_sft = isinstance(cfg, SFTStage)
    recomputes = is_sft and bool(cfg.trainer.get("gradient_checkpointing"))
    through = Setup(on_cpu=False) if is_sft else setup
    how = forward_of(cfg.tuning, cfg.precision, through, width=cfg.max_length, recomputes=recomputes)
    rows = min(cfg.micro_batch_size, cfg.batch_size) * (1 if is_sft else 2)
    learner = Learner.of(dims, cfg.tuning, how, scalar=not is_sft)
    ensemble = None if isinstance(cfg, SFTStage) else cfg.ensemble
    # Adapters of an ensemble go through all layers one after the other, and then through one backward.
    passes = ensemble.members if ensemble is not None and ensemble.kind == "adapters" else 1
    memory = learner.memory(setup, rows=rows * passes, width=cfg.max_length, actions=0)
    memory = replace(memory, gradients=passes * memory.gradients, optimizer=passes * memory.optimizer)
    logits = 2.0 * (how.size + 4) * rows * cfg.max_length * dims.vocabulary if is_sft else 0.0
    memory += Memory(logits=logits)
    buckets = memory.gradients / 2 if setup.stage == 0 and setup.ranks > 1 else 0.0
    held = memory.weights + memory.optimizer + buckets + _holes(learner, setup, trained=learner.trained)
    gradients = memory.gradients - buckets
    work = working_set(dims, how, rows=rows, width=cfg.max_length) + gathered_layer(dims, setup)
    before = gradients if cfg.batch_size > cfg.micro_batch_size else 0.0
    most = max(before + memory.activations + memory.logits, gradients)
    return Footprint({"model": memory}, {"update": held + most + work})
