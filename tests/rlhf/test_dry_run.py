"""`--dry-run` refuses what the run would refuse, and takes for a hub data set what the run would take for one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf import config, dry_run
from rlhf.data.records import read_prompts
from rlhf.errors import ConfigError, DataError, ModelError, RlhfError
from rlhf.rollout.buffer import RolloutBuffer


@pytest.mark.parametrize(
    "path", ["nosuch.csv", "nosuch.jsonl", "data/nosuch.JSON", "./nosuch", "~/nosuch", "a/b/nosuch", "shipped:nosuch"]
)
def test_a_missing_file_is_the_error_of_the_run(
    stage_config: Any, path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = stage_config("sample", prompts={"path": path})
    with pytest.raises(DataError, match="no file") as of_the_run:
        read_prompts(cfg.prompts)
    with pytest.raises(DataError) as of_the_dry_run:
        dry_run.describe("sample", cfg)
    assert str(of_the_dry_run.value) == str(of_the_run.value)


@pytest.mark.parametrize("path", ["owner/name", "name"])
def test_a_hub_data_set_is_named_and_not_read(stage_config: Any, path: str, capsys: pytest.CaptureFixture) -> None:
    dry_run.describe("sample", stage_config("sample", prompts={"path": path, "split": "test"}))
    assert f"prompts: hub data set {path}, split test (not read" in capsys.readouterr().out


def test_a_file_is_counted_with_the_format_found(stage_config: Any, jsonl: Any, capsys: pytest.CaptureFixture) -> None:
    path = jsonl("chats.jsonl", [{"messages": [{"role": "user", "content": "why"}]}] * 3)
    dry_run.describe("sample", stage_config("sample", prompts={"path": path}))
    shown = capsys.readouterr().out.replace("\n", "")
    assert f"prompts: {path}, format messages, 3 rows" in shown


def test_a_judge_is_named_and_not_asked(
    jsonl: Any, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    rollouts = tmp_path / "samples.parquet"
    RolloutBuffer([]).to_parquet(rollouts)
    endpoint = {"url": "http://192.0.2.1/v1", "key_env": "JUDGE_DRY_KEY"}
    for judge in ({"model": "m", "endpoint": endpoint}, {"model": tiny.path}, {"model": str(tmp_path / "none")}):
        given = {"run_dir": str(tmp_path / "x"), "rollouts": str(rollouts), "labeler": "ai", "judge": judge}
        cfg = config.validate(given, "label", source="test")
        if judge["model"].endswith("none"):
            with pytest.raises(ModelError):
                dry_run.describe("label", cfg)
        else:
            dry_run.describe("label", cfg)
    shown = capsys.readouterr().out
    assert "judge.model: m at http://192.0.2.1/v1 (key in JUDGE_DRY_KEY: NOT SET; not asked" in shown
    assert f"judge.model: {tiny.path} (found)" in shown.replace("\n", "")


def of_the_run(stage: str, cfg: Any) -> str:
    """The error of the run itself."""
    from rlhf.runs import RunOptions
    from rlhf.stages import label, ppo, sample, sft

    with pytest.raises(RlhfError) as caught:
        {"label": label, "ppo": ppo, "sample": sample, "sft": sft}[stage].main(cfg, RunOptions())
    return str(caught.value)


def of_the_dry_run(stage: str, cfg: Any) -> RlhfError:
    with pytest.raises(RlhfError) as caught:
        dry_run.describe(stage, cfg)
    return caught.value


def files_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("stage", ["sample", "ppo"])
def test_a_prompt_that_is_too_long_for_a_local_model_is_the_error_of_the_run(stage_config: Any, stage: str) -> None:
    cfg = stage_config(stage, max_prompt_tokens=7)
    error = of_the_dry_run(stage, cfg)
    assert "longer than max_prompt_tokens 7" in error.message
    assert str(error) == of_the_run(stage, cfg)


def test_the_lengths_of_an_evaluation_are_those_of_its_candidate(stage_config: Any, tiny: Any) -> None:
    names = {"policies": {"sft": "owner/name", "ppo": tiny.path}, "reference": tiny.path, "base": tiny.path}
    cfg = stage_config("evaluate", **names, max_prompt_tokens=7)
    assert "longer than max_prompt_tokens 7" in of_the_dry_run("evaluate", cfg).message


def test_prompts_for_a_model_of_the_hub_are_not_measured(stage_config: Any, capsys: pytest.CaptureFixture) -> None:
    dry_run.describe("sample", stage_config("sample", model="owner/name", max_prompt_tokens=1))
    shown = capsys.readouterr().out
    assert "10 rows, their lengths not checked" in " ".join(shown.split())


def test_a_language_model_is_no_reward_model(stage_config: Any, tiny: Any) -> None:
    cfg = stage_config("ppo", reward_model=tiny.path)
    error = of_the_dry_run("ppo", cfg)
    assert isinstance(error, ModelError)
    assert str(error) == of_the_run("ppo", cfg)
    dry_run.describe("ppo", stage_config("ppo"))


def test_what_is_no_parquet_file_of_ours_is_the_error_of_the_run(
    stage_config: Any, prompts_file: str, tmp_path: Path
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"prompt": ["why"]}), foreign)
    for path in (prompts_file, str(foreign)):
        for key in ("rollouts", "heldout_rollouts"):
            good = {} if key == "rollouts" else {"rollouts": sampled(stage_config)}
            cfg = stage_config("label", annotators=[{"name": "ann"}], **{**good, key: path})
            assert str(of_the_dry_run("label", cfg)) == of_the_run("label", cfg)


def sampled(stage_config: Any) -> str:
    from rlhf.runs import RunOptions
    from rlhf.stages import sample

    return sample.main(stage_config("sample"), RunOptions()).outputs["rollouts"]


def test_rollouts_of_ours_are_counted(stage_config: Any, capsys: pytest.CaptureFixture) -> None:
    cfg = stage_config("label", annotators=[{"name": "ann"}], rollouts=sampled(stage_config))
    dry_run.describe("label", cfg)
    assert "30 rollouts" in " ".join(capsys.readouterr().out.split())


def test_a_key_of_the_trainer_that_trl_does_not_know_is_the_error_of_the_run(
    stage_config: Any, demonstrations_file: str
) -> None:
    cfg = stage_config("sft", dataset={"path": demonstrations_file}, trainer={"foo": 1})
    error = of_the_dry_run("sft", cfg)
    assert "trainer.foo" in error.message
    assert str(error) == of_the_run("sft", cfg)


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_run_dir_that_cannot_be_made_is_named(stage_config: Any, prompts_file: str, below: str) -> None:
    """A file stands in the way; root, who runs some of our tests, may write everywhere else."""
    error = of_the_dry_run("sample", stage_config("sample", run_dir=prompts_file + below))
    assert isinstance(error, ConfigError)
    assert f"run_dir {prompts_file}{below}" in error.message


def test_a_run_dir_that_cannot_be_written_is_named(
    stage_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dry_run.os, "access", lambda path, mode: Path(path) != tmp_path)
    error = of_the_dry_run("sample", stage_config("sample", run_dir=str(tmp_path / "a" / "b")))
    assert f"{tmp_path} cannot be written" in error.message


def test_a_dry_run_writes_nothing(stage_config: Any, tmp_path: Path) -> None:
    cfg, before = stage_config("ppo"), files_in(tmp_path)
    dry_run.describe("ppo", cfg)
    assert files_in(tmp_path) == before


@pytest.fixture
def pipeline(tiny: Any, tmp_path: Path, prompts_file: str, demonstrations_file: str) -> Any:
    """`pipeline("ppo.epochs=1")`: a tiny pipeline of which nothing has run."""
    block = f"{{prompts: {{path: {prompts_file}}}}}"
    text = f"""
run_dir: {tmp_path}/run
model: {tiny.path}
sft: {{dataset: {{path: {demonstrations_file}}}}}
sample: {block}
label: {{annotators: [{{name: ann}}]}}
reward: {{}}
ppo: {block}
evaluate: {block}
"""
    (tmp_path / "pipe.yaml").write_text(text)
    return lambda *overrides: config.load(tmp_path / "pipe.yaml", "pipeline", overrides)


def test_a_pipeline_measures_prompts_with_its_first_model(pipeline: Any, capsys: pytest.CaptureFixture) -> None:
    dry_run.describe("pipeline", pipeline())
    assert "not checked" not in capsys.readouterr().out
    for stage in ("sample", "ppo", "evaluate"):
        error = of_the_dry_run("pipeline", pipeline(f"{stage}.max_prompt_tokens=1"))
        assert "longer than max_prompt_tokens 1" in error.message


def test_the_folder_of_an_evaluation_that_was_interrupted_is_no_error(pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "run" / "evaluate").mkdir(parents=True)
    dry_run.describe("pipeline", pipeline())


def test_a_launcher_that_is_not_installed_is_named(pipeline: Any) -> None:
    error = of_the_dry_run("pipeline", pipeline("launcher=nosuch launch --x"))
    assert isinstance(error, ConfigError)
    assert "launcher: there is no program 'nosuch'" in error.message
    dry_run.describe("pipeline", pipeline(f"launcher={sys.executable} -X dev"))


def test_a_launcher_of_an_environment_that_is_not_activated_is_found(
    pipeline: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    dry_run.describe("pipeline", pipeline(f"launcher={Path(sys.executable).name} -X dev"))
