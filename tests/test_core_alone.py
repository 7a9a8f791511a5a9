"""PPO on a local model, with metrics.jsonl, where trl, W&B, DeepSpeed and peft are not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("trl", "wandb", "deepspeed", "peft")

# Read by every Python process of the test before anything else: what is absent has neither modules nor metadata.
BLOCKER = f"""
import sys

ABSENT = {ABSENT!r}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        find = getattr(self.finder, "find_distributions", None)
        return [] if find is None or context.name in ABSENT else find(context)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`alone("-m", "rlhf", ...)`: Python without the optional packages, in the test's folder."""
    blocker = tmp_path / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(BLOCKER)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(blocker), str(ROOT)])
        env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
        env.pop("WANDB_MODE", None)
        return subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


def test_the_blocker_blocks(alone: Any) -> None:
    code = f"import json, yaml; from importlib.util import find_spec; print([find_spec(n) for n in {ABSENT}])"
    assert alone("-c", code).stdout.strip() == str([None] * len(ABSENT))
    assert "ModuleNotFoundError: No module named 'trl'" in alone("-c", "import trl").stderr


def test_ppo_runs_and_leaves_metrics_and_models(alone: Any, tiny: Any, prompts_file: str, tmp_path: Path) -> None:
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": tiny.path,
        "scorer": "readability",
        "critic_init": "policy",
        "prompts": {"path": prompts_file},
        "sampling": {"max_new_tokens": 6},
        "steps": 2,
        "batch_size": 4,
        "micro_batch_size": 4,
        "precision": "fp32",
    }
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(config))
    done = alone("-m", "rlhf", "ppo", "ppo.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    versions = json.loads((tmp_path / "run" / "environment.json").read_text())["packages"]
    assert [versions[name] for name in ABSENT] == [None] * len(ABSENT)
    assert "W&B is not available" in done.stdout


def test_help_and_doctor_say_what_is_missing(alone: Any) -> None:
    assert "ppo" in alone("-m", "rlhf", "--help").stdout
    done = alone("-m", "rlhf", "doctor")
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ABSENT:
        row = next(line for line in done.stdout.splitlines() if f" {name} " in line)
        assert "missing" in row
        assert "pip install" in row


@pytest.mark.parametrize(
    ("stage", "config", "package"),
    [
        ("sft", {"dataset": {"path": "demonstrations.jsonl"}}, "trl"),
        ("ppo", {"tuning": {"kind": "lora"}, "scorer": "readability", "critic_init": "policy"}, "peft"),
    ],
)
def test_what_needs_a_missing_package_says_so(
    alone: Any,
    tiny: Any,
    prompts_file: str,
    demonstrations_file: str,
    tmp_path: Path,
    stage: Any,
    config: Any,
    package: Any,
) -> None:
    plain = {"run_dir": "run", "model": tiny.path, "precision": "fp32", "tracking": {"wandb": "off"}, **config}
    if stage == "ppo":
        plain["prompts"] = {"path": prompts_file}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(plain))
    done = alone("-m", "rlhf", stage, "stage.yaml")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert f"pip install {package}" in done.stderr
