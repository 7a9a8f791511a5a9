"""A PPO run goes on only from a checkpoint that was made from the files and models that are there now."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.errors import CheckpointError
from rlhf.kl_control import FixedKL
from rlhf.rollout.ppo_run import Saver


@pytest.fixture
def resumable(tmp_path: Path, tiny: Any, stage_config: Any, runtime: Any) -> Callable[[], Saver]:
    """`resumable()` is a new Saver of one run, whose model and reward model lie in the test's folder."""
    for name, source in (("lm", tiny.path), ("reward", tiny.reward)):
        shutil.copytree(source, tmp_path / name)
    cfg = stage_config("ppo", model=str(tmp_path / "lm"), reward_model=str(tmp_path / "reward"), save_every=1)

    def make() -> Saver:
        module = torch.nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(module.parameters())
        module(torch.ones(2)).sum().backward()
        optimizer.step()
        return Saver(cfg, runtime, module, optimizer, FixedKL(0.1), say=lambda _: None)

    return make


def test_a_run_goes_on_from_its_checkpoint(resumable: Any) -> None:
    resumable().save(3)
    saver = resumable()
    saver.restore()
    assert saver.first_step == 3


def test_a_copied_model_is_the_same_model(resumable: Any, tmp_path: Path) -> None:
    resumable().save(3)
    shutil.move(tmp_path / "lm", tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "lm", copy_function=shutil.copyfile)  # new times
    saver = resumable()
    saver.restore()
    assert saver.first_step == 3


@pytest.mark.parametrize("changed", ["prompts.jsonl", "lm/model.safetensors", "reward/MANIFEST.json"])
def test_changed_inputs_are_refused_on_resume(resumable: Any, tmp_path: Path, changed: str) -> None:
    resumable().save(3)
    (tmp_path / changed).write_bytes((tmp_path / changed).read_bytes().replace(b"e", b"a"))
    saver = resumable()
    with pytest.raises(CheckpointError) as caught:
        saver.restore()
    others = {"prompts.jsonl", "lm", "reward"} - {changed.partition("/")[0]}
    assert str(tmp_path / changed.partition("/")[0]) in caught.value.message
    assert not any(str(tmp_path / other) in caught.value.message for other in others)
    assert "--resume never" in caught.value.fix
    assert saver.first_step == 0


def test_a_checkpoint_that_recorded_no_inputs_is_resumed(resumable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of earlier versions."""
    saver = resumable()
    monkeypatch.setattr(saver, "_inputs", {})
    saver.save(2)
    again = resumable()
    again.restore()
    assert again.first_step == 2
