"""Checkpoints are whole or absent: round trips are bit-exact, all damage is seen, kills lose nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlhf
from rlhf import checkpoint, tensor_files
from rlhf.checkpoint import (
    MANIFEST,
    Checkpoints,
    atomic_write,
    export_folder,
    verify_folder,
)
from rlhf.errors import CheckpointError
from rlhf.tensor_files import piece_name, read_tensors, write_tensors

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
    assert identical(latest.tensors("policy").whole("w"), torch.tensor([1 / 3]))
    with pytest.raises(CheckpointError, match=r"no tensors 'critic'; it has policy"):
        latest.tensors("critic")


def test_no_checkpoints_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).latest() is None
    assert not (tmp_path / "checkpoints").exists(), "looking writes nothing"


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


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    store, said = store_with(tmp_path, 1)
    write_tensors(store.folder / "step_1" / "policy-00002-of-00002.safetensors", {"w": torch.zeros(3, 4)})
    write_tensors(store.folder / "step_1" / "critic.safetensors", {"w": torch.zeros(1)})
    latest = store.latest()
    assert latest is not None
    assert latest.files == ("optimizer.safetensors", "policy.safetensors", "state.json")
    assert identical(latest.tensors("policy").whole("w"), torch.arange(12.0).reshape(3, 4) + 1)
    with pytest.raises(CheckpointError, match="no tensors 'critic'; it has optimizer, policy"):
        latest.tensors("critic")
    assert said == []


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

    monkeypatch.setattr(*((tensor_files, "save_file") if broken == "write" else (os, "fsync")), fail)
    with pytest.raises(CheckpointError, match=r"step_3: .*No space left") as caught:
        save(store, 3)
    assert "older checkpoints are intact" in caught.value.fix
    assert sorted(p.name for p in store.folder.iterdir()) == ["step_1", "step_2"]


# --- several ranks ----------------------------------------------------------------------------------------------


class Thread:
    """One rank of several that are threads of this process."""

    def __init__(self, rank: int, world_size: int, meeting: threading.Barrier, table: list[list[Any]]) -> None:
        self.rank, self.world_size, self._meeting, self._table = rank, world_size, meeting, table

    def gather_objects(self, values: list[Any]) -> list[Any]:
        self._table[self.rank] = values
        self._meeting.wait(20)
        joined = [value for part in self._table for value in part]
        self._meeting.wait(20)
        return joined


def together(action: Callable[[Thread], Any], world_size: int = 3) -> list[Any]:
    """`action` on every rank; what each returned or raised."""
    meeting, table = threading.Barrier(world_size), [[] for _ in range(world_size)]

    def run(rank: int) -> Any:
        try:
            return action(Thread(rank, world_size, meeting, table))
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def save_share(path: Path, step: int) -> Callable[[Thread], Any]:
    """Rank r has elements [4 r, 4 r + 4) of `w`."""

    def action(rank: Thread) -> Path:
        mine = {piece_name("w", 4 * rank.rank): torch.arange(4.0) + 4 * rank.rank + step}
        return Checkpoints(path, ranks=rank).save(step, {"policy": mine}, {"from": rank.rank}, META)

    return action


def test_ranks_save_one_checkpoint_and_any_number_reads_it(tmp_path: Path) -> None:
    assert together(save_share(tmp_path, 5)) == [tmp_path / "checkpoints" / "step_5"] * 3
    for found in [
        Checkpoints(tmp_path).latest(),
        *together(lambda rank: Checkpoints(tmp_path, ranks=rank).latest(), 2),
    ]:
        assert torch.equal(found.tensors("policy").whole("w"), torch.arange(12.0) + 5)
        assert (found.state, found.meta) == ({"from": 0}, META)
    assert len(list((tmp_path / "checkpoints" / "step_5").glob("policy-0000?-of-00003.safetensors"))) == 3


@pytest.mark.parametrize("file", ["policy-00001-of-00003", "policy-00002-of-00003", "policy-00003-of-00003"])
def test_ranks_agree_that_a_checkpoint_is_damaged(tmp_path: Path, file: str) -> None:
    """Each of them reads a part of the files; the one that finds the damage tells the others."""
    together(save_share(tmp_path, 1))
    together(save_share(tmp_path, 2))
    flip(tmp_path / "checkpoints" / "step_2" / f"{file}.safetensors", -1)
    found = together(lambda rank: Checkpoints(tmp_path, ranks=rank, say=lambda _: None).latest())
    assert [checkpoint.step for checkpoint in found] == [1, 1, 1]


@pytest.mark.parametrize("failing", [0, 2])
def test_what_one_rank_cannot_write_all_of_them_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    together(save_share(tmp_path, 1))
    write = checkpoint.write_tensors

    def full(path: Path, tensors: Any) -> None:
        if f"-{failing + 1:05d}-of-" in path.name:
            raise OSError(28, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    outcomes = together(save_share(tmp_path, 2))
    assert all(isinstance(outcome, CheckpointError) for outcome in outcomes)
    assert len({outcome.message for outcome in outcomes}) == 1
    assert "No space left" in outcomes[1].message
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


def test_a_checkpoint_in_the_background_is_what_it_was_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is there only when every rank has written its part; training changes the weights meanwhile."""
    slow, write = threading.Event(), checkpoint.write_tensors

    def held_back(path: Path, tensors: Any) -> None:
        if "-00002-of-" in path.name:
            slow.wait(20)
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", held_back)

    def action(rank: Thread) -> list[bool]:
        store, weights = Checkpoints(tmp_path, ranks=rank), torch.arange(4.0) + 4 * rank.rank
        store.save(7, {"policy": {piece_name("w", 4 * rank.rank): weights}}, {}, META, in_background=True)
        weights.zero_()
        seen = [store.commit_if_written(), bool(store.steps())]
        if rank.rank == 0:
            slow.set()
        return [*seen, store.commit_if_written(wait=True), store.steps() == [7]]

    assert together(action) == [[False, False, True, True]] * 3
    found = Checkpoints(tmp_path).latest()
    assert found is not None
    assert torch.equal(found.tensors("policy").whole("w"), torch.arange(12.0))


def test_a_failure_in_the_background_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = store_with(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *_: Path("/proc/none/x").write_text("x"))
    store.save(2, {"policy": {"w": torch.ones(2)}}, {}, META, in_background=True)
    with pytest.raises(CheckpointError, match=r"cannot write .*step_2"):
        store.commit_if_written(wait=True)
    assert [p.name for p in store.folder.iterdir()] == ["step_1"]


def test_ranks_count_the_space_that_all_of_them_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 51, 49))
    outcomes = together(save_share(tmp_path, 2))
    assert all("needs 50 bytes, the disk has 49" in outcome.message for outcome in outcomes)  # 3 x 4 floats, x 1.05


# --- kills and exports ------------------------------------------------------------------------------------------

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
        assert (latest.tensors("policy").whole("w") == latest.step).all()
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
