"""`rlhf doctor`: the machine, the packages, the base model; each with what to do when it is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil

from rich.console import Console
from rich.table import Table

from rlhf import __version__
from rlhf.config import shipped_configs
from rlhf.runs import environment

OPTIONAL = {"deepspeed": "ZeRO: pip install 'rlhf-pipeline[deepspeed]'"}


def report() -> None:
    """Print one table; nothing is changed."""
    table = Table(title=f"rlhf {__version__}", show_header=False, title_justify="left")
    for name, value in [*_machine(), *_packages(), *_inputs()]:
        table.add_row(name, value)
    Console().print(table)


def _machine() -> list[tuple[str, str]]:
    import torch

    rows = [("python, torch", f"{environment()['python']}, {torch.__version__}"), ("CPU cores", str(os.cpu_count()))]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    rows.append(("memory", f"{pages / 1e9:.1f} GB"))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            rows.append((f"GPU {i}", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"))
    else:
        rows.append(("GPU", "none: stages run on the CPU"))
    rows.append(("free disk here", f"{shutil.disk_usage('.').free / 1e9:.0f} GB"))
    return rows


def _packages() -> list[tuple[str, str]]:
    rows = []
    for name, version in environment()["packages"].items():
        missing = OPTIONAL.get(name, f"missing: pip install {name}")
        rows.append((name, version or f"missing ({missing})"))
    return rows


def _inputs() -> list[tuple[str, str]]:
    from rlhf.models import bundled

    folder = bundled.cache_folder() / bundled.NAME
    if (folder / "config.json").is_file():
        model = f"converted, in {folder}"
    elif bundled.packaged_gguf() is not None:
        model = "in the installed package; converted on first use"
    else:
        model = f"missing (the hub is tried; without a network: {bundled.INSTALL})"
    wandb_mode = os.environ.get("WANDB_MODE") or (
        "online" if os.environ.get("WANDB_API_KEY") else "offline unless logged in"
    )
    has_textstat = importlib.util.find_spec("textstat") is not None
    configs = sorted(str(p.relative_to(shipped_configs()).with_suffix("")) for p in shipped_configs().rglob("*.yaml"))
    return [
        (bundled.NAME, model),
        ("readability scorer", "ready" if has_textstat else "missing (pip install textstat)"),
        ("W&B", wandb_mode),
        ("shipped configurations", "\n".join(configs)),
        ("launch files", _launch_files()),
    ]


def _launch_files() -> str:
    """Their folder, and how to use it: beside the package in a clone, inside it when a wheel was installed."""
    folder = shipped_configs().parent / "launch"
    use = "from a clone, start in its root"
    if folder.parent.name == "rlhf" and (folder.parent / "cli.py").is_file():
        use = "copy that folder to where you start from: its DeepSpeed files name launch/*.json"
    return f"{folder}\n{use}"
