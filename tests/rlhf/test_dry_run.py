"""`--dry-run` refuses what the run would refuse, and takes for a hub data set what the run would take for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf import dry_run
from rlhf.data.records import read_prompts
from rlhf.errors import DataError


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
