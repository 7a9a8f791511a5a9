"""SFT over processes and micro-batches: one global batch, one result, whatever the split."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

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


@pytest.fixture
def ragged(jsonl: Any) -> str:
    """43 demonstrations of 1 to 20 words: with a batch of 8 the last one of an epoch has 3 rows."""
    draw = random.Random(0)
    words = ["the", "sun", "star", "light", "is", "big", "hot", "gives", "us", "water", "rain", "wind", "tree", "fish"]

    def text(longest: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, longest)))

    return jsonl("ragged.jsonl", [{"prompt": f"explain {text(6)}", "completion": text(20)} for _ in range(43)])


@pytest.fixture
def config(stage_config: Any, ragged: str, tmp_path: Path) -> Any:
    """`config("name", ...)`: 20 steps over 43 ragged rows, 8 a step, every second one clipped."""

    def build(name: str, **changes: Any) -> Any:
        settings = {"run_dir": str(tmp_path / name), "dataset": {"path": ragged}, "batch_size": 8}
        trainer = {"max_steps": 20, "max_grad_norm": 3.0}
        return stage_config("sft", **{**settings, "lr": 1e-3, "trainer": trainer, **changes})

    return build


def launch(cfg: Any, launch_file: str) -> None:
    """Run the stage on two processes by a file of `launch/`."""
    path = Path(cfg.run_dir).with_suffix(".yaml")
    path.write_text(dump(cfg), encoding="utf-8")
    starter = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/{launch_file}.yaml"]
    command = [*starter, "--num_processes", "2", "-m", "rlhf", "sft", str(path)]
    run(command, {"MASTER_PORT": str(free_port())})


def run(command: list[str], environment: dict[str, str], *, code: int = 0) -> str:
    """What the command says; it ends with `code`."""
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        ["timeout", "-k", "5", "300", *command],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


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
    assert len(lines) == len(others) >= 20
    for ours, theirs in zip(lines, others, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=2e-6)
        for exact in {"step", "train/tokens", "train/token_accuracy"} & ours.keys():
            assert ours[exact] == theirs[exact]


def test_micro_batches_change_nothing(config: Any, metrics_of: Any, ragged: str) -> None:
    changes = {"eval_dataset": {"path": ragged, "limit": 5}}
    runs = [config(f"micro_{size}", micro_batch_size=size, **changes) for size in (8, 1, 2)]
    for cfg in runs:
        sft.main(cfg, RunOptions())
    norms = [line["train/grad_norm"] for line in metrics_of(runs[0].run_dir) if "train/grad_norm" in line]
    assert min(norms) < 3.0 < max(norms)  # some steps are clipped, some are not
    for other in runs[1:]:
        assert_same(runs[0], other, metrics_of)


def test_two_processes_give_what_one_gives(config: Any, metrics_of: Any, ragged: str) -> None:
    """DDP, short: started by hand, which spares a launcher. The last batch has 3 rows: one rank gets a filler."""
    changes = {"trainer": {"max_steps": 6}, "eval_dataset": {"path": ragged, "limit": 5}}
    one, two = config("one", **changes), config("two", batch_size=4, micro_batch_size=1, **changes)
    sft.main(one, RunOptions())
    path = Path(two.run_dir).with_suffix(".yaml")
    path.write_text(dump(two), encoding="utf-8")
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = ["import os, subprocess, sys", "command = sys.argv[1:]", "shared = dict(os.environ)"]
    ranks += ["own = [dict(shared, RANK=str(r), LOCAL_RANK=str(r)) for r in range(2)]"]
    ranks += ["children = [subprocess.Popen(command, env=e) for e in own]"]
    ranks += ["sys.exit(max(child.wait() for child in children))"]
    run([sys.executable, "-c", "\n".join(ranks), sys.executable, "-m", "rlhf", "sft", str(path)], shared)
    lines, others = metrics_of(one.run_dir), metrics_of(two.run_dir)
    assert difference(one, two) <= TOLERANCE
    assert len(lines) == len(others)
    for ours, theirs in zip(lines, others, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("launch_file", ["cpu", "cpu_zero1", "cpu_zero2", "cpu_zero3"])
@pytest.mark.parametrize("tuning", [{"kind": "full"}, {"kind": "lora", "rank": 4}], ids=["full", "lora"])
def test_every_kind_of_run_gives_what_one_process_gives(
    config: Any, metrics_of: Any, ragged: str, launch_file: str, tuning: Any
) -> None:
    changes = {"tuning": tuning, "eval_dataset": {"path": ragged, "limit": 5}}
    one, two = config("one", **changes), config("two", batch_size=4, micro_batch_size=2, **changes)
    sft.main(one, RunOptions())
    launch(two, launch_file)
    print(f"{launch_file}, {tuning['kind']}: largest difference {difference(one, two):.2e}")
    assert_same(one, two, metrics_of)
