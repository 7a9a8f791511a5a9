"""Whole runs in processes of their own that begin in milliseconds: forked from one that has imported everything.

A fault test kills processes by the hundred; the imports of one take longer than its run. multiprocessing's fork server
is a single-threaded process that imports and never computes, so forking it is safe (`Forked` asserts the first).
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

IMPORTS = ("rlhf.cli", "rlhf.stages.ppo", "transformers", "trl", "peft", "deepspeed", "accelerate")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
}
_context = multiprocessing.get_context("forkserver")
_started: list[Forked] = []


class Forked:
    """`rlhf ARGUMENTS` in a new process.

    Args:
        arguments: of the command line.
        log: gets everything that the process says.
        environment: set in the process.
        prepare: "module:function" that the process calls first, with `given`; the module must be importable.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        *,
        environment: dict[str, str] | None = None,
        prepare: str = "",
        given: Any = None,
    ) -> None:
        self.log = log
        settings = (arguments, str(log), ENVIRONMENT | (environment or {}), prepare, given)
        self._process = _context.Process(target=_run, args=settings, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        _started.append(self)

    def send(self, number: signal.Signals) -> None:
        """Nothing, if the process has ended already."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self, timeout: float = 120) -> int:
        """Wait; the exit code, -N after signal N. A process that does not end in time is killed, and an error."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self.send(signal.SIGKILL)
            raise AssertionError(f"{self.pid} still runs after {timeout} s:\n{self.said()}")
        return code

    @property
    def runs(self) -> bool:
        return self._process.is_alive()

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def kill_all() -> None:
    """End what was started and still runs, stopped processes too."""
    for process in _started:
        if process.runs:
            process.send(signal.SIGKILL)
            process.end()
    _started.clear()


def start_server() -> None:
    """Start the fork server with everything imported, unless it runs."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    _context.set_forkserver_preload(["forked_runs", *IMPORTS])
    from multiprocessing.forkserver import ensure_running

    ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def _run(arguments: list[str], log: str, environment: dict[str, str], prepare: str, given: Any) -> None:
    """The child."""
    threads = os.listdir(f"/proc/{os.getppid()}/task")
    assert len(threads) == 1, "the fork server has threads: a lock that one of them holds would stay locked here"
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    if prepare:
        module, _, name = prepare.partition(":")
        getattr(importlib.import_module(module), name)(given)
    from rlhf.cli import app

    try:
        app(arguments)
    except SystemExit as ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code if isinstance(ended.code, int) else 1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(
    arguments: list[str], folder: Path, *, zero: int = 0, world_size: int = 2, **options: Any
) -> list[Forked]:
    """The ranks of one job, as a launcher would start them; rank r writes `folder`/rank_r.log."""
    job = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    job |= {"GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": str(world_size)} | options.pop("environment", {})
    if zero:
        file = Path(__file__).parents[1] / "launch" / f"cpu_zero{zero}.json"
        job |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    folder.mkdir(parents=True, exist_ok=True)
    return [
        Forked(
            arguments,
            folder / f"rank_{rank}.log",
            environment=job | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            **options,
        )
        for rank in range(world_size)
    ]


def wait_for(condition: Callable[[], bool], *processes: Forked, timeout: float = 60) -> None:
    """Until `condition` holds; an error when a process has ended before, or after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        assert all(process.runs for process in processes), "\n\n".join(process.said() for process in processes)
        assert time.monotonic() < end, "\n\n".join(process.said() for process in processes)
        time.sleep(0.002)


# --- what a run left ----------------------------------------------------------------------------------------------


def untimed(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times and rates."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in lines]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def differences(run: Path, unharmed: Path) -> list[str]:
    """What is not the same in two finished runs: weights and all that was written of them, bit for bit."""
    found = []
    for name in ("final", "critic"):
        a, b = files_of(run / name), files_of(unharmed / name)
        found += [f"{name}/{file}" for file in sorted(a.keys() | b.keys()) if a.get(file) != b.get(file)]
    if untimed(run) != untimed(unharmed):
        found.append("metrics.jsonl")
    if (run / "samples.jsonl").read_bytes() != (unharmed / "samples.jsonl").read_bytes():
        found.append("samples.jsonl")
    summaries = [json.loads((folder / "result.json").read_text())["summary"] for folder in (run, unharmed)]
    timeless = [{k: v for k, v in s.items() if not k.startswith(("time/", "perf/"))} for s in summaries]
    if timeless[0] != timeless[1]:
        found.append("summary in result.json")
    for name in ("trainable", "optimizer"):
        pattern = f"checkpoints/step_*/{name}*.safetensors"
        a, b = ({p.relative_to(f): p.read_bytes() for p in f.glob(pattern)} for f in (run, unharmed))
        found += [str(path) for path in sorted(a.keys() & b.keys()) if a[path] != b[path]]
    return found


def left_over(run: Path) -> list[str]:
    """Files and folders that no finished run should have."""
    return sorted(str(p.relative_to(run)) for p in run.rglob(".*") if p.is_dir() or p.suffix == ".tmp")
