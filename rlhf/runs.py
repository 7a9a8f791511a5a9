"""What every run of a stage writes: config.yaml, environment.json, result.json; how it is resumed; what it read."""

from __future__ import annotations

import contextlib
import errno
import json
import platform
import resource
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config import dump, fingerprint, resolve_path
from rlhf.config_schema import StageConfig
from rlhf.files import atomic_write, content_digest, remove_torn

if TYPE_CHECKING:  # rlhf.types imports torch, which the command line does without
    from rlhf.types import RunResult

CONFIG, ENVIRONMENT, RESULT = "config.yaml", "environment.json", "result.json"

FREE_TO_CHANGE = frozenset(
    {
        *("run_dir", "tracking", "save_every", "keep_checkpoints", "save_in_background", "samples_per_step"),
        "guards",
        *("archive_rollouts", "micro_batch_size", "micro_batch_tokens", "gradient_checkpointing"),
    }
)
"""Keys that change nothing that is learned but rounding: they may differ on a resume, and make no finished stage run
again."""

ADDED_LATER: dict[str, Any] = {
    **dict.fromkeys(("judge", "project", "earlier", "ensemble", "critic", "reward_aggregate", "reward_std_coef")),
    "round_dirs": [],
}
"""Keys that are younger than runs on some disks. With these values they do not count, so that what was done before they
existed is still done, and its checkpoints still fit."""

RANKINGS, HELDOUT_RANKINGS = "rankings.train.jsonl", "rankings.heldout.jsonl"
"""What `label` writes for training and for testing."""

_FREE_OF_A_JUDGE = ("endpoint", "budget", "local_batch_size", "max_failures")
_LEARNED_OF_AN_ENDPOINT = ("logprobs", "structured", "max_answer_tokens", "request")
_ROLLOUT_KEYS = ("rollouts", "heldout_rollouts")
MODEL_KEYS = ("model", "reference", "base", "reward_model", "critic")
PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "peft", "datasets", "wandb")

_LABELING = (
    "fastapi uvicorn sqlalchemy alembic argon2 markdown_it linkify_it nh3 "
    "krippendorff sklearn statsmodels crowdkit pandas"
)
INSTALLS = {
    **{package: package for package in PACKAGES},
    **dict.fromkeys(_LABELING.split(), "'rlhf-pipeline[labeling]'"),
    "psycopg": "'rlhf-pipeline[postgres]'",
    **dict.fromkeys(("openai", "httpx2"), "'rlhf-pipeline[judge]'"),
}
"""What pip installs, by the name of the module that is missing."""


@dataclass(frozen=True)
class RunOptions:
    """How a stage is run, as opposed to what it does.

    `resume`: "auto" goes on from the newest verified checkpoint of this run folder, "never" starts anew; else the
    folder of a checkpoint.
    `profile` (PPO): a trace of one step, and the share of the machine that each phase reached.
    """

    resume: str = "auto"
    profile: bool = False


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    versions = {}
    for package in PACKAGES:
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

    That writes result.json, the sign that the stage is done. A run that ends before it wrote anything of its own
    (refused, interrupted or crashed) leaves the folder as it was: what stands there is still the run before it. Once
    it wrote something, its config.yaml stays, and the earlier result.json goes.

    Raises:
        OSError: naming a path; the folder cannot be made or written, or the disk is full.
    """
    began = time.perf_counter()
    folder = Path(cfg.run_dir)
    remove_torn(folder)
    earlier = _EarlierRun(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / CONFIG, dump(cfg))
        atomic_write(folder / ENVIRONMENT, json.dumps(environment(), indent=1))
        yield lambda result: _finish(cfg, stage, result, time.perf_counter() - began)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.filename = str(folder)  # a failed write names no file
        with contextlib.suppress(OSError):  # the first error is the one to show
            earlier.put_back_or_end()
        raise


class _EarlierRun:
    """What a run folder holds before a run begins."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._missing = [path for path in (folder, *folder.parents) if not path.exists()]
        files = {name: folder / name for name in (CONFIG, ENVIRONMENT)}
        self._records = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
        self._outputs = _outputs(folder)

    def put_back_or_end(self) -> None:
        """Undo what `recorded` wrote; but once the new run wrote something too, the earlier one is no longer done."""
        if not _outputs(self._folder) <= self._outputs:
            (self._folder / RESULT).unlink(missing_ok=True)
            return
        for name in (CONFIG, ENVIRONMENT):
            if name in self._records:
                atomic_write(self._folder / name, self._records[name])
            else:
                (self._folder / name).unlink(missing_ok=True)
        for path in self._missing:
            path.rmdir()  # refuses, and ends this, where something is in it


def _outputs(folder: Path) -> set[tuple[int, int, int]]:
    """(inode, size, time) of every file of a run but its records and W&B's own: a renamed file keeps all three."""
    found = set()
    ours = {folder / name for name in (CONFIG, ENVIRONMENT, "wandb")}
    for path in folder.rglob("*"):
        if not ours.isdisjoint((path, *path.parents)):
            continue
        with contextlib.suppress(OSError):  # gone meanwhile
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                found.add((status.st_ino, status.st_size, status.st_mtime_ns))
    return found


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
    atomic_write(Path(cfg.run_dir) / RESULT, json.dumps(record, indent=1, default=str))


def peak_rss_gb() -> float:
    """Largest resident set of this process, in 1e9 bytes."""
    kilo = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo / 1e9, 3)


# --- what a run reads and learns from -------------------------------------------------------------------------


def learned_fingerprint(cfg: StageConfig, *, processes: int = 1) -> str:
    """Fingerprint of every key that changes what is learned; of `batch_size`, which counts per process, the whole.

    How many answers are sampled at a time is free with our own engine: each draws from a seed of its own. Of a judge,
    where it is asked and what it may cost are free.
    """
    keys = {k: v for k, v in cfg.model_dump(mode="json").items() if k not in FREE_TO_CHANGE}
    keys = {k: v for k, v in keys.items() if k not in ADDED_LATER or v != ADDED_LATER[k]}
    if (sampling := keys.get("sampling") or {}).get("engine") == "native":
        keys["sampling"] = {k: v for k, v in sampling.items() if k != "batch_size"}
    if judge := keys.get("judge"):
        keys["judge"] = {k: v for k, v in judge.items() if k not in _FREE_OF_A_JUDGE} | _answering(judge)
    return fingerprint(keys | ({"batch_size": keys["batch_size"] * processes} if "batch_size" in keys else {}))


def _answering(judge: dict[str, Any]) -> dict[str, Any]:
    endpoint = judge["endpoint"]
    return {"endpoint": endpoint and {k: endpoint[k] for k in _LEARNED_OF_AN_ENDPOINT}}


def named_data(cfg: StageConfig) -> set[str]:
    """Every data set that a configuration names, by its `path`, the rollouts to be labeled, and earlier labels."""
    plain = cfg.model_dump(mode="json")
    named = _paths(plain) | {plain[key] for key in _ROLLOUT_KEYS if isinstance(plain.get(key), str)}
    if plain.get("earlier"):
        named |= {str(Path(plain["earlier"]) / name) for name in (RANKINGS, HELDOUT_RANKINGS)}
    return named


def named_models(cfg: StageConfig) -> set[str]:
    """Every model that a configuration names: folders, hub ids, our short name."""
    plain = cfg.model_dump(mode="json")
    named = [plain.get(key) for key in MODEL_KEYS] + plain.get("further_models", [])
    named += (plain.get("policies") or {}).values()
    if (judge := plain.get("judge")) and judge["endpoint"] is None:
        named.append(judge["model"])
    return {name for name in named if isinstance(name, str)}


def digests(names: Iterable[str], *, exact: bool) -> dict[str, str]:
    """Name -> digest of its content now, for those that are on this disk; `exact` as in `content_digest`."""
    found = {name: content_digest(Path(resolve_path(name)).expanduser(), exact=exact) for name in names}
    return {name: digest for name, digest in found.items() if digest is not None}


def _paths(node: Any) -> set[str]:
    if isinstance(node, dict):
        here = {node["path"]} if isinstance(node.get("path"), str) else set()
        return here.union(*(_paths(value) for value in node.values()))
    return set()
