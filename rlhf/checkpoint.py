"""One run directory: checkpoints that are whole or absent, and final folders with a manifest.

    checkpoints/step_N/{<name>.safetensors ..., state.json, MANIFEST.json}

A checkpoint is written into a staging folder, hashed, described by `MANIFEST.json` last, and appears under
its name by one rename; a process killed at any point leaves the older ones untouched. Reading trusts a folder
only after the size and SHA-256 of every file agree with the manifest: a flipped bit loads silently from every
tensor format. safetensors and JSON only; nothing here can execute what it reads.

With several ranks each writes and hashes files of its own in one shared staging folder; when all have said that they
are done, rank 0 writes the manifest and renames. What one of them cannot do, all of them report.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rlhf.errors import CheckpointError
from rlhf.files import atomic_write, fsync_path
from rlhf.tensor_files import TensorFiles, write_tensors
from rlhf.types import Alone, Ranks

FORMAT = 1
MANIFEST, STATE = "MANIFEST.json", "state.json"
SPACE_FACTOR = 1.05
"""Free disk space asked for before a save, as a multiple of the tensors' bytes."""
_DISK_FIX = "free disk space or set run_dir to another disk; older checkpoints are intact"

Json = dict[str, Any]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: str | Path, head: Json, known: Mapping[str, Json] | None = None) -> None:
    """Hash every file below `folder` and bring all of it to the disk, the manifest last.

    Args:
        folder: holds the finished files.
        head: further entries of the manifest, e.g. `step` and `meta`.
        known: file -> what `_describe` gave for it on the rank that wrote it.
    """
    folder, files = Path(folder), {}
    for path in _files_below(folder):
        name = path.relative_to(folder).as_posix()
        files[name] = (known or {}).get(name) or _describe(path)
    for inner in sorted({path.parent for path in _files_below(folder)} - {folder}, reverse=True):
        fsync_path(inner)
    # Through JSON once, so that the hash is of what a reader gets (text keys, lists for tuples).
    body = json.loads(json.dumps({"format": FORMAT, **head, "files": files}))
    atomic_write(folder / MANIFEST, _manifest_text(body))


def _describe(path: Path) -> Json:
    """Bring a file to the disk; its size and SHA-256."""
    fsync_path(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def verify_folder(path: str | Path, *, rank: int = 0, world_size: int = 1) -> Json:
    """The manifest of a folder whose every file has the size and SHA-256 that it states.

    Args:
        rank: of `world_size` that share the work: this one reads every `world_size`-th file.

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
    for name, expected in list(files.items())[rank::world_size]:
        if problem := _file_problem(folder / name, expected):
            raise CheckpointError(f"{folder / name} {problem}", fix=fix)
    return manifest


def _file_problem(path: Path, expected: Json) -> str:
    """What is wrong with one file of a manifest; empty when nothing is."""
    try:
        size = path.stat().st_size
        if size != expected["size"]:
            return f"has {size} bytes, not the {expected['size']} of its manifest"
        return "" if _sha256(path) == expected["sha256"] else "was altered: its sha256 does not agree"
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
        files: names of the verified files; whatever else lies in the folder is not read.
    """

    path: Path
    step: int
    state: Json
    meta: Json
    files: tuple[str, ...]

    def tensors(self, name: str) -> TensorFiles:
        """The tensors saved under `name`, by all ranks that there were.

        Raises:
            CheckpointError: this checkpoint has no such file.
        """
        groups = {file: re.sub(r"(-\d+-of-\d+)?\.safetensors$", "", file) for file in self.files if file != STATE}
        mine = [self.path / file for file, group in groups.items() if group == name]
        if not mine:
            known = ", ".join(sorted(set(groups.values())))
            fix = "resume with the configuration that wrote it"
            raise CheckpointError(f"{self.path} has no tensors {name!r}; it has {known or 'none'}", fix=fix)
        return TensorFiles(mine)


def open_checkpoint(path: str | Path, *, ranks: Ranks | None = None) -> Checkpoint:
    """One checkpoint, verified; with several ranks they share the reading, and agree.

    Raises:
        CheckpointError: on every rank; a file is missing, cut short or altered, or it is no checkpoint.
    """
    folder, ranks = Path(path), ranks or Alone()
    manifest, problem = {}, ""
    try:
        manifest = verify_folder(folder, rank=ranks.rank, world_size=ranks.world_size)
        if not isinstance(manifest.get("step"), int) or STATE not in manifest["files"]:
            problem = f"{folder} is no checkpoint"
    except CheckpointError as error:
        problem = error.message
    problems = [text for text in ranks.gather_objects([problem]) if text]
    if problems:
        raise CheckpointError(problems[0], fix="give another checkpoint, or restore this one from a copy")
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return Checkpoint(folder, manifest["step"], state, manifest["meta"], tuple(sorted(manifest["files"])))


@dataclass
class _Pending:
    """A checkpoint whose files are being written; `written`: this rank's, with size and hash."""

    step: int
    staging: Path
    meta: Json
    written: Future[dict[str, Json]]


class Checkpoints:
    """The checkpoints of one run. With several ranks, all of them call `save` and `latest` at the same time.

    Args:
        run_dir: the run directory, the same for all ranks; checkpoints live in its folder `checkpoints`.
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
        ranks: Ranks | None = None,
        writer: bool = True,
    ) -> None:
        if keep < 2:
            raise ValueError(f"keep is {keep}; keep at least 2 checkpoints, one may turn out to be damaged")
        self.folder = Path(run_dir) / "checkpoints"
        self.keep = keep
        self._say = say
        self._ranks = ranks or Alone()
        self._pending: _Pending | None = None
        self._writer = writer
        if writer and self._is_main and self.folder.is_dir():
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

    @property
    def _is_main(self) -> bool:
        return self._ranks.rank == 0

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Json,
        meta: Json,
        *,
        in_background: bool = False,
    ) -> Path:
        """Write the checkpoint of `step`, then prune older ones.

        Args:
            step: the last step that is contained; a checkpoint of the same step is replaced.
            tensors: file name (without suffix) -> name -> tensor, of this rank: whole, or pieces (`piece_name`).
            state: counters, KL coefficient, data cursor ..; JSON types with text keys only. Rank 0's is written.
            meta: configuration fingerprint and versions, for the manifest. Rank 0's is written.
            in_background: copy the tensors and return; the checkpoint is there once `commit_if_written` says so. An
                earlier one that is still being written is waited for.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: on every rank, when one of them cannot write; older checkpoints are intact.
        """
        if not self._writer:
            raise RuntimeError("save was called on a reader")
        self.commit_if_written(wait=True)
        staging = self.folder / f".staging-step_{step}"
        sizes = self._ranks.gather_objects(
            [sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())]
        )
        self._together(step, lambda: self._begin(step, staging, sum(sizes)) if self._is_main else None)
        text = json.dumps(state, indent=1)  # now: training goes on changing it
        if in_background:
            tensors = {name: {k: t.detach().cpu().clone() for k, t in group.items()} for name, group in tensors.items()}
        pool = ThreadPoolExecutor(1)
        self._pending = _Pending(step, staging, meta, pool.submit(self._write, staging, tensors, text))
        pool.shutdown(wait=not in_background)
        if not in_background:
            self.commit_if_written(wait=True)
        return self._path(step)

    def commit_if_written(self, *, wait: bool = False) -> bool:
        """Make a checkpoint that is written in the background valid, when all ranks have written their part.

        All ranks call it; `wait` until they have.

        Returns:
            Whether nothing is pending any more.

        Raises:
            CheckpointError: on every rank, when one of them could not write; older checkpoints are intact.
        """
        pending = self._pending
        if pending is None:
            return True
        if not wait and not all(self._ranks.gather_objects([pending.written.done()])):
            return False
        self._pending = None
        step, staging, meta = pending.step, pending.staging, pending.meta
        try:
            written = self._together(step, pending.written.result)
            known = {name: entry for files in written for name, entry in files.items()}
            self._together(step, lambda: self._commit(staging, step, meta, known) if self._is_main else None)
        finally:
            if self._is_main:
                shutil.rmtree(staging, ignore_errors=True)  # gone already, unless the save failed
        return True

    def _together(self, step: int, action: Callable[[], Any]) -> list[Any]:
        """Run `action` on every rank; what each returned. If one of them failed, every rank raises.

        Raises:
            CheckpointError: with what every failed rank says.
        """
        problem, value = "", None
        try:
            value = action()
        except CheckpointError as error:
            problem = error.message
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            kind = "" if isinstance(error, OSError | SafetensorError) else f"{type(error).__name__}: "
            problem = f"cannot write {self._path(step)}: {kind}{error}"
        outcomes = self._ranks.gather_objects([(problem, value)])
        problems = list(dict.fromkeys(problem for problem, _ in outcomes if problem))
        if problems:
            raise CheckpointError("\n".join(problems), fix=_DISK_FIX)
        return [value for _, value in outcomes]

    def _begin(self, step: int, staging: Path, bytes_: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_space(step, bytes_)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()

    def _write(self, staging: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: str) -> dict[str, Json]:
        """This rank's files, on the disk; with size and hash."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        suffix = f"-{rank + 1:05d}-of-{world_size:05d}" if world_size > 1 else ""
        paths = []
        for name, group in tensors.items():
            paths.append(staging / f"{name}{suffix}.safetensors")
            write_tensors(paths[-1], group)
        if self._is_main:
            paths.append(staging / STATE)
            paths[-1].write_text(state, encoding="utf-8")
        return {path.name: _describe(path) for path in paths}

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies, older ones being tried aloud; None when there are none.

        Raises:
            CheckpointError: there are checkpoints, and all of them are damaged.
        """
        damaged = []
        for step in reversed(self._ranks.gather_objects([self.steps()])[0]):
            try:
                found = open_checkpoint(self._path(step), ranks=self._ranks)
                if found.step != step:
                    raise CheckpointError(f"{self._path(step)} holds step {found.step}")
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

    def set_aside_after(self, step: int) -> None:
        """Move checkpoints after `step` to `checkpoints.old-N`: never resumed by mistake, never lost."""
        later = [s for s in self.steps() if s > step]
        if not later:
            return
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.old-{number}")).exists():
            number += 1
        aside.mkdir()
        for s in later:
            os.rename(self._path(s), aside / self._path(s).name)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _commit(self, staging: Path, step: int, meta: Json, known: Mapping[str, Json]) -> None:
        """Make the staging folder the checkpoint of `step`; from here on older ones may go."""
        write_manifest(staging, {"step": step, "meta": meta}, known)
        final = self._path(step)
        _swap_in(staging, final, aside=self.folder / f".replaced-step_{step}")
        # Only those up to this step are counted: later ones belong to a time line that was found damaged.
        for old in [s for s in self.steps() if s <= step][: -self.keep]:
            shutil.rmtree(self._path(old), ignore_errors=True)

    def _check_space(self, step: int, bytes_: int) -> None:
        needed, free = int(bytes_ * SPACE_FACTOR), shutil.disk_usage(self.folder).free
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
        CheckpointError: the same, where safetensors says so.
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
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {path}: {error}", fix=_DISK_FIX) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already, unless something failed
