"""The guards of a whole PPO stage on a tiny model: health.json, stopping, resuming, the gold score."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from rlhf.cli import app
from rlhf.config import dump
from rlhf.errors import GuardError, InvariantError
from rlhf.models.policy import Policy
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.rollout.scorers import readability
from rlhf.runs import RunOptions
from rlhf.stages import ppo


@pytest.fixture
def run(stage_config: Callable[..., Any], metrics_of: Any, tmp_path: Path) -> Callable[..., Any]:
    """`run("name", steps=1, ...)` -> (folder, lines of metrics.jsonl, health.json)."""

    def go(name: str = "ppo", **changes: Any) -> tuple[Path, list[dict[str, Any]], dict[str, Any]]:
        folder = tmp_path / name
        ppo.main(stage_config("ppo", run_dir=str(folder), **changes), RunOptions())
        return folder, metrics_of(folder), health_of(folder)

    return go


def health_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "health.json").read_text(encoding="utf-8"))


def test_a_run_leaves_its_health(run: Any, capsys: Any) -> None:
    """The tiny model ends about half of its answers: one alarm, said once."""
    folder, lines, health = run(steps=4)
    assert all(line["response/eos_frac"] < 0.9 for line in lines)
    assert (health["status"], health["step"]) == ("alarm", 4)
    alarms = [note for note in health["notes"] if not note["ok"]]
    assert [(note["name"], note["since"]) for note in alarms] == [("eos", 1)]
    judged = {"kl_high", "kl_negative", "entropy", "distinct", "duplicates", "eos", "length", "length_reward"}
    assert {note["name"] for note in health["notes"]} == judged | {"clip", "sampler"}
    assert capsys.readouterr().out.count("health: ") == 1
    assert not list(folder.glob(".health*")), "written whole"


def test_stop_leaves_a_checkpoint_and_the_run_goes_on_from_it(
    run: Any, stage_config: Any, tmp_path: Path, metrics_of: Any
) -> None:
    guards = {"on_alarm": "stop", "patience": 2}
    settings = {"steps": 4, "save_every": 3, "guards": guards}
    (tmp_path / "c.yaml").write_text(dump(stage_config("ppo", run_dir=str(tmp_path / "cut"), **settings)))
    result = CliRunner().invoke(app, ["ppo", str(tmp_path / "c.yaml")])
    assert result.exit_code == 2
    folder = tmp_path / "cut"
    assert [line["step"] for line in metrics_of(folder)] == [1, 2]
    assert (health_of(folder)["status"], health_of(folder)["step"]) == ("stopped", 2)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_2"]
    assert not (folder / "final").exists()
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 8

    _, lines, health = run("cut", **settings)
    whole, uncut, expected = run("whole", **{**settings, "guards": {"patience": 2}})
    assert [line["objective/scores"] for line in lines] == [line["objective/scores"] for line in uncut]
    assert health == expected
    assert same(folder / "final", whole / "final")


def same(a: Path, b: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    return all(first[name].equal(second[name]) for name in first)


def test_a_stop_in_the_last_step_can_be_resumed_too(run: Any) -> None:
    settings = {"steps": 2, "save_every": 5}
    with pytest.raises(GuardError, match="guard eos"):
        run(**settings, guards={"on_alarm": "stop", "patience": 2})
    folder, lines, _ = run(**settings)
    assert [line["step"] for line in lines] == [1, 2]
    assert (folder / "final" / "model.safetensors").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["objective/scores"] == lines[-1]["objective/scores"]


def test_the_gold_score_is_logged_and_trains_nothing(run: Any) -> None:
    plain, _, _ = run("plain", archive_rollouts=True)
    golden, lines, _ = run("golden", archive_rollouts=True, guards={"gold_scorer": "readability"})
    assert same(plain / "final", golden / "final")
    for line in lines:
        name = f"step_{line['step']:06d}.parquet"
        rollouts = RolloutBuffer.from_parquet(golden / "rollouts" / name).rollouts
        assert [r.gold_score for r in rollouts] == readability(rollouts)
        assert line["objective/gold"] == pytest.approx(sum(readability(rollouts)) / 8)
        assert RolloutBuffer.from_parquet(plain / "rollouts" / name).rollouts[0].gold_score is None


def test_an_assertion_stops_whatever_is_configured_and_stands_in_health_json(
    run: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    import torch

    forward = Policy.forward

    def noisy(*args: Any, **kwargs: Any) -> Any:
        logprobs, *rest = forward(*args, **kwargs)
        return (logprobs + 1e-2 * torch.randn_like(logprobs) * (logprobs != 0), *rest)

    monkeypatch.setattr(Policy, "forward", noisy)
    with pytest.raises(InvariantError):
        run(guards={"on_alarm": "warn"})
    health = health_of(tmp_path / "ppo")
    assert health["status"] == "stopped"
    assert "it must be 0" in health["notes"][0]["measured"]
