"""LoRA adapters on disk, in peft's layout. Such a folder can stand wherever a model is named: it knows its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlhf.checkpoint import export_folder
from rlhf.errors import ModelError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _HEAD = "base_model.model.", "score"


def adapter_folder(name: str) -> Path | None:
    """The folder, if `name` is one that holds an adapter and no model."""
    folder = Path(name).expanduser()
    holds_model = (folder / "config.json").is_file()
    return folder if (folder / CONFIG_FILE).is_file() and not holds_model else None


def described(folder: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        ModelError: it cannot be read, does not name its base, or is not LoRA.
    """
    file = folder / CONFIG_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind, base = found.get("peft_type"), found.get("base_model_name_or_path")
    except (ValueError, AttributeError, OSError) as error:
        raise ModelError(f"{file} is damaged ({error})", fix="restore it, or train the adapter again") from None
    if kind != "LORA":
        raise ModelError(f"{folder} holds an adapter of kind {kind}", fix="use LoRA, or fold it into its model")
    if not base:
        raise ModelError(f"{file} does not say which model it adapts", fix="set base_model_name_or_path in it")
    return found


def base_of(folder: Path) -> str:
    """The model that the adapter was trained over."""
    return str(described(folder)["base_model_name_or_path"])


def has_score_head(folder: Path) -> bool:
    """Whether the adapter makes a reward model of its base."""
    return _HEAD in (described(folder).get("modules_to_save") or ())


def save_adapter(handle: Any, folder: Path, *, head: Any = None, files: dict[str, str] | None = None) -> bool:
    """Write the adapter by itself, unrounded; False when there is none.

    Args:
        handle: what `apply_tuning` gave.
        head: a scalar head that was trained with it. It is written as peft's own reward models have it, so that
            `AutoPeftModelForSequenceClassification` reads the folder, too.
        files: name -> text of further files.
    """
    if not hasattr(handle, "unload"):
        return False
    with export_folder(folder) as staging:
        handle.save_pretrained(staging)
        if head is not None:
            weights = load_file(staging / WEIGHTS_FILE)
            weights |= {f"{_PREFIX}{_HEAD}.{name}": p.detach().cpu().clone() for name, p in head.named_parameters()}
            save_file(weights, staging / WEIGHTS_FILE, metadata={"format": "pt"})
            config = json.loads((staging / CONFIG_FILE).read_text(encoding="utf-8"))
            config |= {"task_type": "SEQ_CLS", "modules_to_save": [_HEAD]}
            (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        for name, text in (files or {}).items():
            (staging / name).write_text(text, encoding="utf-8")
    return True


def put_in(model: Any, folder: Path) -> Any:
    """Put the adapter, frozen and in float32, into a model that was loaded from its base; its scalar head, too.

    Returns:
        The PeftModel.

    Raises:
        ModelError: the adapter is incomplete, or made for another model.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    described(folder)
    try:
        config: Any = LoraConfig.from_pretrained(str(folder))
        weights = load_file(folder / WEIGHTS_FILE)
        head = {name: weights.pop(name) for name in list(weights) if name.startswith(f"{_PREFIX}{_HEAD}.")}
        if head and not hasattr(model, _HEAD):
            raise ModelError(f"{folder} is the adapter of a reward model, not of a policy", fix="give a policy's")
        config.modules_to_save, config.task_type, config.inference_mode = None, None, True
        handle = get_peft_model(model, config)
        found = set_peft_model_state_dict(handle, weights)
        lacking = [name for name in found.missing_keys if "lora_" in name]
        if found.unexpected_keys or lacking:
            raise ValueError(f"weights of other layers, as {[*found.unexpected_keys, *lacking][0]}")
        if head:
            getattr(model, _HEAD).float().load_state_dict({name.rpartition(".")[2]: w for name, w in head.items()})
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        first_line = str(error).splitlines()[0][:200]
        raise ModelError(
            f"the adapter in {folder} cannot be put into {base_of(folder)} ({first_line})",
            fix="check that this is the model it was trained over, or train it again",
        ) from None
    model.requires_grad_(False)
    return handle
