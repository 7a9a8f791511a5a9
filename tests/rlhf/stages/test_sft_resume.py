"""SFT goes on from a checkpoint as if it had never stopped, and only from one that is whole and its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import rlhf
from rlhf import checkpoint
from rlhf.config import dump
from rlhf.errors import CheckpointError, ConfigError
from rlhf.runs import RunOptions
from rlhf.stages import sft
from rlhf.supervised.trainer import SplitFreeTrainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::UserWarning:trl.*")
ROOT = Path(rlhf.__file__).parent.parent


class Killed(Exception):
    """Ends a run after a step."""


def kill_after(step: int, cfg: Any, monkeypatch: pytest.MonkeyPatch, resume: str = "auto") -> None:
    """Run until right after the optimizer's `step`, before its metrics are written."""
    whole = sft.Reporter.on_step_end

    def die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        whole(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sft.Reporter, "on_step_end", die)
        with pytest.raises(Killed):
            sft.main(cfg, RunOptions(resume=resume))


def left_by(cfg: Any) -> tuple[bytes, str]:
    """What a run leaves: the model's file and the metrics, to the last bit."""
    folder = Path(cfg.run_dir)
    return (folder / "final" / "model.safetensors").read_bytes(), (folder / "metrics.jsonl").read_text()


def checkpoint_of(cfg: Any, step: int) -> Path:
    return Path(cfg.run_dir) / "checkpoints" / f"step_{step}"


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DROPOUT = {"tuning": {"kind": "lora", "rank": 4, "dropout": 0.3}}


@pytest.mark.parametrize(
    ("changes", "save_every", "killed"),
    [
        ({"micro_batch_size": 2}, 4, 6),  # within an epoch; the checkpoint is older than the last line of metrics
        ({}, 6, 8),  # at the end of an epoch, with its evaluation
        (DROPOUT, 4, 9),
        ({"trainer": {"max_steps": 15, "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 4}}, 4, 13),
        ({"trainer": {"logging_steps": 5}, "eval_dataset": None}, 4, 13),  # the summary's loss is of step 10
    ],
    ids=["mid-epoch", "epoch", "dropout", "half-a-line", "no-line-after"],
)
def test_a_killed_run_goes_on_bit_for_bit(
    ragged_sft: Any, monkeypatch: pytest.MonkeyPatch, changes: Any, save_every: int, killed: int
) -> None:
    trainer = {"max_steps": 14, **changes.get("trainer", {})}
    runs = [ragged_sft(n, save_every=save_every, **{**changes, "trainer": trainer}) for n in ("whole", "killed")]
    whole = sft.main(runs[0], RunOptions())
    kill_after(killed, runs[1], monkeypatch)
    again = sft.main(runs[1], RunOptions())
    assert left_by(runs[0]) == left_by(runs[1])
    assert again.summary == whole.summary


def test_sigterm_in_the_last_step_ends_the_run_as_planned(ragged_sft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in an earlier one with a checkpoint, from which the same command goes on."""
    short = {"trainer": {"max_steps": 4, "lr_scheduler_type": "constant", "warmup_steps": 0}, "save_every": 0}
    sft.main(whole := ragged_sft("whole", **short), RunOptions())
    whole_step = sft.Reporter.on_step_end
    for at in (2, 4):

        def asked(self: Any, args: Any, state: Any, control: Any, at: int = at, **kwargs: Any) -> None:
            if state.global_step == at:
                os.kill(os.getpid(), signal.SIGTERM)
            whole_step(self, args, state, control, **kwargs)

        cfg = ragged_sft(f"asked_{at}", **short)
        with monkeypatch.context() as patch:
            patch.setattr(sft.Reporter, "on_step_end", asked)
            if at == 2:
                with pytest.raises(SystemExit) as caught:
                    sft.main(cfg, RunOptions())
                assert caught.value.code == 143
            else:
                sft.main(cfg, RunOptions())
        if at == 2:
            assert sft.main(cfg, RunOptions()).summary["steps"] == 4
        assert left_by(cfg) == left_by(whole)


def test_a_checkpoint_in_the_background_is_of_its_step(ragged_sft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on changing what is being written."""
    short = {"save_every": 2, "trainer": {"max_steps": 5}, "eval_dataset": None}
    sft.main(whole := ragged_sft("whole", **short), RunOptions())
    write = checkpoint.write_tensors
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *given: (time.sleep(0.3), write(*given)))
    sft.main(cfg := ragged_sft("background", **short, save_in_background=True), RunOptions())
    assert left_by(cfg) == left_by(whole)
    states = [(checkpoint_of(each, 4) / "state.json").read_text() for each in (whole, cfg)]
    assert json.loads(states[0])["counts"] == json.loads(states[1])["counts"]


def test_the_checkpoint_of_an_epoch_waits_for_its_evaluation(ragged_sft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that went on from the end of an epoch would not evaluate there, and the line would be lost."""
    short = {"trainer": {"max_steps": 7}, "save_every": 6}
    sft.main(whole := ragged_sft("whole", **short), RunOptions())

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(SplitFreeTrainer, "evaluate", die)
        with pytest.raises(Killed):
            sft.main(cfg := ragged_sft("killed", **short), RunOptions())
    sft.main(cfg, RunOptions())
    assert left_by(cfg) == left_by(whole)


def test_a_resumed_run_reads_every_row_that_was_left_once(ragged_sft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[list[int]]] = []
    step = SplitFreeTrainer.training_step

    def spied(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        read.append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *args)

    monkeypatch.setattr(SplitFreeTrainer, "training_step", spied)
    short = {"trainer": {"max_steps": 9}, "save_every": 4, "eval_dataset": None}
    sft.main(ragged_sft("whole", **short), RunOptions())
    whole, read[:] = list(read), []
    kill_after(6, cfg := ragged_sft("killed", **short), monkeypatch)
    before, read[:] = list(read), []
    sft.main(cfg, RunOptions())
    assert before == whole[: len(before)]
    assert len(before) == 11  # two micro-batches a step, one in the 6th with its 3 rows
    assert read == whole[8:]


def test_a_torn_checkpoint_is_removed_and_a_damaged_one_passed_over(
    ragged_sft: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    short = {"trainer": {"max_steps": 7}, "save_every": 2}
    sft.main(whole := ragged_sft("whole", **short), RunOptions())
    kill_after(5, cfg := ragged_sft("damaged", **short), monkeypatch)
    torn = checkpoint_of(cfg, 6).with_name(".staging-step_6")
    shutil.copytree(checkpoint_of(cfg, 4), torn)
    flip(checkpoint_of(cfg, 4) / "optimizer.safetensors")
    sft.main(cfg, RunOptions())
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint step_4 is damaged and not used" in said
    assert "falling back to checkpoint step_2" in said
    assert not torn.exists()
    assert left_by(cfg) == left_by(whole)
    for step in (4, 6):
        flip(checkpoint_of(cfg, step) / "trainable.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint verifies"):
        sft.main(cfg, RunOptions())


def test_older_checkpoints_go_and_the_last_step_has_none(ragged_sft: Any) -> None:
    sft.main(cfg := ragged_sft("run", trainer={"max_steps": 8}, save_every=2), RunOptions())
    assert sorted(path.name for path in (Path(cfg.run_dir) / "checkpoints").iterdir()) == ["step_4", "step_6"]
    sft.main(cfg := ragged_sft("none", trainer={"max_steps": 3}, save_every=0), RunOptions())
    assert not (Path(cfg.run_dir) / "checkpoints").exists()


def test_a_named_checkpoint_and_a_new_start(ragged_sft: Any) -> None:
    short = {"trainer": {"max_steps": 7}, "save_every": 2}
    sft.main(cfg := ragged_sft("run", **short), RunOptions())
    whole = left_by(cfg)
    sft.main(cfg, RunOptions(resume=str(checkpoint_of(cfg, 4))))
    assert left_by(cfg) == whole
    aside = [path.name for path in (Path(cfg.run_dir) / "checkpoints.old-1").iterdir()]
    assert aside == ["step_6"]  # what came after the named one is not resumed by mistake
    sft.main(other := ragged_sft("other", **short), RunOptions(resume=str(checkpoint_of(cfg, 4))))
    assert left_by(other)[0] == whole[0]
    sft.main(cfg, RunOptions(resume="never"))
    assert left_by(cfg) == whole
    assert Path(cfg.run_dir, "checkpoints.old-2", "step_6").is_dir()
    with pytest.raises(CheckpointError, match=r"nowhere has no MANIFEST\.json"):
        sft.main(cfg, RunOptions(resume=str(Path(cfg.run_dir) / "nowhere")))


def test_another_run_is_refused_and_another_split_is_not(ragged_sft: Any, tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny.path, tmp_path / "lm")
    short = {"trainer": {"max_steps": 3}, "save_every": 2, "model": str(tmp_path / "lm"), "eval_dataset": None}
    sft.main(ragged_sft("run", **short), RunOptions())
    sft.main(ragged_sft("run", **short, micro_batch_size=2, keep_checkpoints=3), RunOptions())
    for changes, message in (({"lr": 2e-3}, "another configuration"), ({"batch_size": 4}, "another configuration")):
        with pytest.raises(CheckpointError, match=message):
            sft.main(ragged_sft("run", **short, **changes), RunOptions())
    (tmp_path / "lm" / "generation_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"changed since .*step_2 was made: .*/lm"):
        sft.main(ragged_sft("run", **short), RunOptions())


@pytest.mark.parametrize("key", ["save_strategy", "save_steps", "load_best_model_at_end", "train_sampling_strategy"])
def test_checkpoints_and_batches_are_ours(ragged_sft: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=f"trainer.{key} is set by our own keys"):
        sft.main(ragged_sft("run", trainer={key: 1}), RunOptions())


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_was(ragged_sft: Any, tmp_path: Path) -> None:
    """SIGKILL at moments of its own choosing, inside the writing of a checkpoint, too."""
    settings = {"trainer": {"max_steps": 60}, "save_every": 1}
    whole, killed = (ragged_sft(name, **settings) for name in ("whole", "killed"))
    for cfg in (whole, killed):
        (tmp_path / f"{Path(cfg.run_dir).name}.yaml").write_text(dump(cfg), encoding="utf-8")
    # Both with one thread: on some processors two add up in another order.
    options: Any = {"env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, "cwd": ROOT}
    options["stdout"] = subprocess.DEVNULL
    subprocess.run([sys.executable, "-m", "rlhf", "sft", str(tmp_path / "whole.yaml")], check=True, **options)
    command = [sys.executable, "-m", "rlhf", "sft", str(tmp_path / "killed.yaml")]
    kills = 0
    for _ in range(6):
        process = subprocess.Popen(command, **options)
        steps, began = checkpoint_steps(killed), time.monotonic()
        while process.poll() is None and time.monotonic() - began < 200:
            time.sleep(0.01)
            if checkpoint_steps(killed) - steps and kills < 4:
                time.sleep(0.05 * kills)
                process.kill()
                kills += process.wait() == -9
        if process.wait() == 0:
            break
    assert kills == 4
    assert left_by(killed) == left_by(whole)


def checkpoint_steps(cfg: Any) -> set[str]:
    folder = Path(cfg.run_dir) / "checkpoints"
    return {path.name for path in folder.glob("step_*")} if folder.is_dir() else set()
