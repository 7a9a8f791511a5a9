"""The transformer experiment on two processes that share its optimizer state, and under ZeRO-3 its weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 0.05


@pytest.mark.slow
@pytest.mark.parametrize("file", ["cpu_zero2", "cpu_zero3"])
def test_sharded_ppo_reaches_the_optimum(file: str) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/{file}.yaml"]
    on_cpu = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        ["timeout", "-k", "5", "600", *launcher, "tests/closed_form/sharded_run.py", "256"],
        cwd=ROOT,
        env={**os.environ, **on_cpu},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("distance")]
    assert float(line.split()[1]) <= TOLERANCE
