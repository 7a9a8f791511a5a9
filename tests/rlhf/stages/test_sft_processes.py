"""SFT over processes and micro-batches: one global batch, one result, whatever the split."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

import rlhf
from rlhf.config import dump
from rlhf.runs import RunOptions
from rlhf.stages import sft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::UserWarning:trl.*")
ROOT = Path(rlhf.__file__).parent.parent
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TOLERANCE = 1e-6


def launched(cfg: Any, launch_file: str, processes: int = 2) -> list[str]:
    """The command that runs the stage by a file of `launch/`."""
    path = Path(cfg.run_dir).with_suffix(".yaml")
    path.write_text(dump(cfg), encoding="utf-8")
    starter = ["accelerate.commands.launch", "--config_file", f"launch/{launch_file}.yaml"]
    ports = ["--num_processes", str(processes), "--main_process_port", str(free_port())]
    return [sys.executable, "-m", *starter, *ports, "-m", "rlhf", "sft", str(path)]


def run(command: list[str], environment: dict[str, str] | None = None, *, until: Path | None = None) -> str:
    """What the command says. Once `until` is there all of its processes are killed."""
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **paths, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while until and process.poll() is None and not until.exists():
            time.sleep(0.01)
        if until:
            kill(process)
        said, _ = process.communicate(timeout=400)
    finally:
        kill(process)
    assert process.returncode == (-signal.SIGKILL if until else 0), said[-6000:]
    return said


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the launcher and to its workers, which are in sessions of their own."""
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for each in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def difference(one: Any, other: Any) -> float:
    """Largest |difference| of the weights that two runs leave."""
    ours, theirs = (load_file(Path(cfg.run_dir) / "final" / "model.safetensors") for cfg in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def assert_same(one: Any, other: Any, metrics_of: Any) -> None:
    """Weights to 1e-6; token counts and accuracies exactly, other metrics to rounding."""
    assert difference(one, other) <= TOLERANCE
    lines, others = metrics_of(one.run_dir), metrics_of(other.run_dir)
    assert len(lines) == len(others) > 6
    for ours, theirs in zip(lines, others, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=2e-6)
        for exact in {"step", "train/tokens", "train/token_accuracy"} & ours.keys():
            assert ours[exact] == theirs[exact]


def test_micro_batches_change_nothing(ragged_sft: Any, metrics_of: Any) -> None:
    runs = [ragged_sft(f"micro_{size}", micro_batch_size=size) for size in (8, 1, 2)]
    for cfg in runs:
        sft.main(cfg, RunOptions())
    norms = [line["train/grad_norm"] for line in metrics_of(runs[0].run_dir) if "train/grad_norm" in line]
    assert min(norms) < 3.0 < max(norms)  # some steps are clipped, some are not
    for other in runs[1:]:
        assert_same(runs[0], other, metrics_of)


def test_two_processes_give_what_one_gives(ragged_sft: Any, metrics_of: Any) -> None:
    """DDP, short: started by hand, which spares a launcher. The last batch has 3 rows: one rank gets a filler."""
    one, two = (ragged_sft(f"{n}", batch_size=8 // n, micro_batch_size=1, trainer={"max_steps": 6}) for n in (1, 2))
    sft.main(one, RunOptions())
    path = Path(two.run_dir).with_suffix(".yaml")
    path.write_text(dump(two), encoding="utf-8")
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = ["import os, subprocess, sys", "own = [dict(os.environ, RANK=str(r), LOCAL_RANK=str(r)) for r in range(2)]"]
    ranks += ["children = [subprocess.Popen(sys.argv[1:], env=e) for e in own]"]
    ranks += ["sys.exit(max(child.wait() for child in children))"]
    run([sys.executable, "-c", "\n".join(ranks), sys.executable, "-m", "rlhf", "sft", str(path)], shared)
    assert_same(one, two, metrics_of)


@pytest.mark.slow
@pytest.mark.parametrize("launch_file", ["cpu", "cpu_zero1", "cpu_zero2", "cpu_zero3"])
@pytest.mark.parametrize("tuning", [{"kind": "full"}, {"kind": "lora", "rank": 4}], ids=["full", "lora"])
def test_every_kind_of_run_gives_what_one_process_gives(
    ragged_sft: Any, metrics_of: Any, launch_file: str, tuning: Any
) -> None:
    one = ragged_sft("one", tuning=tuning)
    two = ragged_sft("two", tuning=tuning, batch_size=4, micro_batch_size=2)
    sft.main(one, RunOptions())
    run(launched(two, launch_file))
    print(f"{launch_file}, {tuning['kind']}: largest difference {difference(one, two):.2e}")
    assert_same(one, two, metrics_of)


def files_of(cfg: Any) -> tuple[bytes, str]:
    """The model's file and the metrics."""
    folder = Path(cfg.run_dir)
    return (folder / "final" / "model.safetensors").read_bytes(), (folder / "metrics.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("launch_file", ["cpu", "cpu_zero1", "cpu_zero2", "cpu_zero3"])
def test_processes_that_are_killed_go_on_bit_for_bit(ragged_sft: Any, launch_file: str, precision: str) -> None:
    """In bf16, too, weights that learn are float32."""
    split = {"batch_size": 4, "micro_batch_size": 2, "save_every": 4, "precision": precision}
    run(launched(whole := ragged_sft("whole", **split), launch_file))
    killed = ragged_sft("killed", **split)
    run(launched(killed, launch_file), until=Path(killed.run_dir) / "checkpoints" / "step_8")
    assert not Path(killed.run_dir, "final").exists()
    assert "going on after step" in run(launched(killed, launch_file))
    assert files_of(killed) == files_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [("cpu", None), (None, "cpu"), ("cpu_zero3", "cpu_zero1"), ("cpu_zero2", None)]
)
def test_a_run_moves_to_other_processes(ragged_sft: Any, metrics_of: Any, first: Any, then: Any) -> None:
    """The same rows in every step: the result is that of one process to rounding."""

    def command(cfg: Any, launch_file: str | None) -> list[str]:
        return launched(cfg, launch_file or "cpu", 2 if launch_file else 1)

    sft.main(whole := ragged_sft("whole"), RunOptions())
    before, after = (
        ragged_sft("moved", batch_size=4 if file else 8, micro_batch_size=2, save_every=4) for file in (first, then)
    )
    run(command(before, first), until=Path(before.run_dir) / "checkpoints" / "step_8")
    assert "going on after step" in run(command(after, then))
    assert_same(whole, after, metrics_of)
