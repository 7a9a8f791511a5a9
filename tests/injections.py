"""Faults that only the process itself can have; called in the child, see `forked_runs.Forked`."""

from __future__ import annotations

import os
from typing import Any


def nan_loss(given: dict[str, Any]) -> None:
    """NaN in `policy_loss` of rank `given["rank"]`, in the calls `given["calls"]` counted from 0."""
    if int(os.environ["RANK"]) != given["rank"]:
        return
    from rlhf.stages import ppo

    loss, count = ppo.policy_loss, iter(range(10_000))

    def poisoned(*args: Any, **keys: Any) -> Any:
        value, stats = loss(*args, **keys)
        return (value * float("nan") if next(count) in given["calls"] else value), stats

    ppo.policy_loss = poisoned
