"""How many processes each launch file starts on machines with other GPUs: accelerate's own launcher, torchrun faked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
GPU_FILES = ["multi_gpu", "zero1", "zero2", "zero3", "zero3_offload", "multi_node"]
CPU_FILES = {"cpu": 1, "cpu_zero1": 2, "cpu_zero2": 2, "cpu_zero3": 2}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`launched("zero2", "--num_processes", "3", gpus=8)`: what torchrun would start, and the threads of each."""
    import psutil
    from accelerate.commands import launch
    from torch.distributed import run as torchrun

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # torchrun may set it: the end of the test puts back what was there
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)

    def start(name: str, *options: str, gpus: int) -> Any:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        started = []

        def fake(args: Any) -> None:
            threads = os.environ.get("OMP_NUM_THREADS")
            started.append((torchrun.config_from_args(args)[0], threads))

        monkeypatch.setattr(torchrun, "run", fake)
        command = ["--config_file", str(ROOT / "launch" / f"{name}.yaml"), *options, "-m", "rlhf", "ppo", "x.yaml"]
        launch.launch_command(launch.launch_command_parser().parse_args(command))
        return started[0]

    return start


def test_every_launch_file_is_tested_here() -> None:
    files = {path.stem for path in (ROOT / "launch").glob("*.yaml")}
    assert files == {*GPU_FILES, *CPU_FILES, "single_gpu"}


@pytest.mark.parametrize("gpus", [1, 3, 8])
@pytest.mark.parametrize("name", GPU_FILES)
def test_a_gpu_file_starts_one_process_per_gpu(launched: Callable[..., Any], name: str, gpus: int) -> None:
    config, _ = launched(name, gpus=gpus)
    assert (config.nproc_per_node, config.min_nodes, config.max_nodes) == (gpus, 1, 1)


@pytest.mark.parametrize("name", [*GPU_FILES, *CPU_FILES])
def test_a_count_that_is_given_wins(launched: Callable[..., Any], name: str) -> None:
    assert launched(name, "--num_processes", "4", gpus=8)[0].nproc_per_node == 4


@pytest.mark.parametrize("name", GPU_FILES)
def test_a_gpu_file_does_not_start_on_a_machine_without_a_gpu(launched: Callable[..., Any], name: str) -> None:
    with pytest.raises(ValueError, match="Cuda is not available"):
        launched(name, gpus=0)


@pytest.mark.parametrize(("name", "processes"), CPU_FILES.items())
def test_a_cpu_file_does_not_count_gpus(launched: Callable[..., Any], name: str, processes: int) -> None:
    assert [launched(name, gpus=gpus)[0].nproc_per_node for gpus in (0, 8)] == [processes, processes]


@pytest.mark.parametrize(("processes", "threads"), [(1, "8"), (2, "4"), (8, "1")])
def test_cpu_processes_share_the_cores(launched: Callable[..., Any], processes: int, threads: str) -> None:
    assert launched("cpu", "--num_processes", str(processes), gpus=0)[1] == threads


def test_the_nodes_come_from_the_environment(launched: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of launch/README.md: torchrun reads PET_*, each node counts its own GPUs."""
    for name, text in {"NNODES": "4", "RDZV_ENDPOINT": "10.0.0.1:29500", "RDZV_ID": "ppo"}.items():
        monkeypatch.setenv(f"PET_{name}", text)
    config, _ = launched("multi_node", "--rdzv_backend", "c10d", "--max_restarts", "3", gpus=8)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (4, 4, 8)
    assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == ("c10d", "10.0.0.1:29500", "ppo")
    assert config.max_restarts == 3
