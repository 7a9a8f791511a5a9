"""Files that are whole or not there, and what identifies their content. No torch import: the command line uses it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path

MANIFEST = "MANIFEST.json"
"""Holds the SHA-256 of every other file of a folder that we wrote (`rlhf.checkpoint`)."""


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Replace `path` by `data` so that a reader, or a crash, sees the old file or the new one.

    Text is written as UTF-8. The folder must exist.

    Raises:
        OSError: naming `path`; the disk is full or the folder not writable. The old file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):  # a failed write names no file, a failed open the temporary one
            error.filename = str(path)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def remove_torn(folder: Path) -> None:
    """Remove what an `atomic_write` left below `folder` when its process was killed."""
    for path in folder.rglob(".*.tmp"):
        name = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
        if name and not _is_running(int(name[1])):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; no pid of ours
        pass
    return True


def fsync_path(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of one file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path, *, exact: bool, above: tuple[Path, ...] = ()) -> str | None:
    """What identifies the content of a data file, or of a model's folder; None when there is neither.

    A folder with a manifest is identified by it: it holds the hash of every file. An adapter is nothing without its
    base: where that is a folder of this disk, it counts, too.

    Args:
        exact: a folder without a manifest is read to its end. False: names, sizes and times of its files stand for
            their content, at no cost; a copy then counts as another one.
        above: adapters whose base this is.
    """
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        return None
    base = _adapted_by(path)
    above = (*above, path.resolve())
    if base is not None and base.resolve() not in above:  # one that is its own base is refused where it is loaded
        parts = [_folder_digest(path, exact=exact), content_digest(base, exact=exact, above=above)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return _folder_digest(path, exact=exact)


def _adapted_by(folder: Path) -> Path | None:
    """The base of the adapter in `folder`, where it holds one and no model."""
    file = folder / "adapter_config.json"
    if (folder / "config.json").is_file() or not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        return None
    return Path(base).expanduser() if isinstance(base, str) and base else None


def _folder_digest(path: Path, *, exact: bool) -> str:
    if (path / MANIFEST).is_file():
        return sha256_of(path / MANIFEST)
    files = sorted(file for file in path.iterdir() if file.is_file())
    parts = [[file.name, file.stat().st_size, sha256_of(file) if exact else file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
