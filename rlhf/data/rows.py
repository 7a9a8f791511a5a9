"""Rows of one local file or of one hub data set, each with its place. No opinion on their keys."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import did_you_mean, resolve_path
from rlhf.config_schema import DatasetConfig
from rlhf.errors import DataError

_FILE_FORMATS = ".json, .jsonl, .json.gz, .jsonl.gz or .parquet"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Anything else that looks like `name` or `owner/name`, and is no local path, is a hub id.
_FOREIGN_ENDINGS = (".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst", ".yaml")
_DATA_ENDINGS = (".json", ".jsonl", ".parquet", *_FOREIGN_ENDINGS)


@dataclass
class Row:
    """One row as read; `where` is "file.jsonl:12", or "hub id, row 12" counted from 1."""

    fields: dict[str, Any]
    where: str


@dataclass
class BadRow:
    """A row that cannot be used, and why; `reason` names the key and the fix."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def iterate(cfg: DatasetConfig) -> Iterator[Row | BadRow]:
    """All rows of the data set, blank lines skipped; a line that is no JSON object comes as a `BadRow`.

    Raises:
        DataError: no such file or hub data set, or a file damaged beyond single rows.
    """
    return _local_rows(_path_of(cfg.path)) if is_local(cfg.path) else _hub_rows(cfg)


def _path_of(given: str) -> Path:
    return Path(resolve_path(given)).expanduser()


def is_local(given: str) -> bool:
    """Whether a data set's `path` is taken for a file, there or not, and not for a hub id."""
    looks_local = given.startswith(("shipped:", ".", "/", "~")) or given.lower().endswith(_DATA_ENDINGS)
    return looks_local or _path_of(given).is_file() or not _HUB_ID.fullmatch(given)


def _local_rows(path: Path) -> Iterator[Row | BadRow]:
    """Rows of one file.

    Raises:
        DataError: missing, a folder, of an unknown kind, or damaged.
    """
    _check_file(path)
    name = path.name.lower().removesuffix(".gz")
    reader = next((read for ending, read in _READERS.items() if name.endswith(ending)), None)
    if reader is None or path.name.lower().endswith(".parquet.gz"):
        raise DataError(f"{path} is not a kind of file that can be read", fix=f"save it as {_FILE_FORMATS}")
    try:
        yield from reader(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read to its end: {error}", fix="copy or download it again") from error


def _check_file(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        files = sorted(p.name for p in path.iterdir() if p.name.lower().endswith(_DATA_ENDINGS))
        raise DataError(
            f"{path} is a folder", fix=f"name a file in it: {', '.join(files[:5]) or 'it has no data files'}"
        )
    if not path.parent.is_dir():
        fix = f"correct the path; relative paths start at the working directory {Path.cwd()}"
        raise DataError(f"no file {path}: its folder {path.parent} does not exist", fix=fix)
    names = sorted(p.name for p in path.parent.iterdir() if p.is_file())
    listed = ", ".join(names[:5]) or "no files"
    fix = f"correct the path{did_you_mean(path.name, names)}; {path.parent} holds {listed}"
    raise DataError(f"no file {path}", fix=fix)


def _lines(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb") as file:
        yield from file


def _json_lines(path: Path) -> Iterator[Row | BadRow]:
    """One row per line. Lines are decoded one by one, so that a damaged one spoils only itself."""
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield _json_row(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, f"{path}:{number}")


def _json_row(line: bytes, where: str) -> Row | BadRow:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(where, f"not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return BadRow(where, f"not JSON ({error.msg} at column {error.colno}); write one JSON object per line")
    except RecursionError:
        return BadRow(where, "not usable JSON (nested too deeply); write one flat JSON object per line")
    except ValueError:  # Python reads no longer ones
        return BadRow(where, "not usable JSON (a number of thousands of digits); write it as text in quotes")
    return _object_row(fields, where)


def _object_row(fields: Any, where: str) -> Row | BadRow:
    if isinstance(fields, dict):
        return Row(fields, where)
    return BadRow(where, f"a {type(fields).__name__}, not keys and values; write " + '{"prompt": ...}')


def _json_file(path: Path) -> Iterator[Row | BadRow]:
    """One array of rows; or, as the hub's `.json` files mostly are, one row per line."""
    first = next((line for line in _lines(path) if line.strip()), b"").removeprefix(b"\xef\xbb\xbf")
    return _json_array(path) if first.lstrip().startswith(b"[") else _json_lines(path)


def _json_array(path: Path) -> Iterator[Row | BadRow]:
    try:
        text = b"".join(_lines(path)).decode("utf-8-sig")
        json.loads(text)  # strict, and its error knows the line
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})", fix="save it as UTF-8") from None
    except json.JSONDecodeError as error:
        fix = "check commas, quotes and brackets there"
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})", fix=fix) from None
    except (RecursionError, ValueError):
        problem = "not usable JSON (nested too deeply, or a number of thousands of digits)"
        raise DataError(f"{path}: {problem}", fix="write flat rows; .jsonl names the line at fault") from None
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    at, line, counted = text.index("[") + 1, 1, 0
    while text[at := gap.match(text, at).end()] != "]":  # type: ignore[union-attr] - the pattern always matches
        line, counted = line + text.count("\n", counted, at), at
        fields, at = decoder.raw_decode(text, at)
        yield _object_row(fields, f"{path}:{line}")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, f"{path}, row {number}")
    except pa.ArrowException as error:
        raise DataError(f"{path}: damaged after row {number}: {error}", fix="write or download it again") from error


_READERS: dict[str, Callable[[Path], Iterator[Row | BadRow]]] = {
    ".jsonl": _json_lines,
    ".json": _json_file,
    ".parquet": _parquet_rows,
}


def _hub_rows(cfg: DatasetConfig) -> Iterator[Row]:
    """Rows of a hub data set, downloaded or from the cache.

    Raises:
        DataError: unknown id, subset or split, no access, or no network; the library's words, with the fix.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    name = f"{cfg.path}{f' ({cfg.subset})' if cfg.subset else ''}, split {cfg.split}"
    try:
        loaded = datasets.load_dataset(cfg.path, cfg.subset, split=cfg.split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"the hub data set {name} cannot be loaded: {reason}", fix=_hub_fix(error, cfg)) from error
    for number, fields in enumerate(loaded, 1):
        yield Row(dict(fields), f"{cfg.path}, row {number}")


def _hub_fix(error: Exception, cfg: DatasetConfig) -> str:
    from datasets.exceptions import DatasetNotFoundError

    text = str(error)
    if "gated" in text or "401" in text or "403" in text:
        return f"accept its terms on the hub page of {cfg.path}, then log in with `hf auth login`"
    if isinstance(error, DatasetNotFoundError):
        return "check the spelling of owner/name, or give a local file; a private one needs `hf auth login`"
    known = re.search(r"\[(.*?)\]", text)  # "Unknown split ..." and "BuilderConfig ... not found" list what exists
    if isinstance(error, ValueError) and known:
        key, value = ("subset", cfg.subset or "") if "onfig" in text else ("split", cfg.split)
        names = re.findall(r"['\"]([^'\"]+)['\"]", known.group(1))
        return f"set `{key}:` to one of {', '.join(names)}{did_you_mean(value, names)}"
    return f"check the network and HF_ENDPOINT, or set `path:` to a local copy ({_FILE_FORMATS})"
