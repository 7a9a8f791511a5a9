"""One run directory: checkpoints that are whole or absent, and final folders with a manifest.

    checkpoints/step_N/{<name>.safetensors ..., state.json, MANIFEST.json}

A checkpoint is written into a staging folder, hashed, described by `MANIFEST.json` last, and appears under
its name by one rename; a process killed at any point leaves the older ones untouched. Reading trusts a folder
only after the size and SHA-256 of every file agree with the manifest: a flipped bit loads silently from every
tensor format. safetensors and JSON only; nothing here can execute what it reads.

One process writes, as a rule. Where every rank holds a part of the state they fill one staging folder together
(`Checkpoints.staged`), and rank 0 commits it; the other ranks open `Checkpoints(..., writer=False)`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf.errors import CheckpointError
from rlhf.files import atomic_write, fsync_path, sha256_of

FORMAT = 1
MANIFEST, STATE = "MANIFEST.json", "state.json"
SPACE_FACTOR = 1.05
"""Free disk space asked for before a save, as a multiple of the tensors' bytes."""
_DISK_FIX = "free disk space or set run_dir to another disk; older checkpoints are intact"

Json = dict[str, Any]


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file. Tensors may share storage, be strided, or live on any device.

    The same tensor under two names (tied embeddings) is stored once and named in the file's metadata.
    """
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_of: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[str, int]] = set()
    for name, given in tensors.items():
        tensor = given.detach()
        storage = (str(tensor.device), tensor.untyped_storage().data_ptr())
        view = (*storage, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
        if tensor.numel() and view in first_of:
            aliases[name] = first_of[view]
            continue
        first_of[view] = name
        # Overlapping views are refused by safetensors; a copy is the only faithful way to hold them.
        kept[name] = tensor.contiguous() if storage not in storages else tensor.clone().contiguous()
        storages.add(storage)
    save_file(kept, str(path), metadata={"aliases": json.dumps(aliases)} if aliases else None)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """What `write_tensors` wrote, on the CPU, bit for bit; two names of one tensor share it again."""
    with safe_open(str(path), framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    return tensors | {name: tensors[first] for name, first in aliases.items()}


def write_manifest(folder: str | Path, head: Json) -> None:
    """Hash every file below `folder` and bring all of it to the disk, the manifest last.

    Args:
        folder: holds the finished files.
        head: further entries of the manifest, e.g. `step` and `meta`.
    """
    folder, files = Path(folder), {}
    for path in _files_below(folder):
        fsync_path(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    for inner in sorted({path.parent for path in _files_below(folder)} - {folder}, reverse=True):
        fsync_path(inner)
    # Through JSON once, so that the hash is of what a reader gets (text keys, lists for tuples).
    body = json.loads(json.dumps({"format": FORMAT, **head, "files": files}))
    atomic_write(folder / MANIFEST, _manifest_text(body))


def verify_folder(path: str | Path) -> Json:
    """The manifest of a folder whose every file has the size and SHA-256 that it states.

    Raises:
        CheckpointError: naming the file that is missing, cut short or altered.
    """
    folder = Path(path)
    fix = "restore it from a copy, or write it again"
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        files = manifest["files"]
        # The text must be the one we would write, its own hash included: any flipped byte shows.
        intact = text == _manifest_text({k: v for k, v in manifest.items() if k != "sha256"})
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}", fix=fix) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read ({error})", fix=fix) from None
    if not intact:
        raise CheckpointError(f"{folder / MANIFEST} was altered: its own sha256 does not agree", fix=fix)
    if manifest["format"] != FORMAT:
        newer = "use the version of this program that wrote it"
        raise CheckpointError(f"{folder} has format {manifest['format']}, not {FORMAT}", fix=newer)
    for name, expected in files.items():
        if problem := _file_problem(folder / name, expected):
            raise CheckpointError(f"{folder / name} {problem}", fix=fix)
    return manifest


def _file_problem(path: Path, expected: Json) -> str:
    """What is wrong with one file of a manifest; empty when nothing is."""
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"has {size} bytes, not the {expected['size']} of its manifest"
        return "" if sha256_of(path) == expected["sha256"] else "was altered: its sha256 does not agree"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _manifest_text(body: Json) -> str:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1) + "\n"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        step: the last step that is contained.
        state: the JSON state given to `save`.
        meta: the manifest's meta (fingerprint, versions).
    """

    path: Path
    step: int
    state: Json
    meta: Json

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors saved under `name`, on the CPU.

        Raises:
            CheckpointError: this checkpoint has no such file.
        """
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in self.path.glob("*.safetensors")))
            fix = "resume with the configuration that wrote it"
            raise CheckpointError(f"{self.path} has no tensors {name!r}; it has {known or 'none'}", fix=fix)
        return read_tensors(file)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in one folder.

    Raises:
        CheckpointError: it is damaged, or the folder holds none.
    """
    folder = Path(path)
    manifest = verify_folder(folder)
    if not {"step", "meta"} <= manifest.keys() or not (folder / STATE).is_file():
        raise CheckpointError(f"{folder} holds no checkpoint", fix="give the folder of one: checkpoints/step_N")
    return Checkpoint(folder, manifest["step"], json.loads((folder / STATE).read_text("utf-8")), manifest["meta"])


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run_dir: the run directory; checkpoints live in its folder `checkpoints`.
        keep: how many newest ones stay, at least 2: one may turn out to be damaged.
        say: shows one line of text.
        writer: False for a reader, which changes nothing on the disk.
    """

    def __init__(
        self,
        run_dir: str | Path,
        keep: int = 2,
        *,
        say: Callable[[str], None] = print,
        writer: bool = True,
    ) -> None:
        if keep < 2:
            raise ValueError(f"keep is {keep}; keep at least 2 checkpoints, one may turn out to be damaged")
        self.folder = Path(run_dir) / "checkpoints"
        self.keep = keep
        self._say = say
        self._writer = writer
        if writer and self.folder.is_dir():
            for replaced in self.folder.glob(".replaced-*"):  # a crash between the two renames of `_commit`
                _put_back(replaced, self.folder / replaced.name.removeprefix(".replaced-"))
            for leftover in self.folder.glob(".staging-*"):
                shutil.rmtree(leftover)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, verified or not, in rising order."""
        if not self.folder.is_dir():
            return []
        matches = (re.fullmatch(r"step_(\d+)", path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Json, meta: Json) -> Path:
        """Write the checkpoint of `step`, then prune older ones.

        Args:
            step: the last step that is contained; a checkpoint of the same step is replaced.
            tensors: file name (without suffix) -> name -> tensor.
            state: counters, KL coefficient, data cursor, random states ..; JSON types with text keys only.
            meta: configuration fingerprint and versions, for the manifest.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: the disk has not enough space; older checkpoints are intact.
        """
        if not self._writer:
            raise RuntimeError("save was called on a reader; only rank 0 writes checkpoints")
        sizes = (t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        with self.staged(step, meta, needed=sum(sizes)) as staging:
            for name, group in tensors.items():
                write_tensors(staging / f"{name}.safetensors", group)
            (staging / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        return self._path(step)

    @contextlib.contextmanager
    def staged(
        self, step: int, meta: Json, *, needed: int, barrier: Callable[[], None] = lambda: None
    ) -> Iterator[Path]:
        """A folder to be filled, by all ranks together; it becomes the checkpoint of `step`, and older ones go.

        Args:
            needed: bytes that all ranks will write.
            barrier: waits for every rank. All of them come here; the writer makes the folder and commits it.

        Raises:
            CheckpointError: the disk has not enough space; older checkpoints are intact.
        """
        staging = self.folder / f".staging-step_{step}"
        if self._writer:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_space(step, needed)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
        try:
            barrier()
            yield staging
            barrier()
            if self._writer:
                self._commit(staging, step, meta)
            barrier()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write {self._path(step)}: {error}", fix=_DISK_FIX) from error
        finally:
            if self._writer:
                shutil.rmtree(staging, ignore_errors=True)  # gone already, unless the save failed

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, older ones being tried aloud; None when there are none.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        damaged = []
        for step in reversed(self.steps()):
            path = self._path(step)
            try:
                found = read_checkpoint(path)
                if found.step != step:
                    raise CheckpointError(f"{path} holds step {found.step}")
            except CheckpointError as error:
                damaged.append(error.message)
                self._say(f"checkpoint step_{step} is damaged and not used: {error.message}")
                continue
            if damaged:
                self._say(f"falling back to checkpoint step_{step}")
            return found
        if damaged:
            fix = f"restore one from a copy, or remove {self.folder} to start from the beginning"
            raise CheckpointError("no checkpoint verifies:\n  " + "\n  ".join(damaged), fix=fix)
        return None

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _commit(self, staging: Path, step: int, meta: Json) -> None:
        """Make the staging folder the checkpoint of `step`; from here on older ones may go."""
        write_manifest(staging, {"step": step, "meta": meta})
        final = self._path(step)
        _swap_in(staging, final, aside=self.folder / f".replaced-step_{step}")
        # Only those up to this step are counted: later ones belong to a time line that was found damaged.
        for old in [s for s in self.steps() if s <= step][: -self.keep]:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def _check_space(self, step: int, size: int) -> None:
        needed, free = int(size * SPACE_FACTOR), shutil.disk_usage(self.folder).free
        if free < needed:
            wanted = f"it needs {needed:,} bytes, the disk has {free:,} free"
            raise CheckpointError(f"no space for {self._path(step)}: {wanted}", fix=_DISK_FIX)


def _swap_in(staging: Path, final: Path, aside: Path) -> None:
    """Give `staging` its final name; what had it before waits at `aside` and is removed last."""
    if final.exists():
        os.rename(final, aside)
    os.rename(staging, final)
    fsync_path(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _put_back(aside: Path, final: Path) -> None:
    """Finish a `_swap_in` that a crash cut short: the old folder returns unless the new one is there."""
    if final.exists():
        shutil.rmtree(aside)
    elif aside.exists():
        os.rename(aside, final)


@contextlib.contextmanager
def export_folder(path: str | Path, meta: Json | None = None) -> Iterator[Path]:
    """Write a final folder that appears whole, with a manifest, and replaces an older one.

    Args:
        path: the folder that is to be. An older export stays there until the new one is complete; anything
            else of that name is not ours to delete and is moved aside to `<name>.aside-N`.
        meta: for the manifest.

    Yields:
        A staging folder beside `path`, to be filled.

    Raises:
        OSError: the disk is full or the folder not writable; what was there is untouched.
    """
    path = Path(path).resolve()
    staging, old = (path.with_name(f".{word}-{path.name}") for word in ("staging", "old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if old.exists():
        _put_back(old, path)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        write_manifest(staging, {"meta": meta or {}})
        if path.exists() and not (path / MANIFEST).exists():
            taken = len(list(path.parent.glob(f"{path.name}.aside-*")))
            os.rename(path, path.with_name(f"{path.name}.aside-{taken + 1}"))
        _swap_in(staging, path, aside=old)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already, unless something failed


def flatten_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], Json]:
    """Split an optimizer's `state_dict()` into named tensors and JSON.

    Tensors are named `state.<parameter index>.<key>` and `group.<index>.<key>` (a learning rate may be one).
    """
    tensors: dict[str, Tensor] = {}
    state: Json = {}
    for index, entries in state_dict["state"].items():
        state[str(index)] = _split(entries, f"state.{index}", tensors)
    groups = [_split(group, f"group.{i}", tensors) for i, group in enumerate(state_dict["param_groups"])]
    return tensors, {"state": state, "param_groups": groups}


def unflatten_optimizer(tensors: Mapping[str, Tensor], plain: Json) -> dict[str, Any]:
    """What `flatten_optimizer` split, bit for bit, for `optimizer.load_state_dict`.

    Raises:
        CheckpointError: a tensor is missing.
    """
    state = {int(i): _join(entries, f"state.{i}", tensors) for i, entries in plain["state"].items()}
    groups = [_join(group, f"group.{i}", tensors) for i, group in enumerate(plain["param_groups"])]
    return {"state": state, "param_groups": groups}


def _split(entries: Mapping[str, Any], prefix: str, tensors: dict[str, Tensor]) -> Json:
    """The JSON of `entries`; their tensors go into `tensors`. Tuples (betas) are marked to come back."""
    plain: Json = {}
    for key, value in entries.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}.{key}"] = value
            plain[key] = {"tensor": True}
        else:
            plain[key] = {"tuple": list(value)} if isinstance(value, tuple) else {"value": value}
    return plain


def _join(plain: Json, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, marked in plain.items():
        if "tensor" in marked and f"{prefix}.{key}" not in tensors:
            fix = "resume from another checkpoint"
            raise CheckpointError(f"the optimizer state has no tensor {prefix}.{key}", fix=fix)
        if "tensor" in marked:
            entries[key] = tensors[f"{prefix}.{key}"]
        else:
            entries[key] = tuple(marked["tuple"]) if "tuple" in marked else marked["value"]
    return entries


def rng_state() -> tuple[dict[str, Tensor], Json]:
    """The random states of this process: torch on the CPU and its own GPU, Python, numpy when imported."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    plain: Json = {"python": [version, list(words), gauss]}
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = numpy.random.get_state()
        plain["numpy"] = [kind, keys.tolist(), *rest]
    return tensors, plain


def restore_rng(tensors: Mapping[str, Tensor], plain: Json) -> None:
    """Continue the streams that `rng_state` saved; a GPU's state is passed over where there is no GPU."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in plain:
        import numpy

        kind, keys, *rest = plain["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
