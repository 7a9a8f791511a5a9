"""Checkpoints are whole or absent: round trips are bit-exact, all damage is seen, kills lose nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rlhf
from rlhf import checkpoint
from rlhf.checkpoint import (
    MANIFEST,
    Checkpoints,
    atomic_write,
    export_folder,
    flatten_optimizer,
    read_checkpoint,
    read_tensors,
    restore_rng,
    rng_state,
    unflatten_optimizer,
    verify_folder,
    write_tensors,
)
from rlhf.errors import CheckpointError

ROOT = Path(rlhf.__file__).parent.parent
META = {"fingerprint": "abc", "versions": {"torch": "2"}}
FILES = ("policy.safetensors", "optimizer.safetensors", "state.json", MANIFEST)


def save(store: Checkpoints, step: int) -> None:
    policy = {"w": torch.arange(12.0).reshape(3, 4) + step, "b": torch.ones(3)}
    moments = {"m": torch.full((5,), float(step))}
    store.save(step, {"policy": policy, "optimizer": moments}, {"kl": 0.1 * step}, META)


def store_with(path: Path, *steps: int) -> tuple[Checkpoints, list[str]]:
    said: list[str] = []
    store = Checkpoints(path, say=said.append)
    for step in steps:
        save(store, step)
    return store, said


def identical(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN payloads and signs of zero included."""
    raw = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    given = {
        "matrix": torch.randn(7, 5).mul(9).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "none": torch.empty(0, dtype=dtype),
    }
    if dtype.is_floating_point:
        special = [float("nan"), float("-inf"), -0.0, torch.finfo(dtype).tiny / 2]
        given["special"] = torch.tensor(special, dtype=dtype)
    write_tensors(tmp_path / "x.safetensors", given)
    back = read_tensors(tmp_path / "x.safetensors")
    assert back.keys() == given.keys()
    assert all(identical(given[name], back[name]) for name in given)


def test_tensors_may_share_storage_and_be_strided(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    given = {
        "embed": base,
        "head": base,
        "row": base[2],
        "turned": base.t(),
        "every_other": base[::2],
        "wide": base[:1].expand(3, 4),
    }
    write_tensors(tmp_path / "x.safetensors", given)
    back = read_tensors(tmp_path / "x.safetensors")
    assert all(identical(given[name], back[name]) for name in given)
    assert back["embed"].data_ptr() == back["head"].data_ptr(), "tied weights are stored once and stay tied"
    stored = sum(t.numel() * 4 for name, t in given.items() if name != "head")
    assert (tmp_path / "x.safetensors").stat().st_size < stored + 1000


def test_a_checkpoint_gives_back_what_it_was_given(tmp_path: Path) -> None:
    store, _ = store_with(tmp_path)
    state = {"coef": 0.1 + 0.2, "best": float("-inf"), "cursor": 2**60, "names": ["ä", None, True]}
    path = store.save(12, {"policy": {"w": torch.tensor([1 / 3])}}, state, META)
    latest = Checkpoints(tmp_path).latest()
    assert latest is not None
    assert (latest.step, latest.state, latest.meta, latest.path) == (12, state, META, path)
    assert identical(latest.tensors("policy")["w"], torch.tensor([1 / 3]))
    with pytest.raises(CheckpointError, match=r"no tensors 'critic'; it has policy"):
        latest.tensors("critic")


def test_no_checkpoints_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).latest() is None
    assert not (tmp_path / "checkpoints").exists(), "looking writes nothing"


def adamw(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    head, rest = [model[2].weight], [model[0].weight, model[0].bias, model[2].bias]
    groups = [{"params": head, "lr": 1e-2}, {"params": rest, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-5, amsgrad=seed == 7)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("seed", [0, 7])
def test_a_resumed_optimizer_and_its_random_numbers_go_on_bit_for_bit(tmp_path: Path, seed: int) -> None:
    model, optimizer = adamw(seed)
    train(model, optimizer, 3)
    optimizer_tensors, optimizer_json = flatten_optimizer(optimizer.state_dict())
    rng_tensors, rng_json = rng_state()
    groups = {"policy": model.state_dict(), "optimizer": optimizer_tensors, "rng": rng_tensors}
    Checkpoints(tmp_path).save(3, groups, {"optimizer": optimizer_json, "rng": rng_json}, META)
    train(model, optimizer, 4)

    resumed, resumed_optimizer = adamw(seed)
    latest = Checkpoints(tmp_path).latest()
    assert latest is not None
    resumed.load_state_dict(latest.tensors("policy"))
    optimizer_state = unflatten_optimizer(latest.tensors("optimizer"), latest.state["optimizer"])
    resumed_optimizer.load_state_dict(optimizer_state)
    restore_rng(latest.tensors("rng"), latest.state["rng"])
    train(resumed, resumed_optimizer, 4)
    assert all(identical(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_the_optimizer_state_is_the_same_dict(tmp_path: Path) -> None:
    model, optimizer = adamw(0)
    optimizer.param_groups[1]["lr"] = torch.tensor(1e-3)
    train(model, optimizer, 2)
    before = optimizer.state_dict()
    tensors, plain = flatten_optimizer(before)
    write_tensors(tmp_path / "o.safetensors", tensors)
    after = unflatten_optimizer(read_tensors(tmp_path / "o.safetensors"), json.loads(json.dumps(plain)))
    assert after["param_groups"] == before["param_groups"]
    assert type(after["param_groups"][0]["betas"]) is tuple
    assert after["state"].keys() == before["state"].keys()
    for index, entries in before["state"].items():
        assert entries.keys() == after["state"][index].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(identical(entries[key], after["state"][index][key]) for key in entries)
    del tensors["state.0.exp_avg"]
    with pytest.raises(CheckpointError, match=r"state\.0\.exp_avg"):
        unflatten_optimizer(tensors, plain)


def test_random_states_of_torch_python_and_numpy_come_back() -> None:
    def draw() -> tuple[object, ...]:
        return torch.randn(5).tolist(), random.gauss(0, 1), random.random(), np.random.randn(3).tolist()

    draw()
    tensors, plain = rng_state()
    expected = draw()
    draw()
    restore_rng(tensors, json.loads(json.dumps(plain)))
    assert draw() == expected


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_byte_is_seen_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    store, said = store_with(tmp_path, 1, 2)
    path = store.folder / "step_2" / name
    good = path.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 60)):
        flip(path, position)
        latest = store.latest()
        assert latest is not None
        assert latest.step == 1, f"byte {position} of {name}"
        assert latest.state == {"kl": 0.1}
        assert name in said[-2]
        assert said[-1] == "falling back to checkpoint step_1"
        path.write_bytes(good)
    said.clear()
    assert store.latest().step == 2  # type: ignore[union-attr]
    assert said == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "missing", "empty", "longer"])
def test_truncated_and_missing_files_are_seen(tmp_path: Path, name: str, damage: str) -> None:
    store, said = store_with(tmp_path, 1, 2)
    path = store.folder / "step_2" / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"truncated": data[:-1], "empty": b"", "longer": data + b" "}[damage])
    assert store.latest().step == 1  # type: ignore[union-attr]
    assert name in said[0]
    if name != MANIFEST and damage != "missing":
        assert f"bytes, not the {len(data)} of its manifest" in said[0]


def test_when_none_verifies_it_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    store, said = store_with(tmp_path, 1, 2)
    for step in (1, 2):
        flip(store.folder / f"step_{step}" / "policy.safetensors", -1)
    with pytest.raises(CheckpointError, match=r"no checkpoint verifies(.|\n)*step_2(.|\n)*step_1"):
        store.latest()
    assert len(said) == 2


def test_a_renamed_checkpoint_is_not_believed(tmp_path: Path) -> None:
    store, said = store_with(tmp_path, 1, 2)
    (store.folder / "step_2").rename(store.folder / "step_90")
    assert store.latest().step == 1  # type: ignore[union-attr]
    assert "holds step 2" in said[0]


def test_another_format_names_the_way_out(tmp_path: Path) -> None:
    store, _ = store_with(tmp_path, 1)
    path = store.folder / "step_1" / MANIFEST
    body = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}
    path.write_text(checkpoint._manifest_text({**body, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99, not 1"):
        verify_folder(store.folder / "step_1")


def test_keep_newest_and_at_least_two(tmp_path: Path) -> None:
    store, _ = store_with(tmp_path, 1, 2, 10, 9)
    assert store.steps() == [2, 9, 10], "step 10 is later than the one saved last, and stays"
    save(store, 11)
    assert store.steps() == [10, 11]
    with pytest.raises(ValueError, match="at least 2"):
        Checkpoints(tmp_path, keep=1)


def test_pruning_comes_after_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = store_with(tmp_path, 1, 2)
    removed: list[str] = []
    rmtree = shutil.rmtree

    def watched(path: Path, *args: object, **kwargs: object) -> None:
        if Path(path).name.startswith("step_"):
            verify_folder(store.folder / "step_3")
            removed.append(Path(path).name)
        rmtree(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(shutil, "rmtree", watched)
    save(store, 3)
    assert removed == ["step_1"]


def test_a_step_can_be_saved_again_over_a_damaged_one(tmp_path: Path) -> None:
    store, _ = store_with(tmp_path, 1, 2)
    flip(store.folder / "step_2" / "policy.safetensors", -1)
    save(store, 2)
    assert store.latest().step == 2  # type: ignore[union-attr]
    assert store.steps() == [1, 2]


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path: Path) -> None:
    store, _ = store_with(tmp_path, 1, 2)
    shutil.copytree(store.folder / "step_2", store.folder / ".staging-step_3")
    (store.folder / "step_2").rename(store.folder / ".replaced-step_2")
    reader = Checkpoints(tmp_path, writer=False)
    assert reader.latest().step == 1  # type: ignore[union-attr]
    assert len(list(store.folder.iterdir())) == 3, "a reader changes nothing"
    with pytest.raises(RuntimeError, match="reader"):
        save(reader, 3)
    assert Checkpoints(tmp_path).latest().step == 2, "a replacement cut short is undone"  # type: ignore[union-attr]
    assert sorted(p.name for p in store.folder.iterdir()) == ["step_1", "step_2"]


def test_a_full_disk_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = store_with(tmp_path, 1, 2)
    usage = shutil._ntuple_diskusage(10**6, 10**6 - 83, 83)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"step_3: it needs 84 bytes, the disk has 83 free"):
        save(store, 3)  # (12 + 3 + 5) floats of 4 bytes, x 1.05
    monkeypatch.undo()
    assert store.steps() == [1, 2]
    assert store.latest().step == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("broken", ["write", "fsync"])
def test_a_disk_that_fails_while_writing_is_reported_and_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    store, _ = store_with(tmp_path, 1, 2)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((checkpoint, "save_file") if broken == "write" else (os, "fsync")), fail)
    with pytest.raises(CheckpointError, match=r"step_3: .*No space left") as caught:
        save(store, 3)
    assert "older checkpoints are intact" in caught.value.fix
    assert sorted(p.name for p in store.folder.iterdir()) == ["step_1", "step_2"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from rlhf.checkpoint import Checkpoints, verify_folder
torch.set_num_threads(1)
root = Path(sys.argv[1])

def save(store, step):
    weights = torch.full((50_000,), float(step))
    store.save(step, {"policy": {"w": weights}, "optimizer": {"m": weights}}, {"step": step}, {})

def check(run_dir):
    # The writer's folder as the kill left it, seen by a reader; then what the next writer starts from.
    for writer in (False, True):
        said = []
        latest = Checkpoints(run_dir, say=said.append, writer=writer).latest()
        assert latest is not None and not said, said
        assert latest.state["step"] == latest.step
        assert (latest.tensors("policy")["w"] == latest.step).all()
    return latest.step

def child(run_dir, kill_at):
    calls = 0
    def counted(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapped
    store = Checkpoints(run_dir)
    save(store, 1)
    save(store, 2)
    for name in ("fsync", "rename", "replace", "open", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    if kill_at is None:
        step = 3
        while True:
            save(store, step)
            step += 1
    for step in (3, 3, 4):   # step 3 twice: the second one replaces the first
        save(store, step)
    os._exit(0)

reached = set()
for kill_at in range(1, 200):
    run_dir = root / f"point_{kill_at}"
    pid = os.fork()
    if pid == 0:
        child(run_dir, kill_at)
    status = os.waitpid(pid, 0)[1]
    reached.add(check(run_dir))
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0
        break
assert kill_at > 40 and reached == {2, 3, 4}, (kill_at, reached)

rng = random.Random(0)
for i in range(6):
    run_dir = root / f"time_{i}"
    pid = os.fork()
    if pid == 0:
        child(run_dir, None)
    while not (run_dir / "checkpoints" / "step_2").exists():
        time.sleep(0.001)
    time.sleep(rng.uniform(0.0, 0.2))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert check(run_dir) >= 2
print("points", kill_at)
"""


def test_a_writer_killed_anywhere_leaves_a_verified_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("points")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_atomic_write_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "state.json"
    atomic_write(path, "grün")
    assert path.read_bytes() == "grün".encode()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
    assert path.read_text(encoding="utf-8") == "grün"


def test_an_export_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "run" / "final"
    for content in ("first", "second"):
        with export_folder(final, {"stage": content}) as staging:
            (staging / "inner").mkdir()
            (staging / "inner" / "model.txt").write_text(content)
            (staging / f"{content}.txt").write_text("only in this one")
            assert final.exists() == (content == "second"), "the old one stays until the new one is complete"
    manifest = verify_folder(final)
    assert manifest["meta"] == {"stage": "second"}
    assert sorted(manifest["files"]) == ["inner/model.txt", "second.txt"]
    assert [p.name for p in final.parent.iterdir()] == ["final"]
    flip(final / "inner" / "model.txt", 0)
    with pytest.raises(CheckpointError, match=r"model\.txt was altered"):
        verify_folder(final)


def write_then_fail(final: Path) -> None:
    with export_folder(final) as staging:
        (staging / "model.txt").write_text("half")
        raise KeyError("stop")


def test_a_failed_export_leaves_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with export_folder(final) as staging:
        (staging / "model.txt").write_text("whole")
    with pytest.raises(KeyError, match="stop"):
        write_then_fail(final)
    assert (final / "model.txt").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_an_export_cut_short_between_its_renames_is_put_back(tmp_path: Path) -> None:
    final = tmp_path / "final"
    with export_folder(final) as staging:
        (staging / "model.txt").write_text("whole")
    final.rename(tmp_path / ".old-final")
    with pytest.raises(KeyError, match="stop"):
        write_then_fail(final)
    assert (final / "model.txt").read_text() == "whole"


def test_an_export_never_deletes_what_is_not_its_own(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "thesis.txt").write_text("dear")
    with export_folder(final) as staging:
        (staging / "model.txt").write_text("new")
    assert (tmp_path / "final.aside-1" / "thesis.txt").read_text() == "dear"
    assert sorted(verify_folder(final)["files"]) == ["model.txt"]


# --- several ranks ----------------------------------------------------------------------------------------


def test_ranks_fill_one_folder_that_rank_0_commits_when_all_are_done(tmp_path: Path) -> None:
    """Two ranks as threads, a barrier between them as between processes."""
    meeting = threading.Barrier(2, timeout=20)
    seen: list[bool] = []

    def rank(number: int) -> None:
        store = Checkpoints(tmp_path, writer=number == 0)
        with store.staged(3, META, needed=100, barrier=meeting.wait) as folder:
            if number == 1:
                time.sleep(0.1)  # the slowest one is waited for
            (folder / f"shard_{number}").write_text("x")
            if number == 0:
                (folder / "state.json").write_text("{}")
        seen.append((tmp_path / "checkpoints" / "step_3" / MANIFEST).is_file())

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True, True]
    found = read_checkpoint(tmp_path / "checkpoints" / "step_3")
    assert (found.step, found.meta) == (3, META)
    assert {"shard_0", "shard_1"} <= verify_folder(found.path)["files"].keys()
    assert not list((tmp_path / "checkpoints").glob(".staging*"))


def test_a_rank_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    save(store, 1)

    def interrupted() -> None:
        with store.staged(2, META, needed=0) as folder:
            (folder / "state.json").write_text("{}")
            raise OSError("no space left")

    with pytest.raises(CheckpointError, match=r"cannot write .*step_2: no space left"):
        interrupted()
    assert store.steps() == [1]
    assert [path.name for path in store.folder.iterdir()] == ["step_1"]


def test_a_folder_of_another_kind_is_no_checkpoint(tmp_path: Path) -> None:
    with export_folder(tmp_path / "final") as folder:
        (folder / "model.safetensors").write_text("x")
    with pytest.raises(CheckpointError, match="final holds no checkpoint"):
        read_checkpoint(tmp_path / "final")
    with pytest.raises(CheckpointError, match=r"nowhere has no MANIFEST\.json"):
        read_checkpoint(tmp_path / "nowhere")
