"""What a machine can do: memory, arithmetic, and how fast it moves bytes; measured here, or a GPU's by its name."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass, replace

import torch

from rlhf.errors import ConfigError
from rlhf.rollout.profile import square_rate

_COPIED = 2**28
"""Bytes that are copied to measure memory: no cache holds them."""


@dataclass(frozen=True)
class Machine:
    """One device, and its ways to others.

    Attributes:
        memory: bytes.
        flops: FLOP/s of products by precision; {} where they are not known.
        bandwidth: bytes/s of its memory.
        link: bytes/s to the others of its node, one way.
        network: bytes/s to other nodes, one way, per device.
    """

    name: str
    memory: float
    flops: dict[str, float]
    bandwidth: float | None
    link: float | None
    network: float | None
    on_cpu: bool = False

    def reaches(self, precision: str) -> bool:
        """Whether times can be given."""
        return precision in self.flops and self.bandwidth is not None


def _gpu(name: str, memory: float, bf16: float, fp32: float, bandwidth: float, link: float, network: float) -> Machine:
    """From GB, TFLOP/s without sparsity, and GB/s."""
    rates = {"bf16": bf16 * 1e12, "fp32": fp32 * 1e12}
    return Machine(name, memory * 1e9, rates, bandwidth * 1e9, link * 1e9, network * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40", 40, 312, 19.5, 1555, 300, 25),
        _gpu("a100", 80, 312, 19.5, 2039, 300, 25),
        _gpu("h100", 80, 989, 67, 3350, 450, 50),
        _gpu("h200", 141, 989, 67, 4800, 450, 50),
        _gpu("l40s", 48, 362, 91.6, 864, 32, 12.5),
    )
}
"""NVIDIA's data sheets of the A100 (SXM), H100 (SXM), H200 (SXM) and L40S: memory, dense bf16 and float32 (not TF32)
products, memory's and half of NVLink's or PCIe's bandwidth. Network: what a DGX of that GPU has for each, 200 or 400
Gbit/s; 100 for the L40S."""


def gpu_named(name: str) -> Machine:
    """One of `GPUS`.

    Raises:
        ConfigError: there is no such name.
    """
    if name.lower() not in GPUS:
        fix = f"use one of {', '.join(GPUS)}; or give --gpu-memory and --rates"
        raise ConfigError(f"--gpu {name!r} is not known", fix=fix)
    return GPUS[name.lower()]


def this_machine(precision: str) -> Machine:
    """The first GPU, else the CPU, measured in about a second: large square products in `precision`, and a copy."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    rates = {precision: square_rate(device, dtype)}
    bandwidth = copy_rate(device)
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return Machine(found.name, found.total_memory, rates, bandwidth, None, None)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    name = f"this CPU, {torch.get_num_threads()} threads"
    return Machine(name, memory, rates, bandwidth, None, None, on_cpu=True)


def copy_rate(device: torch.device) -> float:
    """Bytes/s that are read and written by a copy: the median of five."""
    source = torch.ones(_COPIED // 4, device=device)
    target = torch.empty_like(source)

    def seconds() -> float:
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    seconds()
    return 2 * _COPIED / statistics.median(seconds() for _ in range(5))


def with_given(
    machine: Machine, precision: str, memory: float | None, flops: float | None, bandwidth: float | None
) -> Machine:
    """What was given (GB, TFLOP/s, GB/s) in place of what is known.

    Raises:
        ConfigError: a number that is not above 0.
    """
    given = {"gpu-memory": memory, "rates (TFLOP/s)": flops, "rates (GB/s)": bandwidth}
    for name, value in given.items():
        if value is not None and not value > 0:
            raise ConfigError(f"--{name} {value:g} is not above 0", fix="give a positive number")
    if memory is not None:
        machine = replace(machine, memory=memory * 1e9)
    if flops is not None:
        machine = replace(machine, flops={**machine.flops, precision: flops * 1e12})
    return machine if bandwidth is None else replace(machine, bandwidth=bandwidth * 1e9)
