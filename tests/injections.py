"""Faults that only the process itself can have; called in the child, see `forked_runs.Forked`."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLACES = {
    "load": "rlhf.stages.ppo:build_roles",
    "generate": "rlhf.rollout.ppo_run:PPORun.on_tokens",
    "score": "rlhf.stages.ppo:score_rollouts",
    "update": "rlhf.runtime:Runtime.backward",
    "log": "rlhf.tracking:Tracker.log",
    "checkpoint": "rlhf.checkpoint:Checkpoints._write",
    "export": "rlhf.rollout.ppo_run:PPORun.finish",
}


def _is_meant(given: dict[str, Any]) -> bool:
    return int(os.environ.get("RANK", "0")) == given.get("rank", 0)


def _owner(place: str) -> tuple[Any, str]:
    module, _, path = place.partition(":")
    *outer, name = path.split(".")
    owner = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


def _at(given: dict[str, Any], action: Callable[[], None]) -> None:
    """`action` once, in rank `given["rank"]`, where `given["place"]` begins in 0-based step `given["step"]`."""
    if not _is_meant(given):
        return
    from rlhf.rollout.ppo_run import PPORun

    now, steps = [-1], PPORun.steps
    owner, name = _owner(PLACES[given["place"]])
    function, done = getattr(owner, name), []

    def counted(run: Any) -> Any:
        for now[0] in steps(run):
            yield now[0]

    def acting(*args: Any, **keys: Any) -> Any:
        if now[0] == given["step"] and not done:
            done.append(True)
            action()
        return function(*args, **keys)

    PPORun.steps = counted
    setattr(owner, name, acting)


def signal_itself(given: dict[str, Any]) -> None:
    """Send itself `given["signal"]`."""
    _at(given, lambda: os.kill(os.getpid(), getattr(signal, given["signal"])))


def fill_disk(given: dict[str, Any]) -> None:
    """Write `given["file"]` until its disk is full."""

    def fill() -> None:
        with contextlib.suppress(OSError), open(given["file"], "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    _at(given, fill)


def small_files(given: dict[str, Any]) -> None:
    """No file may grow beyond `given["bytes"]` from there on."""
    _at(given, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (given["bytes"], given["bytes"])))


def little_memory(given: dict[str, Any]) -> None:
    """From there on the process may take 64 MB more, and wants 256."""

    def take() -> None:
        import torch

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 64 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        torch.ones(64 * 2**20)

    _at(given, take)


def nan_loss(given: dict[str, Any]) -> None:
    """NaN in `policy_loss` of rank `given["rank"]`, in the calls `given["calls"]` counted from 0."""
    if not _is_meant(given):
        return
    from rlhf.stages import ppo

    loss, count = ppo.policy_loss, iter(range(10_000))

    def poisoned(*args: Any, **keys: Any) -> Any:
        value, stats = loss(*args, **keys)
        return (value * float("nan") if next(count) in given["calls"] else value), stats

    ppo.policy_loss = poisoned
