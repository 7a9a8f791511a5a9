"""What a configuration needs per device and per step, for each way of sharing weights and each ZeRO stage.

Memory is counted (`rlhf.footprint`). Times are what products at full speed, reading weights while decoding and
exchanging gradients take, one after the other: a run takes at least that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rlhf.config_schema import PPOStage, RewardStage, SFTStage
from rlhf.footprint import (
    Footprint,
    Models,
    Setup,
    micro_batch,
    of_ppo,
    of_supervised,
)
from rlhf.functional.flops import causal_load, training_flops
from rlhf.functional.memory import Dimensions, Memory, kv_cache
from rlhf.machine import Machine
from rlhf.rollout.work import StepWork

STAGES = (0, 1, 2, 3)
HYDRA_SHARE = 4
"""Where a configuration names no `tuning.layers`, hydra is planned with this part of the layers."""


@dataclass(frozen=True)
class Plan:
    """One way to run a stage: its footprint on each device, and the seconds of a step by what they are spent on."""

    sharing: str
    cfg: Any
    setup: Setup
    footprint: Footprint
    seconds: dict[str, float]

    @property
    def resident(self) -> float:
        """Bytes."""
        return self.footprint.resident(self.setup)

    def fits(self, machine: Machine) -> bool:
        """Whether a device holds it."""
        return self.resident <= machine.memory


@dataclass(frozen=True)
class Cluster:
    """Machines of one kind: `gpus` devices on each of `nodes`."""

    machine: Machine
    gpus: int = 1
    nodes: int = 1

    @property
    def ranks(self) -> int:
        """Devices in all."""
        return self.gpus * self.nodes

    @property
    def exchange(self) -> float | None:
        """Bytes/s at which ranks exchange gradients: of the slowest way between two of them."""
        return self.machine.link if self.nodes == 1 else self.machine.network


def plans(cfg: Any, models: Models | Dimensions, cluster: Cluster) -> list[Plan]:
    """Every way of sharing that the stage knows, the configuration's own first, under every ZeRO stage.

    But for common weights under ZeRO-3, which `models.roles` refuses.
    """
    ways = variants(cfg, models) if isinstance(models, Models) else {"": cfg}
    stages = STAGES if cluster.ranks > 1 else STAGES[:1]
    return [
        plan(way, each, models, cluster, stage)
        for way, each in ways.items()
        for stage in stages
        if stage < 3 or way in ("", "separate")
    ]


def plan(sharing: str, cfg: Any, models: Models | Dimensions, cluster: Cluster, stage: int) -> Plan:
    """One of them."""
    setup = Setup(stage, cluster.ranks, cluster.machine.on_cpu)
    timed = cluster.machine.reaches(cfg.precision)
    if isinstance(models, Models):
        seconds = ppo_seconds(cfg, models, cluster, stage) if timed else {}
        return Plan(sharing, cfg, setup, of_ppo(cfg, models, setup), seconds)
    seconds = supervised_seconds(cfg, models, cluster, stage) if timed else {}
    return Plan(sharing, cfg, setup, of_supervised(cfg, models, setup), seconds)


def variants(cfg: PPOStage, models: Models) -> dict[str, PPOStage]:
    """The configuration, and what it would be with the other ways of sharing weights."""
    layers = cfg.tuning.layers or max(1, models.policy.shape.layers // HYDRA_SHARE)
    full = cfg.tuning.model_copy(update={"kind": "full", "layers": None})
    changes = {
        "separate": {"tuning": full, "critic_layers": None},
        "lora": {"tuning": cfg.tuning.model_copy(update={"kind": "lora"})},
        "hydra": {
            "tuning": cfg.tuning.model_copy(update={"kind": "full", "layers": layers}),
            "critic_layers": min(cfg.critic_layers or layers, layers),
        },
    }
    others = {way: cfg.model_copy(update={"sharing": way, **changes[way]}) for way in changes if way != cfg.sharing}
    return {cfg.sharing: cfg, **others}


# --- time -----------------------------------------------------------------------------------------------------


def ppo_seconds(cfg: PPOStage, models: Models, cluster: Cluster, stage: int) -> dict[str, float]:
    """Of a step, every answer as long as it may be."""
    machine, new = cluster.machine, cfg.sampling.max_new_tokens
    flops = step_work(cfg, models).flops([(cfg.max_prompt_tokens, new)] * cfg.batch_size, epochs=cfg.epochs)
    rows, _ = micro_batch(cfg)
    updates = cfg.epochs * cfg.minibatches
    parts = updates * math.ceil(cfg.batch_size / cfg.minibatches / rows)
    setup = Setup(stage, cluster.ranks, machine.on_cpu)
    state = of_ppo(cfg, models, setup)
    rate = machine.flops[cfg.precision]
    seconds = {name: work / rate for name, work in flops.items()}
    seconds["generate"] += decoded_bytes(cfg, models) / _known(machine.bandwidth)
    optimizer = sum(role.optimizer for role in state.roles.values())
    seconds["update"] += updates * optimizer_bytes(optimizer) / _known(machine.bandwidth)
    whole = of_ppo(cfg, models, Setup()).roles
    return {**seconds, **_exchange(whole["policy"] + whole["critic"], cluster, stage, updates=updates, backwards=parts)}


def step_work(cfg: PPOStage, models: Models) -> StepWork:
    """The FLOPs of a step; roles that share stand on the layers that `rlhf.footprint` gives them."""
    depth = models.policy.shape.layers
    own = cfg.tuning.layers or depth
    critic = cfg.critic_layers or own
    begins = {}
    if cfg.sharing == "hydra":
        begins = {
            "policy": depth - own,
            "reference": depth - own,
            "critic": depth - (critic if cfg.critic_init == "policy" else own),
            "reward": depth - own,
        }
    return StepWork(
        policy=models.policy.shape,
        critic=models.critic.shape,
        reference=models.reference.shape,
        reward=models.reward.shape if models.reward else None,
        trained_layers=cfg.tuning.layers,
        critic_layers=cfg.critic_layers or cfg.tuning.layers,
        trains_weights=cfg.tuning.kind == "full",
        trains_head=cfg.tuning.kind == "full" and cfg.tuning.layers is None,
        begins=begins,
        trunk_is_sampled=cfg.sharing == "hydra" and cfg.sampling.engine == "native",
    )


def decoded_bytes(cfg: PPOStage, models: Models) -> float:
    """Read while a step's answers are sampled: the weights once per token of every round of rows, and of the cache
    what is filled then."""
    dims, size = models.policy, {"bf16": 2, "fp32": 4}[cfg.precision]
    new, places = cfg.sampling.max_new_tokens, min(cfg.sampling.batch_size, cfg.batch_size)
    rounds = math.ceil(cfg.batch_size / places)
    middle = cfg.max_prompt_tokens + new / 2
    weights = size * (dims.products + dims.shape.head_weights)
    return rounds * new * (weights + kv_cache(dims, rows=places, width=1, size=size) * middle)


def optimizer_bytes(state: float) -> float:
    """Moved by one AdamW step on a state of so many bytes: moments are read and written, weights too, gradients read:
    28 bytes for 8 of the state."""
    return 28 / 8 * state


def supervised_seconds(cfg: SFTStage | RewardStage, dims: Dimensions, cluster: Cluster, stage: int) -> dict[str, float]:
    """Of an optimizer step with rows as long as they may be; pairs for a reward model."""
    rows = cfg.batch_size * (2 if isinstance(cfg, RewardStage) else 1)
    load = causal_load([cfg.max_length] * rows)
    flops = training_flops(
        dims.shape,
        load,
        head_positions=load.tokens,
        trained_layers=cfg.tuning.layers,
        trains_weights=cfg.tuning.kind == "full",
        trains_head=cfg.tuning.kind == "full" and cfg.tuning.layers is None,
    )
    setup = Setup(stage, cluster.ranks, cluster.machine.on_cpu)
    state = of_supervised(cfg, dims, setup).roles["model"]
    update = flops / cluster.machine.flops[cfg.precision]
    update += optimizer_bytes(state.optimizer) / _known(cluster.machine.bandwidth)
    whole = of_supervised(cfg, dims, Setup()).roles["model"]
    backwards = math.ceil(cfg.batch_size / cfg.micro_batch_size)
    return {"update": update, **_exchange(whole, cluster, stage, updates=1, backwards=backwards)}


def _exchange(whole: Memory, cluster: Cluster, stage: int, *, updates: int, backwards: int) -> dict[str, float]:
    """Seconds; {} where the way between the devices is not known.

    With G and W the bytes of unsharded gradients and weights, times (N - 1) / N of N ranks (arXiv:1910.02054, section
    7): DDP and stage 1 sum and spread gradients once per update, 2 G; stage 2 sums them in every backward, G, and
    spreads what was updated once, G; stage 3 gathers weights for forward and backward, 2 W + G in every backward.
    """
    if cluster.ranks == 1 or cluster.exchange is None:
        return {}
    summed, gathered = whole.gradients, whole.weights
    moved = {
        0: 2 * updates * summed,
        1: 2 * updates * summed,
        2: (backwards + updates) * summed,
        3: backwards * (summed + 2 * gathered),
    }
    return {"exchange": moved[stage] * (cluster.ranks - 1) / cluster.ranks / cluster.exchange}


def _known(rate: float | None) -> float:
    assert rate is not None, "Machine.reaches was asked"
    return rate


# --- what to lower ----------------------------------------------------------------------------------------------


def advice(cfg: Any, models: Models | Dimensions, cluster: Cluster) -> list[str]:
    """What makes it fit, as keys of the configuration; or how much memory the least of them still needs."""
    found = plans(cfg, models, cluster)
    if fitting := [p for p in found if p.fits(cluster.machine)]:
        own = [p for p in fitting if p.sharing == found[0].sharing]
        best = min(own or fitting, key=lambda p: (sum(p.seconds.values()), p.setup.stage))
        return [f"fits: {described(best, cluster)}"]
    lowered, least = cfg, min(found, key=lambda p: p.resident)
    keys: list[str] = []
    for change in lowerings(cfg):
        lowered = lowered.model_copy(update=change[1])
        keys.append(change[0])
        found = plans(lowered, models, cluster)
        least = min([least, *found], key=lambda p: p.resident)
        if fitting := [p for p in found if p.fits(cluster.machine)]:
            best = min(fitting, key=lambda p: (p.sharing != found[0].sharing, p.setup.stage))
            return [f"fits with {' '.join(keys)}: {described(best, cluster)}"]
    memory = f"{least.resident / 1e9:,.0f} GB per device"
    tried = f" with {' '.join(keys)}" if keys else ""
    return [f"nothing fits. The least{tried} is {memory}: {described(least, cluster)}"]


def lowerings(cfg: Any) -> list[tuple[str, dict[str, Any]]]:
    """(as it is written, changed keys), one after the other: none changes what is learned."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if cfg.micro_batch_size > 1:
        changes.append(("micro_batch_size=1", {"micro_batch_size": 1}))
    if isinstance(cfg, PPOStage):
        if not cfg.gradient_checkpointing:
            changes.append(("gradient_checkpointing=true", {"gradient_checkpointing": True}))
        if cfg.sampling.batch_size > 8:
            sampling = cfg.sampling.model_copy(update={"batch_size": 8})
            changes.append(("sampling.batch_size=8", {"sampling": sampling}))
    elif isinstance(cfg, SFTStage) and not cfg.trainer.get("gradient_checkpointing"):
        trainer = {**cfg.trainer, "gradient_checkpointing": True}
        changes.append(("trainer.gradient_checkpointing=true", {"trainer": trainer}))
    return changes


def described(found: Plan, cluster: Cluster) -> str:
    """In a few words."""
    words = [f"sharing {found.sharing}"] if found.sharing else []
    words += [zero_name(found.setup)] if cluster.ranks > 1 else []
    words.append(f"{found.resident / 1e9:,.1f} of {cluster.machine.memory / 1e9:,.0f} GB")
    if found.seconds:
        words.append(f"at least {sum(found.seconds.values()):,.3g} s per step")
    return ", ".join(words)


def zero_name(setup: Setup) -> str:
    """As the launch files are named."""
    if setup.ranks == 1:
        return "alone"
    return "DDP" if setup.stage == 0 else f"ZeRO-{setup.stage}"
