"""CPU time of a PPO sample on two processes, ZeRO-2 against DDP (`peer`), with a model that is most of the work.

Startup is left out: what the steps of a long run take beyond those of a short one, user and system time of all
processes together.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Callable

from harness import BUILD, ROOT, Report, alternate, median, row, save
from sides import prepare

FILES = {"ZeRO-2": "cpu_zero2", "DDP": "cpu"}
SETTING = {"processes": 2, "batch_size": 32, "micro_batch_size": 32, "epochs": 2, "new_tokens": 48, "steps": [1, 3]}


def cpu_seconds(file: str, steps: int) -> float:
    """User and system time of the launcher and all it starts."""
    options = {
        "run_dir": BUILD / "processes",
        "model": "smollm2-135m",
        "prompts.path": BUILD / "prompts.equal.text.jsonl",
        "scorer": "readability",
        "critic_init": "policy",
        "batch_size": SETTING["batch_size"],
        "micro_batch_size": SETTING["micro_batch_size"],
        "epochs": SETTING["epochs"],
        "sampling.max_new_tokens": SETTING["new_tokens"],
        "steps": steps,
        "save_every": 0,
        "tracking.wandb": "off",
    }
    config = BUILD / "processes.yaml"
    config.write_text("{}\n")
    launcher = ["accelerate.commands.launch", "--config_file", f"launch/{file}.yaml", "--num_processes", "2"]
    command = [sys.executable, "-m", *launcher, "-m", "rlhf", "ppo", str(config)]
    on_cpu = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, *(f"{key}={value}" for key, value in options.items()), "--resume", "never"],
        cwd=ROOT,
        env={**os.environ, **on_cpu},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def per_sample(file: str) -> Callable[[], Report]:
    """CPU seconds of one rollout and its updates."""
    short, long = SETTING["steps"]

    def run() -> Report:
        extra = cpu_seconds(file, long) - cpu_seconds(file, short)
        return {"cpu_s": extra / ((long - short) * SETTING["batch_size"] * SETTING["processes"])}

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    prepare("equal")
    reports = alternate({name: per_sample(file) for name, file in FILES.items()}, rounds)
    ours, peer = (median(reports[name], "cpu_s") for name in FILES)
    label = "PPO on two processes, ZeRO-2 beside DDP; CPU time per sample"
    setting = {**SETTING, "model": "SmolLM2-135M, full, four models", "rounds": rounds, "reports": reports}
    save("processes", setting, [row(label, "s", ours, peer, lower_is_better=True, group="processes")])


if __name__ == "__main__":
    main()
