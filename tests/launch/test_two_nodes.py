"""Two launch agents on one machine are two nodes: they meet over c10d and finish a ZeRO-2 PPO run together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launched import Launched
from safetensors.torch import load_file

from rlhf.config import dump

ROOT = Path(__file__).resolve().parents[2]
ZERO2 = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu_zero2.yaml"]
ON_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
STEPS, BATCH_SIZE = 3, 8


@pytest.fixture
def agent(tmp_path: Path, stage_config: Callable[..., Any]) -> Callable[..., subprocess.Popen[str]]:
    """`agent("run", *options, NAME="...")`: a launcher of `rlhf ppo` into the folder `run`, its variables set."""

    def start(run: str, *options: str, **environment: str) -> subprocess.Popen[str]:
        cfg = stage_config("ppo", run_dir=str(tmp_path / run), steps=STEPS, batch_size=BATCH_SIZE)
        (tmp_path / f"{run}.yaml").write_text(dump(cfg), encoding="utf-8")
        command = ["timeout", "-k", "5", "300", *ZERO2, *options, "-m", "rlhf", "ppo", str(tmp_path / f"{run}.yaml")]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ON_CPU, **environment}, **pipes)

    return start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(*agents: subprocess.Popen[str]) -> None:
    """Wait for all of them; what they said is shown when one failed."""
    said = [agent.communicate()[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * len(agents), "\n\n".join(said)


def assert_same_parameters(run: Path, other: Path) -> None:
    for folder in ("final", "critic"):
        mine, others = (load_file(path / folder / "model.safetensors") for path in (run, other))
        assert mine.keys() == others.keys()
        assert all(bool((mine[name] == others[name]).all()) for name in mine), folder


@pytest.mark.slow
def test_two_nodes_end_where_one_node_with_two_processes_ends(agent: Callable[..., Any], tmp_path: Path) -> None:
    meeting = {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "PET_RDZV_ID": "test"}
    here = {"PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    options = ["--num_processes", "1", "--rdzv_backend", "c10d", "--rdzv_conf"]
    finish(*(agent("nodes", *options, f"is_host={host}", **meeting, **here) for host in ("true", "false")))
    finish(agent("processes", "--num_processes", "2"))
    lines = [json.loads(line) for line in (tmp_path / "nodes" / "metrics.jsonl").read_text().splitlines()]
    assert [line["episode"] for line in lines] == [2 * BATCH_SIZE * (step + 1) for step in range(STEPS)]
    assert_same_parameters(tmp_path / "nodes", tmp_path / "processes")


@pytest.mark.slow
def test_a_lost_node_is_replaced_and_the_job_ends_where_it_would_have(
    tmp_path: Path, stage_config: Callable[..., Any]
) -> None:
    """The agent of one node is killed with its process after the first checkpoint; the same command takes its place."""
    steps, meeting = 8, {"PET_NNODES": "2", "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}", "PET_RDZV_ID": "lost"}

    def start(run: str, log: str, *options: str, **environment: str) -> Launched:
        cfg = stage_config("ppo", run_dir=str(tmp_path / run), steps=steps, batch_size=BATCH_SIZE, save_every=1)
        (tmp_path / f"{run}.yaml").write_text(dump(cfg), encoding="utf-8")
        return Launched(
            "cpu_zero2.yaml", [*options], ["ppo", str(tmp_path / f"{run}.yaml")], tmp_path / log, environment
        )

    def node(log: str, *, host: bool) -> Launched:
        options = ("--num_processes", "1", "--rdzv_backend", "c10d", "--max_restarts", "3")
        return start("nodes", log, *options, "--rdzv_conf", f"is_host={str(host).lower()}", **meeting)

    agents = [node("host.log", host=True), node("guest.log", host=False)]
    try:
        agents[0].wait_for((tmp_path / "nodes" / "checkpoints" / "step_1").exists)
        agents[1].kill()
        agents.append(node("guest_again.log", host=False))
        for agent in (agents[0], agents[2]):
            assert agent.end() == 0, agents[0].said() + agents[2].said()
    finally:
        for agent in agents:
            agent.kill()
    assert "going on after step" in agents[0].said() + agents[2].said()
    alone = start("alone", "alone.log", "--num_processes", "2")
    assert alone.end() == 0, alone.said()
    assert_same_parameters(tmp_path / "nodes", tmp_path / "alone")
