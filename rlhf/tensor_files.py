"""Named tensors on the disk: safetensors files, whole or in pieces that several ranks wrote.

A tensor `name` is one entry `name`, or its flattened elements lie in entries `name@START`, wherever they are. So each
rank writes what it holds, and any number of ranks reads what it needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf.errors import CheckpointError


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


def piece_name(name: str, start: int) -> str:
    """The entry of the elements of `name` from `start` on."""
    return f"{name}@{start}"


class TensorFiles:
    """Some files as one set of named tensors; nothing is read before it is asked for.

    What is read may lie in memory that is mapped, and be the same for two names: copy it before changing it.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = list(paths)
        self._whole: dict[str, tuple[Any, str]] = {}
        self._pieces: dict[str, dict[int, tuple[Any, str]]] = {}
        for path in self._paths:
            file = safe_open(str(path), framework="pt", device="cpu")
            aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
            for entry, stored in {**{key: key for key in file.keys()}, **aliases}.items():  # noqa: SIM118 - no dict
                name, at, start = entry.rpartition("@")
                if at:
                    self._pieces.setdefault(name, {})[int(start)] = (file, stored)
                else:
                    self._whole[entry] = (file, stored)

    def names(self) -> set[str]:
        """Of all tensors, whole or in pieces."""
        return set(self._whole) | set(self._pieces)

    def whole(self, name: str) -> Tensor:
        """The tensor; flat, if it was written in pieces.

        Raises:
            CheckpointError: it is not there, or pieces of it are not.
        """
        if name in self._whole:
            file, stored = self._whole[name]
            return file.get_tensor(stored)
        pieces = self._pieces.get(name, {})
        end = max((start + self._length(start, name) for start in pieces), default=0)
        return self.part(name, 0, end)

    def part(self, name: str, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of the flattened tensor.

        Raises:
            CheckpointError: some of them are not there.
        """
        if name in self._whole:
            found = [self.whole(name).flatten()[start : start + count]]
        else:
            found, at = [], start
            for begin in sorted(self._pieces.get(name, {})):
                end = begin + self._length(begin, name)
                if begin <= at < end and at < start + count:
                    file, stored = self._pieces[name][begin]
                    found.append(file.get_slice(stored)[at - begin : min(end, start + count) - begin])
                    at = end
        if name not in self.names() or sum(map(len, found)) != count:
            where = ", ".join(path.name for path in self._paths) or "no file"
            fix = "resume from another checkpoint, or with the configuration that wrote this one"
            raise CheckpointError(f"{where}: no {name!r} with elements {start} to {start + count}", fix=fix)
        return torch.cat(found) if len(found) > 1 else found[0] if found else torch.empty(0)

    def _length(self, start: int, name: str) -> int:
        file, stored = self._pieces[name][start]
        return file.get_slice(stored).get_shape()[0]
