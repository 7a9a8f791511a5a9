"""`rlhf plan CONFIG`: tables of memory and time for a configuration, before anything is run or downloaded.

Of models their config.json alone is read, so a folder that holds nothing else will do.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rlhf import config
from rlhf.config_schema import PipelineStage, PPOStage, RewardStage
from rlhf.errors import ConfigError, ModelError
from rlhf.footprint import PROCESS, SPREAD, Models
from rlhf.functional.memory import Dimensions
from rlhf.machine import Machine, gpu_named, this_machine, with_given
from rlhf.planning import Cluster, Plan, advice, plans, zero_name

PLANNED = ("ppo", "sft", "reward", "pipeline")
COLUMNS = {
    "weights": "weights",
    "gradients": "grads",
    "optimizer": "Adam",
    "activations": "activ.",
    "kv_cache": "KV",
    "logits": "logits",
}
"""Kinds of memory, and what stands over their columns: a table must fit into 80 characters."""


@dataclass(frozen=True)
class Options:
    """The command line's: devices per node, nodes, and a device by name or by numbers: GB; (TFLOP/s, GB/s)."""

    gpus: int | None = None
    nodes: int = 1
    gpu: str | None = None
    gpu_memory: float | None = None
    rates: tuple[float, float] | None = None
    as_json: bool = False


def main(name: str, overrides: list[str], options: Options) -> None:
    """Print the plan of a configuration; of a pipeline, of the stages that train, in every round.

    Raises:
        RlhfError: it is not valid, is of a stage that trains nothing, or a model's config.json is not on this disk.
    """
    from rlhf.stages.pipeline import check, stage_of

    stage, cfg = load(name, overrides)
    cluster = cluster_of(options, cfg.precision)
    parts = [(stage, cfg)]
    if isinstance(cfg, PipelineStage):
        parts = [(part, stage_cfg) for part, stage_cfg in check(cfg).items() if stage_of(part) in PLANNED]
    base = cfg.model if isinstance(cfg, PipelineStage) else None
    found = [(part, *models_of(part_cfg, base), part_cfg) for part, part_cfg in parts]
    if options.as_json:
        records = [record(part, part_cfg, models, notes, cluster) for part, models, notes, part_cfg in found]
        json.dump(records[0] if len(records) == 1 else records, sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    console = Console(highlight=False)
    shown: dict[str, tuple[str, Any]] = {}
    for part, models, notes, part_cfg in found:
        numbers = record("", part_cfg, models, [], cluster)
        like, before = shown.get(stage_of(part), ("", None))
        if numbers == before:
            console.print(f"{part}: as {like}", markup=False)
            continue
        shown[stage_of(part)] = (part, numbers)
        show(console, part, part_cfg, models, notes, cluster)


def load(name: str, overrides: list[str]) -> tuple[str, Any]:
    """(stage, its configuration): the first stage that the file is a configuration of.

    Raises:
        ConfigError: it is not valid, or of no stage that can be planned.
    """
    paths = {}
    for stage in PLANNED:
        with contextlib.suppress(ConfigError):
            paths[stage] = config.find_config(name, stage)
    if not paths:
        config.find_config(name, PLANNED[0])  # for its error
    for stage, path in paths.items():
        fields = config.STAGES[stage].model_fields
        required = {key for key, field in fields.items() if field.is_required()}
        if required <= config.read_yaml(path).keys() <= fields.keys():
            return stage, config.load(path, stage, overrides)
    stage = next(iter(paths))
    return stage, config.load(paths[stage], stage, overrides)  # for its errors


def cluster_of(options: Options, precision: str) -> Cluster:
    """The devices that are asked for; without a word of them, this machine.

    Raises:
        ConfigError: a number is not positive, the GPU's name is not known, or there is no memory to fill.
    """
    for key in ("gpus", "nodes"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise ConfigError(f"--{key} {value} is not above 0", fix="give a positive number")
    flops, bandwidth = options.rates or (None, None)
    if options.gpu is not None:
        machine = gpu_named(options.gpu)
    elif options.gpu_memory is not None:
        machine = Machine("a GPU", 0.0, {}, None, None, None)
    elif options.gpus is not None or options.nodes > 1:
        raise ConfigError("how much memory has a GPU?", fix="add --gpu h100 (a name), or --gpu-memory 80 (GB)")
    else:
        machine = this_machine(precision)
    return Cluster(
        with_given(machine, precision, options.gpu_memory, flops, bandwidth), options.gpus or 1, options.nodes
    )


# --- models -----------------------------------------------------------------------------------------------------


def models_of(cfg: Any, base: str | None = None) -> tuple[Models | Dimensions, list[str]]:
    """Dimensions of a stage's models, and what was taken for granted.

    Args:
        base: of a pipeline, whose later stages go on from models that are not there yet.
    """

    def there(name: str) -> str:
        return name if base is None or Path(name).exists() else base

    own = there(cfg.model)
    if not isinstance(cfg, PPOStage):
        return _dimensions("model", own, scalar=isinstance(cfg, RewardStage)), []
    notes = []
    policy = _dimensions("model", own)
    reward = None
    if cfg.reward_model is not None:
        is_here = Path(cfg.reward_model).expanduser().is_dir()
        if not is_here:
            notes.append(f"reward_model {cfg.reward_model} is not on this disk: taken for one of the policy's shape")
        reward = _dimensions("reward_model", cfg.reward_model if is_here else own, scalar=True)
    from_reward = cfg.critic_init == "reward_model" and reward is not None
    critic = reward if from_reward and reward is not None else _dimensions("model", own, scalar=True)
    other = cfg.reference not in (None, cfg.model)
    reference = _dimensions("reference", there(str(cfg.reference))) if other else policy
    if other:
        notes.append(f"sharing hydra: reference {cfg.reference} is taken for one with the policy's lower layers")
    stands = cfg.reward_model is None or not _is_whole(cfg.reward_model)
    notes.append("sharing: critic and reward model are taken for ones that stand on the policy's weights (README.md)")
    if not stands:
        notes[-1] = f"sharing lora: {cfg.reward_model} is a whole model, of which nothing is shared"
    return Models(policy, critic, reference, reward, stands or not from_reward, stands), notes


def _is_whole(name: str) -> bool:
    """A folder with weights of its own, which an adapter's has not."""
    folder = Path(name).expanduser()
    return any(folder.glob("model*.safetensors")) and (folder / "config.json").is_file()


def _dimensions(key: str, name: str, *, scalar: bool = False) -> Dimensions:
    """From a config.json on this disk; nothing is fetched.

    Raises:
        ModelError: there is none, or the model's layers cannot be counted.
    """
    from transformers import AutoConfig

    from rlhf.models.load import resolve_model
    from rlhf.models.shape import dimensions_of

    fix = f"give a folder that holds its config.json: {key}=FOLDER (no weights are needed)"
    try:
        found = AutoConfig.from_pretrained(resolve_model(name), local_files_only=True)
    except ModelError as error:
        raise ModelError(f"{key}: {error.message}", fix=fix) from None
    except (OSError, ValueError):
        raise ModelError(f"{key}: the configuration of {name} is not on this disk", fix=fix) from None
    return dimensions_of(found, scalar=scalar)


# --- what is shown ------------------------------------------------------------------------------------------------


def show(console: Console, stage: str, cfg: Any, models: Any, notes: list[str], cluster: Cluster) -> None:
    """Tables, and what to do."""
    found = plans(cfg, models, cluster)
    machine = cluster.machine
    policy = models.policy if isinstance(models, Models) else models
    where = f"{cluster.nodes} x {cluster.gpus} x {machine.name}" if cluster.ranks > 1 else machine.name
    title = f"{stage}: {policy.parameters / 1e9:,.3g}B parameters, {cfg.precision}, on {where} "
    console.print(_memory(f"{title}({machine.memory / 1e9:,.0f} GB)", found, machine))
    if found[0].seconds:
        console.print(_times(found))
    own = [p for p in found if p.sharing == found[0].sharing]
    shown = next((p for p in own if p.fits(machine)), own[-1])
    console.print(_roles(shown))
    for line in [*advice(cfg, models, cluster), *notes, *_rates(cfg.precision, machine)]:
        console.print(line, markup=False)


def _table(title: str, words: list[str], numbers: list[str], caption: str | None = None) -> Table:
    plain: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", **plain)
    for word in words:
        table.add_column(word, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def _memory(title: str, found: list[Plan], machine: Machine) -> Table:
    head = f"{title}\nGB per device: each kind at its largest, and all that is there at the peak"
    table = _table(head, ["sharing", "spread"], [*COLUMNS.values(), "peak", "fits"])
    for p in found:
        memory = p.footprint.total
        parts = [_short(getattr(memory, column) / 1e9) for column in COLUMNS]
        fits = "yes" if p.fits(machine) else "no"
        table.add_row(p.sharing or "-", zero_name(p.setup), *parts, _short(p.resident / 1e9), fits)
    return table


def _times(found: list[Plan]) -> Table:
    names = list(found[0].seconds)
    table = _table("seconds per step, at least", ["sharing", "spread"], [*names, "step"])
    for p in found:
        seconds = [*p.seconds.values(), sum(p.seconds.values())]
        table.add_row(p.sharing or "-", zero_name(p.setup), *map(_short, seconds))
    return table


def _roles(plan: Plan) -> Table:
    way = f"sharing {plan.sharing}, " if plan.sharing else ""
    phases = ", ".join(f"{name} {_short(size / 1e9)}" for name, size in plan.footprint.phases.items())
    caption = f"tensors of each phase, GB: {phases}; the peak is {SPREAD[plan.setup.on_cpu]} times the largest, and "
    caption += f"{_short(PROCESS[plan.setup.on_cpu] / 1e9)} that are there without a model"
    title = f"roles: {way}{zero_name(plan.setup)}; GB per device"
    table = _table(title, ["role"], list(COLUMNS.values()), caption)
    for role, memory in plan.footprint.roles.items():
        table.add_row(role, *(_short(getattr(memory, column) / 1e9) for column in COLUMNS))
    return table


def _rates(precision: str, machine: Machine) -> list[str]:
    if not machine.reaches(precision):
        return ["no times: add --gpu with a name, or --rates TFLOP/s GB/s"]
    rate, bandwidth = machine.flops[precision], machine.bandwidth or 0.0
    return [f"times from {rate / 1e12:,.3g} TFLOP/s and {bandwidth / 1e9:,.0f} GB/s: a run takes at least that"]


def record(stage: str, cfg: Any, models: Any, notes: list[str], cluster: Cluster) -> dict[str, Any]:
    """The same for programs: bytes and seconds."""
    rows = []
    for p in plans(cfg, models, cluster):
        roles = {role: asdict(memory) for role, memory in p.footprint.roles.items()}
        row = {"sharing": p.sharing, "zero_stage": p.setup.stage, "ranks": p.setup.ranks, "roles": roles}
        rows.append(row | {"phases": p.footprint.phases, "peak": p.resident, "fits": p.fits(cluster.machine)})
        rows[-1]["seconds"] = p.seconds
    policy = models.policy if isinstance(models, Models) else models
    head = {"stage": stage, "parameters": policy.parameters, "machine": asdict(cluster.machine)}
    return {**head, "plans": rows, "advice": advice(cfg, models, cluster), "notes": notes}


def _short(value: float) -> str:
    """Three digits, of which none is below a thousandth."""
    return f"{value:,.0f}" if value >= 1000 else f"{round(value, 3):.3g}"
