"""LoRA adapters on disk, in peft's layout. Such a folder can stand wherever a model is named: it knows its base, which
may be the folder of another adapter."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhf.checkpoint import MANIFEST, export_folder
from rlhf.errors import ModelError
from rlhf.models.tuning import tied_ends

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _HEAD = "base_model.model.", "score"
_OTHER_KINDS = (
    "use_dora",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "ensure_weight_tying",
)
"""What peft's LoRA can be besides `W + scale * B A`; folding knows nothing of it."""


def adapter_folder(name: str) -> Path | None:
    """The folder, if `name` is one that holds an adapter and no model."""
    folder = Path(name).expanduser()
    holds_model = (folder / "config.json").is_file()
    return folder if (folder / CONFIG_FILE).is_file() and not holds_model else None


def described(folder: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        ModelError: it or the weights cannot be read, it does not name its base, or is not plain LoRA.
    """
    file = folder / CONFIG_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind, base = found.get("peft_type"), found.get("base_model_name_or_path")
    except (ValueError, AttributeError, OSError) as error:
        raise ModelError(f"{file} is damaged ({error})", fix="restore it, or train the adapter again") from None
    others = [f"LoRA with {key}" for key in _OTHER_KINDS if found.get(key)]
    if kind != "LORA" or others:
        kinds = ", ".join(others) or kind
        raise ModelError(f"{folder} holds an adapter of kind {kinds}", fix="use plain LoRA, or fold it with peft")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{file} does not say which model it adapts", fix="set base_model_name_or_path in it")
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(f"{folder} holds no {WEIGHTS_FILE}", fix="save the adapter again, as safetensors")
    return found


def chain_of(name: str) -> list[Path]:
    """The adapters that `name` stands for, outermost first: each one's base is the next; [] for a model.

    Raises:
        ModelError: as `described`; or an adapter is its own base in the end.
    """
    found: list[Path] = []
    while (folder := adapter_folder(name)) is not None:
        if folder.resolve() in [other.resolve() for other in found]:
            raise ModelError(
                f"the adapter in {folder} is its own base", fix=f"correct base_model_name_or_path in its {CONFIG_FILE}"
            )
        found.append(folder)
        name = base_of(folder)
    return found


def base_of(folder: Path) -> str:
    """The model that the adapter was trained over."""
    return described(folder)["base_model_name_or_path"]


def has_score_head(folder: Path) -> bool:
    """Whether the adapter makes a reward model of its base."""
    return _HEAD in (described(folder).get("modules_to_save") or ())


def save_adapter(
    handle: Any, folder: Path, *, head: Any = None, further: Callable[[Path], object] | None = None
) -> bool:
    """Write the adapter by itself, unrounded; False when there is none, and an earlier run's is taken away.

    Args:
        handle: what `apply_tuning` gave.
        head: a scalar head that was trained with it. It is written as peft's own reward models have it, so that
            `AutoPeftModelForSequenceClassification` reads the folder, too.
        further: writes further files into the folder that it is given.
    """
    if not hasattr(handle, "unload"):
        if (folder / MANIFEST).is_file():
            shutil.rmtree(folder)
        return False
    with export_folder(folder) as staging:
        handle.save_pretrained(staging, save_embedding_layers=False)  # they are not trained
        config = json.loads((staging / CONFIG_FILE).read_text(encoding="utf-8"))
        base = Path(config["base_model_name_or_path"] or "").expanduser()
        if base.is_dir():  # from wherever it will be read
            config["base_model_name_or_path"] = str(base.absolute())
        if head is not None:
            weights = load_file(staging / WEIGHTS_FILE)
            weights |= {f"{_PREFIX}{_HEAD}.{name}": p.detach().cpu().clone() for name, p in head.named_parameters()}
            save_file(weights, staging / WEIGHTS_FILE, metadata={"format": "pt"})
            config |= {"task_type": "SEQ_CLS", "modules_to_save": [_HEAD]}
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        if further is not None:
            further(staging)
    return True


def put_in(model: Any, folder: Path) -> Any:
    """Put the adapter, frozen and in float32, into a model that was loaded from its base; its scalar head, too.

    Returns:
        The PeftModel.

    Raises:
        ModelError: the adapter is incomplete, or made for another model.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    try:
        config: Any = LoraConfig.from_pretrained(str(folder))
        weights = load_file(folder / WEIGHTS_FILE)
        head = {name: weights.pop(name) for name in list(weights) if name.startswith(f"{_PREFIX}{_HEAD}.")}
        if head and not hasattr(model, _HEAD):
            raise ModelError(f"{folder} is the adapter of a reward model, not of a policy", fix="give a policy's")
        if bool(head) != has_score_head(folder):
            raise ValueError("its head is in only one of configuration and weights")
        if touched := _tied_weights(model, weights):
            raise ValueError(f"{touched} is tied to another matrix, which would change with it")
        # What was loaded has its base's name, which may be spelled otherwise; and heads are put in here.
        config.base_model_name_or_path = config.modules_to_save = config.task_type = None
        config.inference_mode = True
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # as `apply_tuning`
            handle = get_peft_model(model, config)
        found = set_peft_model_state_dict(handle, weights)
        lacking = [name for name in found.missing_keys if "lora_" in name]
        if found.unexpected_keys or lacking:
            raise ValueError(f"weights of other layers, as {[*found.unexpected_keys, *lacking][0]}")
        if head:
            getattr(model, _HEAD).float().load_state_dict({name.rpartition(".")[2]: w for name, w in head.items()})
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        last_line = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()[:200]
        raise ModelError(
            f"the adapter in {folder} cannot be put into {base_of(folder)} ({last_line})",
            fix="check that this is the model it was trained over, or train it again",
        ) from None
    model.requires_grad_(False)
    return handle


def _tied_weights(model: Any, weights: dict[str, Any]) -> str | None:
    """The name of an embedding or head that shares its matrix with another module and that `weights` change."""
    names = tied_ends(model)
    return next((name for name in names for key in weights if key.startswith(f"{_PREFIX}{name}.")), None)
