"""The benchmarks' own arithmetic, table and picture; nothing here is timed."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "benchmarks"


def test_a_ratio_above_one_is_in_our_favour(load_benchmark: Any) -> None:
    row = load_benchmark("harness").row
    assert row("speed", "samples/s", 6.0, 2.0)["ratio"] == 3.0
    assert row("memory", "GB", 2.0, 6.0, lower_is_better=True)["ratio"] == 3.0


def test_rows_of_another_architecture_stand_in_a_table_of_their_own(load_benchmark: Any, tmp_path: Path) -> None:
    harness = load_benchmark("harness")
    rows = [
        harness.row("full", "samples/s", 6, 2),
        harness.row("lora", "samples/s", 8, 2, group="other"),
        {k: v for k, v in harness.row("earlier", "samples/s", 5, 2).items() if k != "group"},
    ]
    (tmp_path / "ppo.json").write_text(json.dumps({"benchmark": "ppo", "commit": "abc", "rows": rows}))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{harness.TABLE_BEGIN}\nold\n{harness.TABLE_END}\nafter\n")
    harness.write_table(readme, tmp_path)
    first, _, second = readme.read_text().partition("Other architecture")
    assert "before" in first
    assert "| ppo | full | samples/s | 6 | 2 | 3 | `abc` |" in first
    assert "earlier" in first
    assert "lora" not in first
    assert "| ppo | lora |" in second
    assert "after" in second
    assert "old" not in readme.read_text()


def test_the_published_table_is_that_of_the_result_files(load_benchmark: Any, tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text((FOLDER / "README.md").read_text())
    load_benchmark("harness").write_table(copy)
    assert copy.read_text() == (FOLDER / "README.md").read_text()


def test_only_sides_that_the_configuration_knows_exist(load_benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = load_benchmark("sides")
    table = {
        "full": sides.Side("", (), "same"),
        "lora": sides.Side("", ("tuning.kind=lora",), "other"),
        "fp32": sides.Side("", ("precision=fp32",), "other"),
        "wrong value": sides.Side("", ("precision=fp8",), "other"),
        "wrong key": sides.Side("", ("presicion=fp32",), "other"),
    }
    monkeypatch.setattr(sides, "SIDES", table)
    assert sides.existing(table) == ["full", "lora", "fp32"]


def reports(speed: float, **more: float) -> list[dict[str, float]]:
    return [{"samples_per_s": speed, "tokens_per_s": 10 * speed, "peak_rss_gb": 4.0, **more}]


def test_rows_of_ppo_and_memory(load_benchmark: Any) -> None:
    args = argparse.Namespace(sides=["separate", "lora"], prompts="equal", epochs=2)
    found = {"separate": reports(2), "lora": reports(3, peak_rss_gb=1.0), "peer": reports(1)}
    speed = load_benchmark("bench_ppo").rows(args, found)
    assert [(r["unit"], r["ours"], r["ratio"], r["group"]) for r in speed] == [
        ("samples/s", 2, 2, "same"),
        ("tokens/s", 20, 2, "same"),
        ("samples/s", 3, 3, "other"),
        ("tokens/s", 30, 3, "other"),
    ]
    memory = load_benchmark("bench_memory").rows(args, found)
    assert [(r["ours"], r["peer"], r["ratio"]) for r in memory] == [(4, 4, 1), (1, 4, 4)]


def test_memory_uses_reports_of_the_same_setting_and_commit_alone(
    load_benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, sides = load_benchmark("bench_memory"), load_benchmark("sides")
    monkeypatch.setattr(memory, "machine", lambda: {"commit": "abc"})
    args = argparse.Namespace(sides=["separate"], prompts="equal", epochs=4, updates=1)
    assert memory.reusable(args, tmp_path) is None
    setting = {**sides.setting(args), "updates": 3, "reports": {"separate": reports(2), "peer": reports(1)}}
    record = {"commit": "abc", "setting": setting}
    file = tmp_path / "ppo_equal_E4.json"
    file.write_text(json.dumps(record))
    assert memory.reusable(args, tmp_path) == setting["reports"]
    for changed in ({**record, "commit": "other"}, {**record, "setting": {**setting, "batch": 1}}):
        file.write_text(json.dumps(changed))
        assert memory.reusable(args, tmp_path) is None
    file.write_text(json.dumps({**record, "commit": "abc-dirty"}))
    monkeypatch.setattr(memory, "machine", lambda: {"commit": "abc-dirty"})
    assert memory.reusable(args, tmp_path) is None, "two dirty trees have one name"
    monkeypatch.setattr(memory, "machine", lambda: {"commit": "abc"})
    file.write_text(json.dumps(record))
    args.sides = ["separate", "lora"]
    assert memory.reusable(args, tmp_path) is None


def config_alone(name: str, folder: Path) -> tuple[str, str]:
    """As bench_plan's models, without weights: what the plan reads."""
    shape = importlib.import_module("bench_plan").LLAMAS[name]
    config = {"model_type": "llama", "tie_word_embeddings": True, **shape}
    for role in ("lm", "reward"):
        (folder / name / role).mkdir(parents=True, exist_ok=True)
        (folder / name / role / "config.json").write_text(json.dumps(config))
    (folder / name / "reward" / "model.safetensors").touch()
    return str(folder / name / "lm"), str(folder / name / "reward")


def test_the_plan_is_within_its_tolerance_of_the_recorded_peaks(
    load_benchmark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Today's formulas against the peaks that bench_plan measured."""
    bench = load_benchmark("bench_plan")
    monkeypatch.setattr(bench, "models", config_alone)
    record = json.loads((FOLDER / "results" / "plan_memory.json").read_text())
    peaks = {row["measure"].removeprefix("peak memory, "): row["peer"] for row in record["rows"]}
    assert set(peaks) == set(bench.SETTINGS)
    assert len(peaks) >= 6
    wrong = {
        name: (predicted, peak)
        for name, peak in peaks.items()
        if abs((predicted := bench.predict(bench.SETTINGS[name], tmp_path)) / peak - 1) > bench.TOLERANCE
    }
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "separate",
        "separate, fp32, 4 rows",
        "separate, 16 rows, checkpointing",
        "separate, 4 layers",
        "lora",
        "hydra",
        "DDP x 2, hydra",
        "ZeRO-2 x 2, hydra",
    ],
)
def test_the_plan_is_within_its_tolerance_of_a_run(load_benchmark: Any, tmp_path: Path, name: str) -> None:
    bench = load_benchmark("bench_plan")
    setting = bench.SETTINGS[name]
    assert bench.predict(setting, tmp_path) == pytest.approx(bench.measure(setting, tmp_path), rel=bench.TOLERANCE)


def test_the_published_plans_are_those_of_the_command(load_benchmark: Any, tmp_path: Path) -> None:
    bench = load_benchmark("bench_plan")
    copy = tmp_path / "README.md"
    copy.write_text((bench.ROOT / "launch" / "README.md").read_text())
    bench.write_tables(copy, tmp_path)
    assert copy.read_text() == (bench.ROOT / "launch" / "README.md").read_text()


def made_up_runs(out: Path) -> None:
    for mode, end in (("separate", 2.0), ("lora", 1.0), ("hydra", 1.5)):
        for seed in (1, 2, 3):
            folder = out / f"{mode}-{seed}"
            folder.mkdir(parents=True)
            values = [end * (1 - math.exp(-step / 5)) + 0.1 * seed for step in range(1, 21)]
            lines = [
                {"step": i + 1, "episode": 32 * (i + 1), "objective/scores": v, "objective/kl": 4.0}
                for i, v in enumerate(values)
            ]
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            config = {
                "sharing": mode,
                "tuning": {"kind": "full"},
                "optim": {"lr": 1e-4},
                "reward_model": str(out / "r/final"),
            }
            critic = dict.fromkeys(("critic_init", "critic_layers", "critic_lr"))
            rest = {**critic, "kl": {"coef": 0.1}, "batch_size": 32, "minibatches": 4, "epochs": 1, "seed": 1}
            (folder / "config.yaml").write_text(json.dumps({**config, **rest}))
            (folder / "environment.json").write_text(json.dumps({"git": "abc"}))
            (folder / "result.json").write_text("{}")
    (out / "hydra-4").mkdir()
    (out / "hydra-4" / "metrics.jsonl").write_text("")  # has only begun


def test_the_picture_has_a_line_per_seed_and_a_colour_per_mode(load_benchmark: Any, tmp_path: Path) -> None:
    curves = load_benchmark("reward_curves")
    made_up_runs(tmp_path)
    read = {mode: curves.read(mode, tmp_path) for mode in curves.SIDES}
    assert [len(seeds) for seeds in read.values()] == [3, 3, 3]
    assert read["separate"][0][0][0] == 32
    kl = {mode: curves.read(mode, tmp_path, curves.KL) for mode in read}
    root = ElementTree.fromstring(curves.draw(read, kl))
    paths = [element.get("class") for element in root.iter() if element.tag.endswith("path")]
    assert paths == ["line tone1"] * 3 + ["line tone2"] * 3 + ["line tone3"] * 3
    text = "".join(root.itertext())
    assert "separate: 2" in text
    assert "3 seeds" in text
    assert "KL 4.0" in text
    assert "episodes" in text


def test_the_record_of_the_curves_says_what_was_run(load_benchmark: Any, tmp_path: Path) -> None:
    made_up_runs(tmp_path)
    runs = load_benchmark("reward_curves").recorded(tmp_path)
    assert len(runs) == 9
    run = runs["hydra-2"]
    assert (run["commit"], run["setting"]["sharing"], run["setting"]["optim"]) == ("abc", "hydra", {"lr": 1e-4})
    assert run["reward_model"] == "r/final", "no path of the machine"
    assert str(tmp_path) not in json.dumps(runs)
    assert (len(run["reward"]), run["reward"][0], run["kl"][0]) == (20, round(1.5 * (1 - math.exp(-0.2)) + 0.2, 4), 4.0)


def test_a_legend_by_hand(load_benchmark: Any) -> None:
    ends = load_benchmark("reward_curves").ends
    flat = [[(step, value) for step in range(9)] for value in (1.0, 2.0, 6.0)]
    assert ends("lora", flat, flat[1:2]) == "lora: 3 (3 seeds, 1 to 6), KL 2.0"
    assert ends("lora", flat[:1], flat) == "lora: 1 (1 seed), KL 3.0"


def test_gold_at_equal_kl_is_read_off_in_order_of_kl(load_benchmark: Any) -> None:
    online = load_benchmark("online_rounds")
    curve = [(0.0, 0.0), (4.0, 2.0), (2.0, 1.0), (8.0, 4.0)]
    for kl, gold in ((-1.0, 0.0), (3.0, 1.5), (6.0, 3.0), (9.0, 4.0)):
        assert online.gold_at(curve, kl) == pytest.approx(gold)


def test_a_round_is_compared_where_it_ends_with_the_other_arm_at_that_kl(load_benchmark: Any) -> None:
    online = load_benchmark("online_rounds")
    theirs = {seed: {"curve": [(float(k), 0.5 * k) for k in range(13)]} for seed in (1, 2)}
    ours = {seed: {"curve": [(float(k), 0.5 * k + seed) for k in range(12)]} for seed in (1, 2)}
    rows = online.at_equal_kl(ours, theirs)
    assert [row["kl"] for row in rows] == [[2.0, 2.0], [6.0, 6.0], [10.0, 10.0]], "the middle of three last steps"
    assert all(row["differences"] == [1.0, 2.0] for row in rows)
    assert all(row["mean_low_high"][0] == 1.5 for row in rows)
