"""Sampling K completions per prompt into Parquet."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.errors import ConfigError
from rlhf.models.load import load_causal_lm
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.runs import RunOptions
from rlhf.stages import sample


def sampled(cfg: Any) -> list[Any]:
    return RolloutBuffer.from_parquet(sample.main(cfg, RunOptions()).outputs["rollouts"]).rollouts


def test_k_completions_of_every_prompt_with_their_own_logprobs(stage_config: Any, tiny: Any) -> None:
    cfg = stage_config("sample", sampling={"max_new_tokens": 10, "batch_size": 16, "temperature": 0.8})
    result = sample.main(cfg, RunOptions())
    rollouts = RolloutBuffer.from_parquet(result.outputs["rollouts"]).rollouts
    groups = [(prompt, len(list(rows))) for prompt, rows in groupby(rollouts, key=lambda r: r.prompt_id)]
    assert [count for _, count in groups] == [3] * 10
    assert len({prompt for prompt, _ in groups}) == 10
    lm = load_causal_lm(tiny.path, dtype=torch.float32).eval()
    for rollout in rollouts[::7]:
        with torch.no_grad():
            logp_TV = (lm(torch.tensor([rollout.tokens])).logits[0] / 0.8).log_softmax(-1)
        for t, action in enumerate(rollout.action_mask):
            if action:
                assert rollout.logprobs[t] == pytest.approx(float(logp_TV[t - 1, rollout.tokens[t]]), abs=1e-4)
    lengths = [len(r.response_tokens) for r in rollouts]
    assert result.summary == {
        "prompts": 10,
        "rollouts": 30,
        "length_mean": pytest.approx(sum(lengths) / 30),
        "eos_frac": pytest.approx(sum(r.response_tokens[-1] == tiny.eos for r in rollouts) / 30),
    }
    assert [p.name for p in Path(cfg.run_dir).rglob("*") if p.is_file()] == ["samples.parquet"]


def test_a_seed_gives_one_file(stage_config: Any, tmp_path: Path) -> None:
    one, two, other = (
        sampled(stage_config("sample", run_dir=str(tmp_path / name), seed=seed))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one == two
    assert [r.tokens for r in one] != [r.tokens for r in other]


def test_overlong_prompts_are_skipped_when_asked_to(stage_config: Any, jsonl: Any, caplog: Any) -> None:
    path = jsonl("long.jsonl", [{"prompt": "why"}, {"prompt": "why " * 30}])
    rollouts = sampled(stage_config("sample", prompts={"path": path}, max_prompt_tokens=20, overlong="skip"))
    assert {r.prompt for r in rollouts} == {"why"}
    assert "long.jsonl:2: 37 tokens" in caplog.text


def test_the_format_found_is_shown_with_two_prompts(
    stage_config: Any, jsonl: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    path = jsonl("p.jsonl", [{"prompt": "why"}, {"prompt": "how"}, {"prompt": "what"}])
    sampled(stage_config("sample", prompts={"path": path}))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    at = lines.index(f"{path}: format prompt")
    shown = "<|im_start|> user : {} <|im_end|> <|im_start|> assistant :"
    assert lines[at + 1 : at + 5] == ["8 tokens:", shown.format("why"), "8 tokens:", shown.format("how")]
    assert not any("what" in line for line in lines)


def test_held_out_prompts_go_to_a_file_of_their_own(stage_config: Any, jsonl: Any) -> None:
    path = jsonl("heldout.jsonl", [{"prompt": "why"}, {"prompt": "how is the sea"}])
    cfg = stage_config("sample", heldout_prompts={"path": path})
    result = sample.main(cfg, RunOptions())
    heldout = RolloutBuffer.from_parquet(result.outputs["heldout_rollouts"]).rollouts
    assert [r.prompt for r in heldout] == ["why"] * 3 + ["how is the sea"] * 3
    assert (result.summary["rollouts"], result.summary["heldout"]["rollouts"]) == (30, 6)
    assert sampled(stage_config("sample")) == RolloutBuffer.from_parquet(result.outputs["rollouts"]).rollouts


def test_completions_are_shared_out_among_models(stage_config: Any, tiny: Any, tmp_path: Path) -> None:
    """Each prompt's stand together, the first model's first, each with the log-probabilities of its own model."""
    lm = load_causal_lm(tiny.path, dtype=torch.float32)
    with torch.no_grad():
        lm.lm_head.weight.mul_(1.5)
    lm.save_pretrained(tmp_path / "other")
    tiny.tokenizer.save_pretrained(tmp_path / "other")
    other = str(tmp_path / "other")
    rollouts = sampled(stage_config("sample", completions_per_prompt=4, further_models=[other]))
    assert [r.policy for r in rollouts] == [tiny.path, tiny.path, other, other] * 10
    assert [len({r.prompt_id for r in rollouts[i : i + 4]}) for i in range(0, 40, 4)] == [1] * 10
    for rollout in rollouts[2::9]:
        model = load_causal_lm(rollout.policy, dtype=torch.float32)
        with torch.no_grad():
            logp_TV = model(torch.tensor([rollout.tokens])).logits[0].log_softmax(-1)
        t = rollout.action_mask.index(True)
        assert rollout.logprobs[t] == pytest.approx(float(logp_TV[t - 1, rollout.tokens[t]]), abs=1e-4)
    with pytest.raises(ConfigError, match="cannot be shared out evenly among 2 models"):
        stage_config("sample", completions_per_prompt=3, further_models=[other])
