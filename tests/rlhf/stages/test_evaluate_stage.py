"""Policies side by side: distances, perplexity, win rate and the record that the report reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config_schema import ReportStage
from rlhf.errors import ModelError
from rlhf.eval.report import build_summary, render_report
from rlhf.models.load import load_causal_lm
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.runs import RunOptions
from rlhf.stages import evaluate


@pytest.fixture(scope="module")
def other(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sharper policy than the tiny model."""
    folder = tmp_path_factory.mktemp("other")
    lm = load_causal_lm(tiny.path, dtype=torch.float32)
    with torch.no_grad():
        lm.lm_head.weight.mul_(1.5)
    lm.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def record(stage_config: Any, tiny: Any, other: str) -> tuple[Path, dict[str, Any]]:
    policies = {"base": tiny.path, "sft": tiny.path, "ppo": other}
    cfg = stage_config(
        "evaluate",
        policies=policies,
        reference=tiny.path,
        base=tiny.path,
        reward_model=tiny.reward,
        samples_per_prompt=3,
    )
    result = evaluate.main(cfg, RunOptions())
    written = json.loads(Path(result.outputs["evaluation"]).read_text())
    assert written["policies"] == result.summary["policies"]
    return Path(cfg.run_dir), written


def test_the_numbers_are_those_of_the_saved_answers(record: Any, tiny: Any, other: str) -> None:
    folder, written = record
    lms = {path: load_causal_lm(path, dtype=torch.float32).eval() for path in (tiny.path, other)}

    def logprob(path: str, r: Any) -> float:
        with torch.no_grad():
            logp_TV = lms[path](torch.tensor([r.tokens])).logits[0].log_softmax(-1)
        return sum(float(logp_TV[t - 1, r.tokens[t]]) for t, action in enumerate(r.action_mask) if action)

    for name, path in (("sft", tiny.path), ("ppo", other)):
        rollouts = RolloutBuffer.from_parquet(folder / "rollouts" / f"{name}.parquet").rollouts
        row, n = written["policies"][name], len(rollouts)
        tokens = sum(len(r.response_tokens) for r in rollouts)
        assert (row["answers"], row["prompts"]) == (n, 10) == (30, 10)
        assert row["length_mean"] == pytest.approx(tokens / n)
        assert row["eos_frac"] == pytest.approx(sum(r.stop.value == "eos" for r in rollouts) / n)
        kl = sum(logprob(path, r) - logprob(tiny.path, r) for r in rollouts) / n
        assert row["kl"] == pytest.approx(kl, abs=1e-3)
        nll = -sum(logprob(tiny.path, r) for r in rollouts) / tokens
        assert row["perplexity"] == pytest.approx(float(torch.tensor(nll).exp()), rel=1e-3)
        assert row["reward_score"] == pytest.approx(sum(r.score for r in rollouts) / n, rel=1e-5)
        assert row["grade"] == pytest.approx(-sum(r.gold_score for r in rollouts) / n)
    assert written["policies"]["sft"]["kl"] == 0.0
    assert written["policies"]["ppo"]["kl"] > 0.1


def test_policies_draw_with_the_same_random_numbers(record: Any) -> None:
    folder, written = record
    base, sft = (RolloutBuffer.from_parquet(folder / "rollouts" / f"{n}.parquet").rollouts for n in ("base", "sft"))
    assert [r.tokens for r in base] == [r.tokens for r in sft]
    assert written["policies"]["base"] == written["policies"]["sft"]


def test_samples_stand_side_by_side(record: Any) -> None:
    _, written = record
    assert len(written["samples"]) == 10
    for entry in written["samples"]:
        assert entry["prompt"].startswith("explain")
        assert {name: len(answers) for name, answers in entry["answers"].items()} == {
            "base": 3,
            "sft": 3,
            "ppo": 3,
        }


def test_a_policy_against_itself_wins_half(stage_config: Any, tiny: Any) -> None:
    policies = {"a": tiny.path, "b": tiny.path}
    cfg = stage_config("evaluate", policies=policies, reference=tiny.path, base=tiny.path, candidate="a", baseline="b")
    won = evaluate.main(cfg, RunOptions()).summary["win_rate"]
    assert (won["candidate"], won["baseline"]) == ("a", "b")
    assert (won["value"], won["wins"], won["losses"]) == (0.5, 0, 0)


def test_the_report_reads_the_record(record: Any) -> None:
    cfg = ReportStage(run_dir=str(record[0].parent), evaluate_dir=str(record[0]))
    assert build_summary(cfg)["policy"]["ppo"]["answers"] == 30
    assert "<html" in render_report(cfg)


def test_perplexity_is_taken_at_temperature_1(stage_config: Any, tiny: Any) -> None:
    """Whatever the answers were sampled at."""
    policies = {"base": tiny.path, "sft": tiny.path, "ppo": tiny.path}
    sampling = {"max_new_tokens": 10, "batch_size": 16, "temperature": 0.5}
    cfg = stage_config("evaluate", policies=policies, reference=tiny.path, base=tiny.path, sampling=sampling)
    row = evaluate.main(cfg, RunOptions()).summary["policies"]["sft"]
    rollouts = RolloutBuffer.from_parquet(Path(cfg.run_dir) / "rollouts" / "sft.parquet").rollouts
    lm, nll, count = load_causal_lm(tiny.path, dtype=torch.float32), 0.0, 0
    for r in rollouts:
        with torch.no_grad():
            logp_TV = lm(torch.tensor([r.tokens])).logits[0].log_softmax(-1)
        actions = [t for t, action in enumerate(r.action_mask) if action]
        nll -= sum(float(logp_TV[t - 1, r.tokens[t]]) for t in actions)
        count += len(actions)
    assert row["perplexity"] == pytest.approx(float(torch.tensor(nll / count).exp()), rel=1e-3)


def test_policies_with_other_tokens_are_refused(stage_config: Any, tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny.path, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace('"rain"', '"hail"'))
    policies = {"base": str(tmp_path / "other"), "sft": tiny.path, "ppo": tiny.path}
    cfg = stage_config("evaluate", policies=policies, reference=tiny.path, base=tiny.path)
    with pytest.raises(ModelError, match=r"the base .* has another tokenizer"):
        evaluate.main(cfg, RunOptions())
