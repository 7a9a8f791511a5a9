"""Batches that teach nothing: empty answers, answers without an end, one answer alone, equal rewards. Never NaN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.runs import RunOptions
from rlhf.stages import ppo


@pytest.fixture
def model(tmp_path: Path, tiny: Any, tiny_lm: Callable[..., Any]) -> Callable[[float], str]:
    """`model(weight)`: the tiny model with that weight on EOS in every state, in units in which 2 gives 0.12."""

    def build(weight: float) -> str:
        lm = tiny_lm(len(tiny.tokenizer))
        with torch.no_grad():
            lm.lm_head.weight[tiny.eos, 0] = weight
        lm.save_pretrained(tmp_path / "model")
        tiny.tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return build


@pytest.mark.parametrize(
    ("eos_weight", "changes", "expected"),
    [
        (2.0, {}, {}),
        (2.0, {"batch_size": 1, "micro_batch_size": 1, "minibatches": 1}, {}),
        (100.0, {}, {"response/eos_frac": 1.0, "response/length_mean": 1.0}),
        (-100.0, {}, {"response/eos_frac": 0.0, "response/length_mean": 10.0}),
    ],
    ids=["equal rewards", "one answer", "empty answers", "no end"],
)
def test_nothing_to_learn_is_no_nan(
    stage_config: Callable[..., Any],
    metrics_of: Any,
    model: Callable[[float], str],
    monkeypatch: pytest.MonkeyPatch,
    eos_weight: float,
    changes: dict[str, Any],
    expected: dict[str, float],
) -> None:
    """Every score is 0: only the KL penalty is left, which is 0 in the first step."""
    monkeypatch.setitem(ppo.SCORERS, "readability", lambda rollouts: [0.0] * len(rollouts))
    scorer = {"reward_model": None, "scorer": "readability", "critic_init": "policy", "missing_eos": {"kind": "none"}}
    cfg = stage_config("ppo", **{"model": model(eos_weight), **scorer, **changes})
    ppo.main(cfg, RunOptions())
    lines = metrics_of(cfg.run_dir)
    assert len(lines) == 2
    for line in lines:
        assert {key for key, value in line.items() if value is None} <= {"val/explained_var"}
        assert line["train/skipped_updates"] == 0
        assert line["objective/scores"] == 0.0
        assert line.items() >= expected.items()
    assert lines[0]["loss/policy_avg"] == pytest.approx(0.0, abs=1e-12)
    for tensor in load_file(Path(cfg.run_dir) / "final" / "model.safetensors").values():
        assert bool(tensor.isfinite().all())
