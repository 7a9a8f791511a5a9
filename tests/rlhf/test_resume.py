"""A run goes on only from a checkpoint that was made from the configuration, files and models that are there now."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf.errors import CheckpointError
from rlhf.resume import TERMINATED, Resume
from rlhf.runs import RunOptions


class Run:
    """One process of a PPO run, as far as its checkpoints see it."""

    def __init__(self, cfg: Any, runtime: Any, resume: str = "auto") -> None:
        torch.manual_seed(0)
        self.said: list[str] = []
        self.module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        self.module[0].bias.requires_grad_(False)
        groups = [{"params": [p for p in self.module.parameters() if p.requires_grad]}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01)
        self.resume = Resume.open(cfg, RunOptions(resume=resume), runtime, say=self.said.append)
        self.resume.load_weights(self.module)
        self.resume.attach(self.module, self.optimizer, state=lambda: {"kl": 0.5})
        self.resume.begin()

    def train(self, steps: int) -> None:
        for step in range(steps):
            self.optimizer.zero_grad()
            self.module(torch.tensor([[1.0, -0.5 * step, 2.0]])).square().sum().backward()
            self.optimizer.step()

    def save(self, step: int) -> None:
        self.train(step)
        self.resume.save(step)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.module.parameters()]


@pytest.fixture
def start(tmp_path: Path, tiny: Any, stage_config: Any, runtime: Any) -> Callable[..., Run]:
    """`start()` is a new process of one run, whose model and reward model lie in the test's folder."""
    for name, source in (("lm", tiny.path), ("reward", tiny.reward)):
        shutil.copytree(source, tmp_path / name)

    def make(resume: str = "auto", **changes: Any) -> Run:
        models = {"model": str(tmp_path / "lm"), "reward_model": str(tmp_path / "reward")}
        return Run(stage_config("ppo", **models, **{"save_every": 1, **changes}), runtime, resume)

    return make


def test_a_run_goes_on_as_if_it_had_never_ended(start: Any) -> None:
    first = start()
    first.save(3)
    first.train(2)
    second = start()
    assert (second.resume.first_step, second.resume.state) == (3, {"kl": 0.5})
    assert second.said == ["going on after step 3"]
    second.train(2)
    assert all(map(torch.equal, first.weights(), second.weights()))


def test_without_a_checkpoint_it_begins(start: Any) -> None:
    run = start()
    assert (run.resume.first_step, run.resume.state, run.said) == (0, {}, [])


def test_a_copied_model_is_the_same_model(start: Any, tmp_path: Path) -> None:
    start().save(3)
    shutil.move(tmp_path / "lm", tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "lm", copy_function=shutil.copyfile)  # new times
    assert start().resume.first_step == 3


@pytest.mark.parametrize("changed", ["prompts.jsonl", "lm/model.safetensors", "reward/MANIFEST.json"])
def test_changed_inputs_are_refused(start: Any, tmp_path: Path, changed: str) -> None:
    start().save(3)
    (tmp_path / changed).write_bytes((tmp_path / changed).read_bytes().replace(b"e", b"a"))
    with pytest.raises(CheckpointError) as caught:
        start()
    others = {"prompts.jsonl", "lm", "reward"} - {changed.partition("/")[0]}
    assert str(tmp_path / changed.partition("/")[0]) in caught.value.message
    assert not any(str(tmp_path / other) in caught.value.message for other in others)
    assert "--resume never" in caught.value.fix


def test_inputs_are_those_that_were_read_and_not_what_they_became(start: Any, tmp_path: Path) -> None:
    """An edit while the run goes on changes nothing in it; the run that goes on from its checkpoint would read it."""
    run = start()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "explain rain"}\n')
    run.save(3)
    with pytest.raises(CheckpointError, match=r"changed since .*prompts\.jsonl"):
        start()


def test_another_configuration_is_refused_but_not_another_way_to_compute_it(start: Any) -> None:
    start(batch_size=8).save(3)
    for free in ({"micro_batch_size": 2}, {"gradient_checkpointing": True}, {"save_every": 7}):
        assert start(batch_size=8, **free).resume.first_step == 3
    for other in ({"batch_size": 4}, {"gamma": 0.5}, {"steps": 9}):
        with pytest.raises(CheckpointError, match="another configuration"):
            start(**{"batch_size": 8, **other})


def test_rows_of_a_step_are_counted_over_processes(start: Any, stage_config: Any, runtime: Any) -> None:
    """Two processes with half the rows go on from one; with as many rows each they do not."""
    first = start(batch_size=8)
    first.save(3)

    def twice(**changes: Any) -> Resume:
        two = type("Two", (), {"world_size": 2, "rank": 0, "is_main": True, "zero_stage": 0})()
        two.gather_objects, two.barrier = (lambda values: values), (lambda: None)
        return Resume.open(first.resume._cfg.model_copy(update=changes), RunOptions(), two, say=said.append)

    said: list[str] = []
    assert twice(batch_size=4).first_step == 3
    assert "which one process wrote" in said[0]
    with pytest.raises(CheckpointError, match="made by 1 processes, now there are 2"):
        twice(batch_size=8)


def test_never_keeps_the_earlier_checkpoints_aside(start: Any, tmp_path: Path) -> None:
    for name in ("1", "2"):
        start("never").save(3)
        assert start().resume.first_step == 3
        assert start("never").resume.first_step == 0
        assert not (tmp_path / "ppo" / "checkpoints" / "step_3").exists()
        assert (tmp_path / "ppo" / f"checkpoints.old-{name}" / "step_3" / "MANIFEST.json").exists()


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "RLHF_TRY"])
@pytest.mark.parametrize("asked", ["never", "path"])
def test_a_restart_goes_on_whatever_the_first_start_was_asked(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, asked: str
) -> None:
    """A launcher gives its processes the same options again."""
    start().save(3)
    before = tmp_path / "ppo" / "checkpoints" / "step_3"
    option = "never" if asked == "never" else str(before)
    monkeypatch.setenv(variable, "1")
    assert start(option).resume.first_step == (0 if asked == "never" else 3), "the first start died before it began"
    monkeypatch.setenv(variable, "0")
    start(option).save(5)
    monkeypatch.setenv(variable, "1")
    assert start(option).resume.first_step == 5
    monkeypatch.setenv(variable, "0")
    if asked == "never":
        assert start(option).resume.first_step == 0, "asked anew, by a new job"


def test_a_path_of_another_run_leaves_none_of_this_run_s(start: Any, tmp_path: Path) -> None:
    """An earlier step of the old time line would be taken for the newest of the new one."""
    start(run_dir=str(tmp_path / "other")).save(5)
    start().save(3)
    run = start(str(tmp_path / "other" / "checkpoints" / "step_5"))
    assert run.resume.first_step == 5
    assert not list((tmp_path / "ppo" / "checkpoints").iterdir())
    assert [p.name for p in (tmp_path / "ppo" / "checkpoints.old-1").iterdir()] == ["step_3"]
    assert [p.name for p in (tmp_path / "other" / "checkpoints").iterdir()] == ["step_5"]


def test_a_path_names_the_checkpoint_and_later_ones_go_aside(start: Any, tmp_path: Path) -> None:
    run = start()
    for step in (1, 2, 3):
        run.save(step)
    folder = tmp_path / "ppo" / "checkpoints"
    assert start(str(folder / "step_2")).resume.first_step == 2
    assert sorted(p.name for p in folder.iterdir()) == ["step_2"]
    assert sorted(p.name for p in (tmp_path / "ppo" / "checkpoints.old-1").iterdir()) == ["step_3"]
    (folder / "step_2" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json has 2 bytes"):
        start(str(folder / "step_2"))
    with pytest.raises(CheckpointError, match="has no MANIFEST"):
        start(str(tmp_path))


def test_sigterm_saves_once_and_ends(start: Any, runtime: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = start(save_every=0)
    run.resume.save_if_due(0, 9)
    assert not (tmp_path / "ppo" / "checkpoints").exists(), "nobody asked"
    monkeypatch.setattr(runtime, "has_sigterm", True)
    with pytest.raises(SystemExit) as caught:
        run.resume.save_if_due(1, 9)
    assert caught.value.code == TERMINATED == 143
    assert [p.name for p in (tmp_path / "ppo" / "checkpoints").iterdir()] == ["step_2"]
    again = start(save_every=0)
    with pytest.raises(SystemExit):
        again.resume.save_and_end(2)
    assert [p.name for p in (tmp_path / "ppo" / "checkpoints").iterdir()] == ["step_2"], "nothing new to save"
