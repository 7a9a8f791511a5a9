"""A refused run leaves the folder of the run before it as it was; what identifies a run's inputs."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf import checkpoint, config, files
from rlhf.errors import CheckpointError, ConfigError, DataError, InvariantError, ModelError
from rlhf.runs import FREE_TO_CHANGE, digests, learned_fingerprint, named_data, named_models, recorded
from rlhf.types import RunResult

Record = Callable[[RunResult], None]


def configured(run_dir: Path, seed: int = 0, **changes: Any) -> Any:
    data = {"run_dir": str(run_dir), "seed": seed, "rollouts": "r.parquet", "annotators": [{"name": "ada"}]}
    return config.validate({**data, **changes}, "label", source="test")


def finish(run_dir: Path, seed: int = 0) -> None:
    """One good run with one output."""
    with recorded(configured(run_dir, seed), "label") as record:
        (run_dir / "labels.jsonl").write_text(f"seed {seed}\n")
        record(RunResult(str(run_dir), {}, {}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fail(run_dir: Path, error: BaseException, before: Callable[[Path], Any] = lambda _: None) -> None:
    """A run with seed 1 that does `before` and then fails."""
    with recorded(configured(run_dir, seed=1), "label"):
        before(run_dir)
        raise error


ERRORS = [kind("no") for kind in (ConfigError, DataError, ModelError, CheckpointError, InvariantError)]
ERRORS += [PermissionError(errno.EACCES, "no", "data.jsonl"), KeyboardInterrupt(), RuntimeError("a bug")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_run_that_fails_before_it_wrote_leaves_the_earlier_one(tmp_path: Path, error: BaseException) -> None:
    finish(tmp_path / "run")
    before = contents(tmp_path / "run")
    assert set(before) == {"config.yaml", "environment.json", "labels.jsonl", "result.json"}
    with pytest.raises(type(error)):
        fail(tmp_path / "run", error)
    assert contents(tmp_path / "run") == before


def test_a_refused_run_in_a_new_folder_leaves_none(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        fail(tmp_path / "a" / "b" / "run", DataError("no"))
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_removes_nothing_that_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "run" / "mine").mkdir(parents=True)
    with pytest.raises(DataError):
        fail(tmp_path / "run", DataError("no"))
    assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "mine"]


@pytest.mark.parametrize("error", [ModelError("no"), KeyboardInterrupt()], ids=["refused", "interrupted"])
@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "metrics.jsonl").write_text("{}\n"),
        lambda folder: (folder / "labels.jsonl").write_text("seed 1\n"),
    ],
    ids=["new", "replaced"],
)
def test_a_run_that_wrote_keeps_its_configuration_and_the_earlier_result_goes(
    tmp_path: Path, write: Any, error: BaseException
) -> None:
    finish(tmp_path / "run")
    os.utime(tmp_path / "run" / "labels.jsonl", ns=(0, 0))  # a rewrite shows, however coarse the clock of the disk
    with pytest.raises(type(error)):
        fail(tmp_path / "run", error, before=write)
    assert "seed: 1" in (tmp_path / "run" / "config.yaml").read_text()
    assert not (tmp_path / "run" / "result.json").exists(), "the sign that the stage is done"


def test_files_put_aside_or_cleaned_up_or_of_wandb_are_no_output(tmp_path: Path) -> None:
    """`--resume never` renames checkpoints, `Checkpoints` removes torn ones: the earlier run is still what is there."""
    finish(tmp_path / "run")
    for name in ("step_1", ".staging-step_2"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / name / "state.json").write_text("{}")

    def tidy(folder: Path) -> None:
        (folder / "checkpoints" / ".staging-step_2" / "state.json").unlink()
        (folder / "checkpoints").rename(folder / "checkpoints.old-1")
        (folder / "wandb").mkdir()
        (folder / "wandb" / "run_id").write_text("x")

    with pytest.raises(CheckpointError):
        fail(tmp_path / "run", CheckpointError("no"), before=tidy)
    assert "seed: 0" in (tmp_path / "run" / "config.yaml").read_text()
    assert (tmp_path / "run" / "result.json").exists()


def test_a_good_run_replaces_the_record(tmp_path: Path) -> None:
    finish(tmp_path / "run")
    finish(tmp_path / "run", seed=5)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["seed"] == 5
    assert "seed: 5" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_full_disk_is_named_by_the_run_folder(tmp_path: Path) -> None:
    """A write that fails says no path of its own."""
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as caught:
        fail(tmp_path / "run", error)
    assert caught.value.filename == str(tmp_path / "run")


def test_a_write_that_fails_names_the_file_and_not_its_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "x.json").write_text("old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.atomic_write(tmp_path / "x.json", "new")
    assert caught.value.filename == str(tmp_path / "x.json")
    assert contents(tmp_path) == {"x.json": b"old"}


# --- what a run reads and learns from -------------------------------------------------------------------------


def test_inputs_are_found_wherever_a_configuration_names_them(stage_config: Any) -> None:
    data = {"path": "p.jsonl"}
    ppo = stage_config("ppo", model="a", reference="b", reward_model="c", prompts=data, ptx={"path": "x"}, ptx_coef=1)
    assert (named_models(ppo), named_data(ppo)) == ({"a", "b", "c"}, {"p.jsonl", "x"})
    evaluate = stage_config(
        "evaluate", policies={"ppo": "a", "sft": "b"}, reference="c", base="d", reward_model="e", prompts=data
    )
    assert (named_models(evaluate), named_data(evaluate)) == (set("abcde"), {"p.jsonl"})
    assert named_data(configured(Path("run"))) == {"r.parquet"}
    assert named_data(configured(Path("run"), heldout_rollouts="h.parquet")) == {"r.parquet", "h.parquet"}


@pytest.mark.parametrize("key", sorted(FREE_TO_CHANGE - {"run_dir", "tracking"}))
def test_keys_that_change_nothing_learned_are_keys_of_ppo(stage_config: Any, key: str) -> None:
    before = stage_config("ppo")
    other = {"guards": {"on_alarm": "stop", "gold_scorer": "readability"}}
    after = stage_config("ppo", **{key: other.get(key, True if getattr(before, key) is False else 7)})
    assert before != after
    assert learned_fingerprint(before) == learned_fingerprint(after)
    assert learned_fingerprint(before) != learned_fingerprint(stage_config("ppo", gamma=0.5))


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_answers_at_a_time_are_free_where_each_has_a_seed_of_its_own(stage_config: Any, engine: str) -> None:
    sampling = {"max_new_tokens": 10, "engine": engine}
    prints = [learned_fingerprint(stage_config("ppo", sampling=sampling | {"batch_size": n})) for n in (16, 4)]
    assert (prints[0] == prints[1]) == (engine == "native")
    longer = stage_config("ppo", sampling=sampling | {"max_new_tokens": 11, "batch_size": 4})
    assert learned_fingerprint(longer) != prints[1]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize("exact", [True, False])
def test_the_digest_of_a_model_follows_its_weights(model: Path, exact: bool) -> None:
    (before,) = digests([str(model)], exact=exact).values()
    assert digests([str(model)], exact=exact) == {str(model): before}
    (model / "model.safetensors").write_bytes(b"retrain")  # of the same size
    os.utime(model / "model.safetensors", ns=(0, 0))
    assert digests([str(model)], exact=exact) != {str(model): before}


def test_a_copy_of_a_model_has_the_same_exact_digest(model: Path) -> None:
    """A cluster that copies the model before each start must still be able to resume."""
    before = digests([str(model)], exact=True)
    os.utime(model / "model.safetensors", ns=(0, 0))
    assert digests([str(model)], exact=True) == before


def test_a_manifest_speaks_for_its_folder(model: Path) -> None:
    assert files.MANIFEST == checkpoint.MANIFEST
    checkpoint.write_manifest(model, {})
    before = digests([str(model)], exact=False)
    assert digests([str(model)], exact=True) == before
    os.utime(model / "model.safetensors", ns=(0, 0))
    assert digests([str(model)], exact=False) == before
    (model / "model.safetensors").write_bytes(b"retrain")
    checkpoint.write_manifest(model, {})
    assert digests([str(model)], exact=False) != before


def test_what_is_not_on_this_disk_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("x")
    names = ["owner/model", str(tmp_path / "absent"), str(tmp_path / "p.jsonl"), "shipped:nothing.jsonl"]
    sha256_of_x = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert digests(names, exact=True) == {str(tmp_path / "p.jsonl"): sha256_of_x}


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    finish(tmp_path / "run")
    before = contents(tmp_path / "run")
    (tmp_path / "run" / "rollouts").mkdir()
    gone = subprocess.Popen(["true"])
    gone.wait()
    torn = [f".summary.json.{gone.pid}.tmp", f"rollouts/.step_000001.parquet.{gone.pid}.tmp"]
    others = [".hidden.tmp", f"summary.json.{gone.pid}.tmp", f"rollouts/.x.{gone.pid}", f".live.json.{os.getpid()}.tmp"]
    for name in torn + others:
        (tmp_path / "run" / name).write_text("half")
    finish(tmp_path / "run")
    assert contents(tmp_path / "run").keys() == before.keys() | set(others)
