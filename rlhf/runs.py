"""What every run of a stage writes: config.yaml, environment.json, result.json; and how it is resumed."""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import dump, fingerprint
from rlhf.config_schema import StageConfig
from rlhf.errors import CheckpointError
from rlhf.files import atomic_write

if TYPE_CHECKING:  # rlhf.types imports torch, which the command line does without
    from rlhf.types import RunResult

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "peft", "datasets", "wandb")


@dataclass(frozen=True)
class RunOptions:
    """How a stage is run, as opposed to what it does.

    `resume`: "auto" goes on from the newest verified checkpoint of this run folder, "never" starts anew.
    """

    resume: str = "auto"


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git": git_revision(),
        "packages": versions,
    }


def git_revision() -> str | None:
    """Revision of the code, with `-dirty` for uncommitted changes; None outside of a clone."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


@contextlib.contextmanager
def recorded(cfg: StageConfig, stage: str) -> Iterator[Callable[[RunResult], None]]:
    """Make the run folder and write down what runs; call what this yields with the result.

    That writes result.json, the sign that the stage is done. A run that is refused because the checkpoints belong to
    another configuration leaves the config.yaml that they do belong to.
    """
    began = time.perf_counter()
    folder = Path(cfg.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    earlier = path.read_text(encoding="utf-8") if path.exists() else None
    atomic_write(path, dump(cfg))
    atomic_write(folder / "environment.json", json.dumps(environment(), indent=1))
    try:
        yield lambda result: _finish(cfg, stage, result, time.perf_counter() - began)
    except CheckpointError:
        if earlier is not None:
            atomic_write(path, earlier)
        raise


def _finish(cfg: StageConfig, stage: str, result: RunResult, wall_s: float) -> None:
    record = {
        "stage": stage,
        "config_sha256": fingerprint(cfg),
        "seed": cfg.seed,
        "wall_s": round(wall_s, 2),
        "peak_rss_gb": peak_rss_gb(),
        "summary": result.summary,
        "outputs": result.outputs,
    }
    atomic_write(Path(cfg.run_dir) / "result.json", json.dumps(record, indent=1, default=str))


def peak_rss_gb() -> float:
    """Largest resident set of this process, in 1e9 bytes."""
    kilo = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9, 3)
