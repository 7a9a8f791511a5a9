"""The profile of a PPO run: its numbers by hand, its files, and that it changes nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from rlhf.functional.flops import Shape
from rlhf.rollout import profile
from rlhf.rollout.profile import PROFILE, TRACE, StepProfile, StepRecord, layer_rate, phase_rows, table
from rlhf.rollout.work import StepWork
from rlhf.runs import RunOptions
from rlhf.stages import ppo

CPU = torch.device("cpu")


def record(step: int, generate: float, update: float, total: float) -> StepRecord:
    seconds = {"generate": generate, "update": update}
    flops = {"generate": 8.0, "update": 60.0}
    return StepRecord(step, seconds, total, rows=2, read_tokens=40, action_tokens=12, flops=flops)


def test_a_phase_by_hand() -> None:
    """8 FLOP in 2 s are 4 FLOP/s, a tenth of a bound of 20 on each of 2 processes."""
    rows = {r["phase"]: r for r in phase_rows([record(1, 2, 5, 8)], {"square": 20.0, "layer": 10.0}, processes=2)}
    assert list(rows) == ["generate", "update", "rest", "step"]
    assert [rows[name]["seconds"] for name in rows] == [2, 5, 1, 8]
    assert [rows[name]["tokens_per_s"] for name in rows] == [6, 2.4, 12, 1.5]
    assert [rows[name]["flops_per_s"] for name in rows] == [4, 12, None, 8.5]
    assert rows["generate"]["share_of_square"] == pytest.approx(0.1)
    assert rows["generate"]["share_of_layer"] == pytest.approx(0.2)
    assert rows["rest"]["share_of_square"] is None


def test_medians_leave_out_the_first_and_the_traced_step(tmp_path: Path, runtime: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(profile, "square_rate", lambda *_: 100.0)
    monkeypatch.setattr(profile, "layer_rate", lambda shape, tokens, *_: float(tokens))
    shape = Shape(layers=1, layer_weights=4, query_width=1, head_weights=1, matrices=((2, 2),))
    records = [record(0, 90, 1, 99), record(1, 80, 1, 99), record(2, 2, 1, 4), record(3, 4, 1, 6), record(4, 6, 1, 8)]
    report = StepProfile(tmp_path, runtime, 1, 3, None, shape, records).report()
    assert report["steps"] == [3, 4, 5]
    assert report["phases"][0]["seconds"] == 4
    assert report["gemm_flops_per_s"] == {"square": 100.0, "layer": 60.0, "layer_tokens": 60}, "3 rows of 20 tokens"
    assert json.loads((tmp_path / PROFILE).read_text()) == report
    short = StepProfile(tmp_path, runtime, 1, 3, None, None, records[:2]).report()
    assert short["steps"] == [2], "the traced one, when there is no other"
    assert short["gemm_flops_per_s"]["layer"] is None


def test_the_layers_rate_is_their_work_over_their_time(monkeypatch: Any) -> None:
    """[10, 3] @ [3, 2] twice at 1 s each and [10, 2] @ [2, 3] at 2 s: 3 x 120 FLOP in 4 s."""
    monkeypatch.setattr(profile, "product_seconds", lambda m, k, n, *_: {2: 1.0, 3: 2.0}[n])
    shape = Shape(layers=5, layer_weights=18, query_width=1, head_weights=1, matrices=((2, 3), (2, 3), (3, 2)))
    assert layer_rate(shape, 10, CPU, torch.float32) == pytest.approx(3 * 120 / 4)


def test_a_larger_product_takes_longer() -> None:
    small, large = (profile.product_seconds(n, n, n, CPU, torch.float32, repeats=3) for n in (16, 256))
    assert 0 < small < large


def test_the_profile_changes_nothing_and_leaves_its_files(stage_config: Any, metrics_of: Any, tmp_path: Path) -> None:
    lines = {}
    for profiled in (False, True):
        cfg = stage_config("ppo", run_dir=str(tmp_path / str(profiled)), steps=3)
        ppo.main(cfg, RunOptions(profile=profiled))
        lines[profiled] = metrics_of(cfg.run_dir)
    kept = [[{k: v for k, v in line.items() if k[:5] not in ("time/", "perf/")} for line in lines[p]] for p in lines]
    assert kept[0] == kept[1]
    assert not (tmp_path / "False" / PROFILE).exists()

    report = json.loads((tmp_path / "True" / PROFILE).read_text())
    assert (report["traced_step"], report["steps"]) == (2, [3])
    phases = {row["phase"]: row for row in report["phases"]}
    assert list(phases) == ["generate", "score", "update", "rest", "step"]
    last = lines[True][2]
    assert phases["update"]["seconds"] == pytest.approx(last["time/update"])
    assert phases["step"]["flops_per_s"] == pytest.approx(last["perf/flops"])
    assert phases["step"]["tokens_per_s"] == pytest.approx(last["perf/tokens_per_s"])
    with gzip.open(tmp_path / "True" / TRACE) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert all(name in names for name in ("generate", "score", "update", "aten::mm"))
    assert [path for path in (tmp_path / "True").iterdir() if path.name.startswith(".")] == []


def test_flops_of_a_step_are_those_of_its_rollouts(stage_config: Any, metrics_of: Any) -> None:
    from rlhf.rollout.buffer import RolloutBuffer

    cfg = stage_config("ppo", steps=1, epochs=3, archive_rollouts=True)
    ppo.main(cfg, RunOptions())
    rollouts = RolloutBuffer.from_parquet(Path(cfg.run_dir) / "rollouts" / "step_000001.parquet").rollouts
    rows = [(len(r.tokens) - len(r.response_tokens), len(r.response_tokens)) for r in rollouts]
    work = StepWork.of(cfg)
    assert work is not None
    line = metrics_of(cfg.run_dir)[0]
    assert line["perf/flops"] * line["time/step"] == pytest.approx(sum(work.flops(rows, epochs=3).values()))


def test_a_short_run_traces_its_only_step(stage_config: Any) -> None:
    cfg = stage_config("ppo", steps=1)
    ppo.main(cfg, RunOptions(profile=True))
    assert json.loads((Path(cfg.run_dir) / PROFILE).read_text())["traced_step"] == 1
    assert (Path(cfg.run_dir) / TRACE).is_file()


def test_the_table_shows_what_was_measured(tmp_path: Path) -> None:
    report = {
        "device": "cpu",
        "precision": "bf16",
        "gemm_flops_per_s": {"square": 4e11, "layer": 3e11, "layer_tokens": 512},
        "peak_memory_gb": {"resident": 3.14, "device": None},
        "phases": phase_rows([record(1, 2, 5, 8)], {"square": 80.0, "layer": 40.0}),
    }
    console = Console(width=120, record=True, file=(tmp_path / "shown").open("w"))
    console.print(table(report))
    shown = console.export_text()
    assert all(
        part in shown for part in ("generate", "400 GFLOP/s square", "512 tokens", "3.1 GB", "5%", "10%", "rest")
    )
