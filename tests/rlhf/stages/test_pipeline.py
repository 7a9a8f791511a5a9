"""The whole pipeline on a tiny model: once through real processes; then what runs again after which change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf import config
from rlhf.errors import ConfigError, StageError
from rlhf.runs import RunOptions
from rlhf.stages import pipeline

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}


@pytest.fixture(scope="module")
def file(pipeline_file: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline's YAML; its run folder, beside it, was filled by one real run through subprocesses."""
    root = tmp_path_factory.mktemp("pipeline")
    pipeline_file(root)
    command = [sys.executable, "-m", "rlhf", "pipeline", str(root / "p.yaml")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root / "p.yaml"


def run(file: Path, *overrides: str, resume: str = "auto") -> None:
    pipeline.main(config.load(file, "pipeline", overrides), RunOptions(resume=resume))


def states(file: Path, *overrides: str) -> list[str]:
    return [planned.stage for planned in pipeline.plan(config.load(file, "pipeline", overrides)) if not planned.done]


@pytest.fixture
def copy(file: Path, tmp_path: Path) -> Path:
    """The finished run, under the same paths, put back after the test."""
    shutil.copytree(file.parent / "run", tmp_path / "kept")
    yield file
    shutil.rmtree(file.parent / "run")
    shutil.copytree(tmp_path / "kept", file.parent / "run")


def test_every_stage_leaves_its_result_and_the_report_stands_on_top(file: Path) -> None:
    folder = file.parent / "run"
    for stage in ("sft", "sample", "label", "reward", "ppo", "evaluate"):
        record = json.loads((folder / stage / "result.json").read_text())
        assert record["stage"] == stage
        assert all(Path(path).exists() for path in record["outputs"].values() if path.startswith(str(folder)))
    assert "Tiny" in (folder / "report.html").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert {"base", "sft", "ppo"} <= summary["policy"].keys()
    assert json.loads((folder / "reward" / "final" / "reward_normalisation.json").read_text())["std"] > 0


def test_a_second_run_skips_every_stage(file: Path, stages_run: list[str], capsys: Any) -> None:
    run(file)
    assert stages_run == []
    assert capsys.readouterr().out.count("skipped") == 7


def test_a_change_of_ppo_runs_ppo_and_what_follows(copy: Path, stages_run: list[str]) -> None:
    before = (copy.parent / "run" / "ppo" / "final" / "model.safetensors").read_bytes()
    run(copy, "ppo.gamma=0.9")
    assert stages_run == ["ppo", "evaluate", "report"]
    folder = copy.parent / "run"
    assert (folder / "ppo.old-1" / "final" / "model.safetensors").read_bytes() == before, "moved aside, not lost"
    assert (folder / "ppo" / "final" / "model.safetensors").read_bytes() != before
    stages_run.clear()
    run(copy, "ppo.gamma=0.9")
    assert stages_run == []


def test_edited_rankings_run_reward_and_what_follows(copy: Path, stages_run: list[str]) -> None:
    rankings = copy.parent / "run" / "label" / "rankings.train.jsonl"
    rows = [json.loads(line) for line in rankings.read_text().splitlines()]
    rows[0]["ranks"] = rows[0]["ranks"][::-1]
    rankings.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert states(copy) == ["reward", "ppo", "evaluate", "report"]
    run(copy)
    assert stages_run == ["reward", "ppo", "evaluate", "report"]
    assert states(copy) == []


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("seed=3", "sft"),
        ("sample.completions_per_prompt=2", "sample"),
        ("label.heldout_fraction=0.3", "label"),
        ("evaluate.samples_per_prompt=1", "evaluate"),
        ("title=Other", "report"),
    ],
)
def test_a_change_reaches_its_stage_and_all_later_ones(file: Path, override: str, first: str) -> None:
    assert states(file, override) == list(pipeline.ORDER[pipeline.ORDER.index(first) :])


def test_edited_demonstrations_run_everything(copy: Path) -> None:
    rows = copy.parent / "rows.jsonl"
    text = rows.read_text()
    try:
        rows.write_text(text.replace("rain is water", "rain is blue"))
        assert states(copy) == list(pipeline.ORDER)
    finally:
        rows.write_text(text)


def test_rewritten_rollouts_run_label_and_what_follows(copy: Path) -> None:
    rollouts = copy.parent / "run" / "sample" / "rollouts" / "samples.parquet"
    rollouts.write_bytes(rollouts.read_bytes() + b" ")
    assert states(copy) == ["label", "reward", "ppo", "evaluate", "report"]


@pytest.fixture
def folder(tiny: Any, tmp_path: Path) -> Path:
    """A model folder of its own, without a manifest."""
    shutil.copytree(tiny.path, tmp_path / "own")
    return tmp_path / "own"


def keys(file: Path, *overrides: str) -> dict[str, str]:
    return {planned.stage: planned.key for planned in pipeline.plan(config.load(file, "pipeline", overrides))}


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return [stage for stage in pipeline.ORDER if before[stage] != after[stage]]


@pytest.mark.parametrize(
    ("key", "first"),
    [
        ("model", "sft"),
        ("reward.model", "reward"),
        ("ppo.reference", "ppo"),
        ("ppo.reward_model", "ppo"),
        ("evaluate.base", "evaluate"),
        ("evaluate.policies.base", "evaluate"),
    ],
)
def test_new_weights_in_a_model_folder_reach_its_stage_and_all_later_ones(
    file: Path, folder: Path, key: str, first: str
) -> None:
    # A block that names its policies names them all.
    others = [f"evaluate.policies.{name}=x" for name in ("sft", "ppo")] if "policies" in key else []
    overrides = [f"{key}={folder}", *others]
    before = keys(file, *overrides)
    assert keys(file, *overrides) == before
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])
    assert changed(before, keys(file, *overrides)) == list(pipeline.ORDER[pipeline.ORDER.index(first) :])


def test_a_manifest_tells_new_weights_from_a_copy(file: Path, tiny: Any, tmp_path: Path) -> None:
    own = tmp_path / "reward"
    shutil.copytree(tiny.reward, own)
    before = keys(file, f"ppo.reward_model={own}")
    os.utime(own / "model.safetensors", ns=(0, 0))
    assert keys(file, f"ppo.reward_model={own}") == before
    (own / "MANIFEST.json").write_text("{}")
    assert changed(before, keys(file, f"ppo.reward_model={own}")) == ["ppo", "evaluate", "report"]


def test_a_key_does_not_depend_on_which_models_are_made_already(file: Path, tmp_path: Path) -> None:
    """Else every stage behind one that just ran would run again."""
    new = f"run_dir={tmp_path / 'new'}"
    before = keys(file, new)
    for stage in ("sft", "reward", "ppo"):
        shutil.copytree(file.parent / "run" / stage / "final", tmp_path / "new" / stage / "final")
    assert keys(file, new) == before


@pytest.mark.parametrize(
    "override",
    [
        "tracking.wandb=auto",
        "tracking.project=other",
        "sft.tracking={wandb: offline}",
        "ppo.save_every=4",
        "ppo.keep_checkpoints=5",
        "ppo.samples_per_step=1",
        "ppo.archive_rollouts=true",
    ],
)
def test_what_changes_nothing_that_is_learned_runs_nothing(file: Path, override: str) -> None:
    assert states(file, override) == []


def test_a_lost_output_is_made_again(copy: Path) -> None:
    """What reads it cannot go on, so its stage is not done."""
    shutil.rmtree(copy.parent / "run" / "sft" / "final")
    assert states(copy)[:1] == ["sft"]


def test_a_pipeline_killed_in_the_middle_goes_on_from_there(copy: Path, stages_run: list[str], metrics_of: Any) -> None:
    overrides = ["ppo.steps=40", "ppo.save_every=1"]
    command = [sys.executable, "-m", "rlhf", "pipeline", str(copy), *overrides]
    checkpoints = copy.parent / "run" / "ppo" / "checkpoints"
    with subprocess.Popen(
        command, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 300
        while not (checkpoints / "step_3").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)  # pipeline and stage at once, as by a power cut
    assert not (copy.parent / "run" / "ppo" / "final").exists()
    reached = max(int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*"))
    assert 3 <= reached < 40
    first_lines = metrics_of(copy.parent / "run" / "ppo")[:3]
    run(copy, *overrides)
    assert stages_run == ["ppo", "evaluate", "report"]
    lines = metrics_of(copy.parent / "run" / "ppo")
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert lines[:3] == first_lines, "steps before the checkpoint were not done again"
    assert states(copy, *overrides) == []


def test_a_failing_stage_stops_the_pipeline_with_its_code(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 7)
    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(run=lambda *_, **__: failed))
    with pytest.raises(StageError, match="stage ppo ended with exit code 7"):
        run(copy, "ppo.gamma=0.5")
    assert states(copy, "ppo.gamma=0.5") == ["ppo", "evaluate", "report"]


def test_a_bad_block_is_named_before_anything_runs(file: Path, stages_run: list[str]) -> None:
    with pytest.raises(ConfigError, match="block 'evaluate'"):
        run(file, "evaluate.candidate=nobody", "seed=9")
    assert stages_run == []


@pytest.mark.parametrize("key", ["reward_aggregate=min", "reward_std_coef=2"])
def test_an_aggregate_needs_an_ensemble_before_anything_runs(
    pipeline_file: Any, tmp_path: Path, stages_run: list[str], key: str
) -> None:
    file = pipeline_file(tmp_path)
    with pytest.raises(ConfigError, match=r"block 'ppo' of the pipeline: reward_.* is for an ensemble"):
        run(file, f"ppo.{key}")
    assert stages_run == []
    for other in ("reward.ensemble.members=2", "ppo.reward_model=elsewhere"):
        pipeline.check(config.load(file, "pipeline", [f"ppo.{key}", other]))


def test_labels_without_held_out_rankings_need_another_test_set(file: Path, stages_run: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"label\.heldout_fraction is 0") as caught:
        run(file, "label.heldout_fraction=0", "seed=9")
    assert "reward.eval_dataset" in caught.value.fix
    assert stages_run == []


@pytest.mark.parametrize(
    "own",
    ["reward.eval_dataset={path: rows.jsonl}", "reward.eval_dataset=null", "label.heldout_rollouts=h.parquet"],
    ids=["a-file", "a-share-of-the-training-set", "held-out-rollouts"],
)
def test_a_test_set_of_its_own_needs_no_share_of_the_labels(file: Path, own: str) -> None:
    cfg = config.load(file, "pipeline", ["label.heldout_fraction=0", own])
    assert pipeline.check(cfg)["label"].heldout_fraction == 0


def test_resume_never_runs_everything(copy: Path, stages_run: list[str]) -> None:
    run(copy, resume="never")
    assert stages_run == list(pipeline.ORDER)
    assert not list((copy.parent / "run").glob("*.old-*")), "the same configuration: nothing to move aside"
    assert states(copy) == []


def test_a_launcher_starts_the_stages_with_a_model(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[str]] = {}

    def record(command: list[str], **_: Any) -> Any:
        stage = command[command.index("rlhf") + 1]
        seen[stage] = command[: command.index("-m")]
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(run=record))
    run(copy, "launcher=accelerate launch --config_file 'my file.yaml'", resume="never")
    launched = [pipeline.find_program("accelerate"), "launch", "--config_file", "my file.yaml"]
    assert {stage for stage, head in seen.items() if head == launched} == {
        "sft",
        "sample",
        "reward",
        "ppo",
        "evaluate",
    }
    assert seen["label"] == seen["report"] == [sys.executable]


def test_all_blocks_errors_come_at_once(file: Path, stages_run: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        run(file, "ppo.stepz=3", "sft.epochz=2", "evaluate.run_dir=elsewhere")
    for expected in ("block 'ppo'", "stepz", "block 'sft'", "epochz", "block 'evaluate' of the pipeline: run_dir"):
        assert expected in caught.value.message
    assert stages_run == []


def test_held_out_prompts_are_sampled_labeled_and_tested_on(file: Path) -> None:
    cfg = config.load(
        file, "pipeline", ["sample.heldout_prompts.path=shipped:data/plain_language/prompts.heldout.jsonl"]
    )
    checked = pipeline.check(cfg)
    assert checked["label"].heldout_rollouts == str(Path(cfg.run_dir) / "sample" / "rollouts" / "heldout.parquet")
    assert pipeline.check(config.load(file, "pipeline", []))["label"].heldout_rollouts is None
