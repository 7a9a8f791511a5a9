"""Which parameters are trained: all of them, or LoRA adapters. The only door to peft."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rlhf.config_schema import OptimConfig, TuningConfig
from rlhf.errors import ConfigError


def backbone_of(model: Any) -> Any:
    """A transformers model without its head."""
    return getattr(model, model.base_model_prefix)


def layers_of(backbone: Any) -> nn.ModuleList:
    """The layers, whatever this kind of model calls them."""
    lists = [m for m in backbone.children() if isinstance(m, nn.ModuleList)]
    return next(m for m in lists if len(m) == backbone.config.num_hidden_layers)


def lora_config(cfg: TuningConfig, layers: nn.ModuleList) -> Any:
    """The adapter's description for peft, for a model of these layers.

    Raises:
        ConfigError: a pattern for names together with `layers`, which peft cannot combine.
    """
    from peft import LoraConfig

    top, names = None, cfg.target_modules
    if cfg.layers is not None:
        top = list(range(len(layers) - cfg.layers, len(layers)))
        if names == "all-linear":
            linear = [name for name, m in layers.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
            names = sorted({name.rpartition(".")[2] for name in linear})
        elif isinstance(names, str):
            raise ConfigError(f"tuning.target_modules {names!r} with tuning.layers", fix="list the modules' names")
    return LoraConfig(
        r=cfg.rank, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, target_modules=names, layers_to_transform=top
    )


def storage_dtype(cfg: TuningConfig, precision: torch.dtype) -> torch.dtype:
    """Weights that are trained stay float32 (an update of 1e-6 vanishes in bf16's 3 digits); frozen ones do not."""
    return torch.float32 if cfg.kind == "full" else precision


def train_fully(model: Any, layers: int | None, precision: torch.dtype) -> None:
    """All parameters are trained, or those of the `layers` top layers and the final norm; the rest gets `precision`."""
    model.requires_grad_(layers is None)
    if layers is None:
        return
    backbone = backbone_of(model)
    blocks = layers_of(backbone)
    norms = [m for m in backbone.children() if m is not blocks and "Norm" in type(m).__name__]
    for module in [*blocks[len(blocks) - layers :], *norms]:
        module.requires_grad_(True)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(precision)


def apply_tuning(model: Any, cfg: TuningConfig, precision: torch.dtype, *, head: nn.Module | None = None) -> Any:
    """Make the right parameters trainable, in place.

    Args:
        model: a transformers model; with LoRA its linear layers are replaced by adapted ones. An adapter that it
            came with learns on as it is, whatever the rank.
        precision: what frozen weights are kept in.
        head: a new scalar head, trained whatever the tuning.

    Returns:
        What `merge_tuning` needs: the PeftModel, or `model` itself.

    Raises:
        ConfigError: no module has a name in `target_modules`, or the model has fewer than `layers` layers.
    """
    layers = layers_of(backbone_of(model))
    if cfg.layers is not None and cfg.layers > len(layers):
        raise ConfigError(
            f"tuning.layers is {cfg.layers}, the model has {len(layers)}", fix=f"set at most {len(layers)}"
        )
    if cfg.kind == "full":
        train_fully(model, cfg.layers, precision)
        if head is not None:
            head.float().requires_grad_(True)
        return model
    if lora_layers(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        if head is not None:
            head.float().requires_grad_(True)
        return model
    from peft import get_peft_model

    # peft's "all-linear" spares the output layer of a language model, but knows nothing of a scalar head.
    config = lora_config(cfg, layers)
    if head is not None:
        config.exclude_modules = ["score"]
    tied = tied_ends(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*tie_word_embeddings.*", UserWarning)  # refused below
            # peft reads an attribute that transformers renamed; nothing that a user could change.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            adapted = get_peft_model(model, config)
    except (ValueError, re.error) as error:
        raise ConfigError(f"tuning.target_modules {cfg.target_modules!r}: {error}", fix="use all-linear") from None
    if adapted_ends := [name for name in tied if hasattr(model.get_submodule(name), "lora_A")]:
        raise ConfigError(
            f"tuning.target_modules names {adapted_ends[0]}, which is tied to another matrix: both would change",
            fix="leave it out",
        )
    if head is not None:
        head.float().requires_grad_(True)
    return adapted


def tied_ends(model: Any) -> list[str]:
    """The names of embeddings and output layer where they are one matrix; else none."""
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    if len(ends) < 2 or ends[0].weight is not ends[1].weight:
        return []
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]


def merge_tuning(handle: Any) -> Any:
    """The plain transformers model with its adapters folded into the weights; ends training.

    Args:
        handle: what `apply_tuning` gave, or a model with adapters in it.

    Added in float32 and rounded once. In bf16, which has 3 digits, a small adapter drowns in the weights all the
    same: `save_adapter` keeps it as it is.
    """
    model = handle.get_base_model() if hasattr(handle, "unload") else handle
    layers = {id(layer) for layer in lora_layers(model)}
    for name, layer in [(name, module) for name, module in model.named_modules() if id(module) in layers]:
        base = layer.get_base_layer()
        with torch.no_grad():  # a new tensor: others may share the old one
            base.weight = nn.Parameter(folded_weight(layer).to(base.weight.dtype), requires_grad=False)
        model.set_submodule(name, base)
    if hasattr(model, "peft_config"):  # it would be taken for an adapted model
        del model.peft_config
    return model


def lora_layers(model: Any) -> list[Any]:
    """Every adapted layer."""
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    if not adapted:  # where nothing is adapted, peft need not be there
        return []
    from peft.tuners.lora import LoraLayer

    return [module for module in adapted if isinstance(module, LoraLayer)]


def plain_adapter(module: nn.Module) -> tuple[nn.Module, torch.Tensor, torch.Tensor, float] | None:
    """(base layer, A, B, scale) of a linear layer whose one active adapter only adds `scale * x A' B'`; else None."""
    layer: Any = module
    if not hasattr(layer, "lora_A") or not isinstance(layer.get_base_layer(), nn.Linear):
        return None
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name = layer.active_adapters[0]
    is_plain = name in layer.lora_A and name not in layer.lora_variant and layer.lora_B[name].bias is None
    if not is_plain or not isinstance(layer.lora_dropout[name], nn.Identity):
        return None
    return layer.get_base_layer(), layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]


def shared_copy(model: Any) -> Any:
    """The same modules over the same tensors; adapters that are put into `model` later do not reach the copy."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def adapted_layers(model: Any, plain: Any) -> list[tuple[Any, Any]]:
    """Every LoRA layer of `model` with the plain layer at the same place of its `shared_copy`."""
    adapted = set(lora_layers(model))
    return [(module, plain.get_submodule(name)) for name, module in model.named_modules() if module in adapted]


def folded_weight(layer: Any) -> torch.Tensor:
    """W + scale * B A of a LoRA layer, added in float32."""
    return layer.get_base_layer().weight.float() + layer.get_delta_weight(layer.active_adapters[0]).float()


def trainable_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> parameter of everything that is trained: what a checkpoint holds."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def load_trainable(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `trainable_tensors` gave."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name].copy_(value)


def parameter_groups(module: nn.Module, *, lr: float, weight_decay: float, role: str = "") -> list[dict[str, Any]]:
    """AdamW groups of the trained parameters: matrices decay; norms, biases and scalar heads do not."""
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.dim() >= 2 and ".score." not in f".{name}"
            (decayed if is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [{**g, "lr": lr, "base_lr": lr, "role": role} for g in groups if g["params"]]


def build_optimizer(groups: list[dict[str, Any]], cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW, fused: one pass over memory instead of a dozen."""
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, eps=cfg.eps, fused=True)


def set_lr(optimizer: Any, cfg: OptimConfig, step: int, total: int, *, delay: Mapping[str, int] | None = None) -> float:
    """Set every group's learning rate for optimizer step `step` of `total`; returns the first group's.

    A role's groups wait for `delay[role]` steps and then go through the whole schedule in those that are left. While
    they wait their rate is 0: neither gradient, nor weight decay, nor momentum moves them.

    Stateless, so a resumed run needs no scheduler state.
    """
    for group in optimizer.param_groups:
        waits = (delay or {}).get(group.get("role", ""), 0)
        group["lr"] = group["base_lr"] * lr_factor(cfg, step - waits, total - waits) if step >= waits else 0.0
    return optimizer.param_groups[0]["lr"]


def lr_factor(cfg: OptimConfig, step: int, total: int) -> float:
    """Share of the learning rate at 0-based `step`: linear warm-up, then the schedule; never 0 within the run."""
    warmup = round(cfg.warmup_fraction * total)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if cfg.schedule == "linear":
        return 1.0 - done
    if cfg.schedule == "cosine":
        return 0.5 * (1.0 + torch.cos(torch.tensor(done * torch.pi)).item())
    return 1.0
