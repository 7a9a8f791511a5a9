"""What DeepSpeed's ZeRO keeps in parts: this rank's part of weights and optimizer state, and weights made whole again.

ZeRO-1 and 2 cut the optimizer's state, one flat tensor per parameter group, at places that have nothing to do with the
parameters; ZeRO-3 cuts every parameter into equal parts, the last one padded (Rajbhandari 2020, arXiv:1910.02054).
A checkpoint knows none of that: it holds elements [a, b) of named tensors, so any number of processes, with or without
ZeRO, can go on from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.tensor_files import TensorFiles, piece_name

_NUMBER = "#"
"""Ends the entry of what an optimizer keeps as a plain number."""
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}


@dataclass(frozen=True)
class Place:
    """Elements [start, start + count) of a parameter are `flat[offset : offset + count]` on this rank."""

    flat: Tensor
    offset: int
    start: int
    count: int


@dataclass
class TrainState:
    """Trained parameters and the state of their optimizer, whole or in parts.

    Attributes:
        parameters: name -> trained parameter, in the same order on every rank.
        optimizer: torch's.
        zero: DeepSpeed's ZeRO optimizer around it, if there is one.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: Any
    zero: Any
    rank: int
    world_size: int

    def weights(self) -> dict[str, Tensor]:
        """The weights that this rank writes: what it alone has, and its share of what all of them have."""
        found = {}
        for i, (name, parameter) in enumerate(self.parameters.items()):
            if not is_partitioned(parameter):
                if self._is_writer(i):
                    found[name] = parameter.detach()
            elif at := self._partition(parameter):
                found[piece_name(name, at.start)] = at.flat[: at.count]
        return found

    def moments(self) -> dict[str, Tensor]:
        """The optimizer state that this rank writes, `<parameter>:<key>`: moments like the parameter, and a counter."""
        found = {}
        for i, (name, parameter) in enumerate(self.parameters.items()):
            at = self._place(parameter)
            if at is None or (self.zero is None and not self._is_writer(i)):
                continue
            for key, value in self.optimizer.state.get(at.flat, {}).items():
                entry = f"{name}:{key}"
                if isinstance(value, bool | int | float):
                    found[f"{entry}{_NUMBER}"] = torch.tensor(value, dtype=_NUMBERS[type(value)])
                elif self.zero is None or key == "step":
                    found |= {entry: value} if at.start == 0 and value is not None else {}
                else:
                    found[piece_name(entry, at.start)] = value[at.offset : at.offset + at.count]
        return found

    def load_moments(self, files: TensorFiles) -> None:
        """Put back what `moments` gave, whatever the number of ranks was; before the first step.

        Raises:
            CheckpointError: some of it is not there.
        """
        keys: dict[str, list[str]] = {}
        for entry in files.names():
            name, _, key = entry.rpartition(":")
            keys.setdefault(name, []).append(key)
        for name, parameter in self.parameters.items():
            if at := self._place(parameter):
                for key in sorted(keys.get(name, [])):
                    self._put(at, key, f"{name}:{key}", files)

    def _put(self, at: Place, key: str, entry: str, files: TensorFiles) -> None:
        state = self.optimizer.state[at.flat]
        if key.endswith(_NUMBER):
            state[key.removesuffix(_NUMBER)] = files.whole(entry).item()
            return
        if key == "step":  # of each parameter; ZeRO steps all that lie in one flat tensor together
            state[key] = files.whole(entry).to(_step_device(self.optimizer, at.flat), copy=True)
            return
        if self.zero is None:  # a moment, or what another optimizer keeps, of whatever shape
            value = files.whole(entry)
            value = value.view_as(at.flat) if value.numel() == at.flat.numel() else value
            state[key] = value.to(at.flat.device, copy=True)
            return
        if key not in state:
            state[key] = torch.zeros_like(at.flat, requires_grad=False)
        part = files.part(entry, at.start, at.count)
        state[key].view(-1)[at.offset : at.offset + at.count].copy_(part)

    def _is_writer(self, index: int) -> bool:
        """Of what every rank has, the ranks write in turn."""
        return index % self.world_size == self.rank

    def _place(self, parameter: Any) -> Place | None:
        """Where this rank's optimizer state of a parameter lies; None: it has none."""
        if self.zero is None:
            return Place(parameter, 0, 0, parameter.numel())
        if is_partitioned(parameter):
            group, offset, _ = self.zero.grad_position[self.zero.get_param_id(parameter)]
            at = self._partition(parameter)
            return Place(self.zero.fp32_partitioned_groups_flat[group], offset, at.start, at.count) if at else None
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
        flat = self.zero.single_partition_of_fp32_groups[mapping.param_group_index]
        return Place(flat, there.start, here.start, there.numel)

    def _partition(self, parameter: Any) -> Place | None:
        """This rank's part of a parameter under ZeRO-3, without the padding; None: nothing but padding."""
        size = parameter.ds_tensor.numel()
        start = self.rank * size
        count = min(size, parameter.ds_numel - start)
        return Place(parameter.ds_tensor.detach(), 0, start, count) if count > 0 else None


def _step_device(optimizer: Any, flat: Tensor) -> torch.device:
    """torch keeps the step counter of fused and capturable optimizers beside the weights, others' on the CPU."""
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return flat.device if beside else torch.device("cpu")


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 holds a part of it only."""
    return hasattr(parameter, "ds_id")


@contextlib.contextmanager
def gathered(parameters: list[Any]) -> Iterator[None]:
    """Whole weights on every rank for a while, to be read; all ranks enter together."""
    absent = [p for p in parameters if is_partitioned(p) and p.ds_status.name == "NOT_AVAILABLE"]
    if not absent:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(absent):
        yield


def make_whole(module: nn.Module, *, keep: bool) -> None:
    """End ZeRO-3's sharding of a module, one parameter at a time; all ranks call it together.

    Args:
        keep: this rank gets the weights, on the CPU; the others are left with empty ones.
    """
    new: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if not is_partitioned(parameter):
                continue
            if id(parameter) not in new:  # tied weights stay one
                with gathered([parameter]), torch.no_grad():
                    value = parameter.detach().cpu().clone() if keep else torch.empty(0, dtype=parameter.dtype)
                new[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            setattr(owner, name, new[id(parameter)])
