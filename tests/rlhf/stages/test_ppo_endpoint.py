"""PPO with a served reward: rollouts that got no score have no part in anything, and too many of them end the run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_server import serving
from safetensors.torch import load_file
from scripted_server import ScriptedServer

from rlhf.config import dump
from rlhf.errors import RewardError
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.rollout.statistics import rollout_metrics
from rlhf.runs import RunOptions
from rlhf.stages import ppo
from rlhf.types import Rollout, StopReason

LINEAR = {"lr": 0.1, "eps": 1.0, "max_grad_norm": 1e9}
"""With a large eps and no clipping an update is proportional to the gradient, so that its size counts, too."""


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with serving(ScriptedServer()) as scripted:
        scripted.score = score
        yield scripted


@pytest.fixture
def served(stage_config: Callable[..., Any], server: ScriptedServer, tmp_path: Path) -> Callable[..., Any]:
    """`served("name", steps=1, ...)`: a configuration whose rewards come from `server`, one rollout per request."""

    def build(name: str = "ppo", *, endpoint: dict[str, Any] | None = None, **changes: Any) -> Any:
        limits = {"attempts": 1, "batch_size": 1, "max_invalid": 0.9, "timeout_s": 5.0, "allow_private": True}
        settings = {
            "run_dir": str(tmp_path / name),
            "reward_model": None,
            "reward_endpoint": {"url": server.url, **limits, **(endpoint or {})},
            "critic_init": "policy",
            "archive_rollouts": True,
            "kl": {"kind": "fixed"},
        }
        return stage_config("ppo", **{**settings, **changes})

    return build


@pytest.fixture
def run(served: Callable[..., Any], metrics_of: Any) -> Callable[..., Any]:
    """`run("name", steps=1, ...)` -> (folder, lines of metrics.jsonl)."""

    def go(*args: Any, **changes: Any) -> tuple[Path, list[dict[str, Any]]]:
        cfg = served(*args, **changes)
        ppo.main(cfg, RunOptions())
        return Path(cfg.run_dir), metrics_of(cfg.run_dir)

    return go


def score(row: dict[str, Any]) -> float:
    return len(row["response"]) % 7 / 7


def fails(rollout: Any) -> bool:
    """A third of the responses."""
    return sum(map(ord, rollout["response"] if isinstance(rollout, dict) else rollout.response)) % 3 == 0


def some(rows: list[dict[str, Any]]) -> int | None:
    """A fault for the requests with such a response."""
    return 500 if any(map(fails, rows)) else None


def weights(folder: Path) -> dict[str, torch.Tensor]:
    parts = {name: load_file(folder / name / "model.safetensors") for name in ("final", "critic")}
    return {f"{name}/{key}": tensor for name, part in parts.items() for key, tensor in part.items()}


def distance(a: Path, b: Path) -> float:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def untimed(lines: list[dict[str, Any]], *, but: str = "") -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "perf/")) and k != but} for line in lines]


def test_a_served_reward_is_that_reward(run: Any, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ppo.SCORERS, "readability", lambda rows: [score(vars(r)) for r in rows])
    served, lines = run("served")
    scored, others = run("scored", reward_endpoint=None, scorer="readability")
    assert untimed(lines) == untimed(others)
    assert distance(served, scored) == 0.0
    assert [line["objective/invalid_frac"] for line in lines] == [0.0, 0.0]
    assert sum(map(len, server.requests)) == 16


def test_what_has_no_score_is_counted_and_in_no_mean(run: Any, server: ScriptedServer) -> None:
    server.always = some
    folder, lines = run()
    for line in lines:
        archived = RolloutBuffer.from_parquet(folder / "rollouts" / f"step_{line['step']:06d}.parquet").rollouts
        assert [r.score is None for r in archived] == list(map(fails, archived))
        valid = [r for r in archived if r.score is not None]
        assert 0 < len(valid) < len(archived) == 8
        scores = [score(vars(r)) for r in valid]
        assert [r.score for r in valid] == scores
        mean = sum(scores) / len(scores)
        assert line["objective/invalid_frac"] == 1 - len(valid) / 8
        assert line["objective/scores"] == pytest.approx(mean)
        assert line["objective/scores_std"] == pytest.approx(
            math.sqrt(sum((x - mean) ** 2 for x in scores) / len(scores)), rel=1e-4
        )
        assert line["response/length_mean"] == sum(len(r.response_tokens) for r in valid) / len(valid)
        assert line["response/eos_frac"] == sum(r.stop is StopReason.EOS for r in valid) / len(valid)
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in line.values()), line
    samples = [json.loads(text) for text in (folder / "samples.jsonl").read_text().splitlines()]
    assert all((row["score"] is None) == (row["kl"] is None) == fails(row) for row in samples)


OPTIONS: dict[str, dict[str, Any]] = {
    "token by token": {"micro_batch_size": 1, "minibatches": 8},  # whole minibatches without an action among them
    "rewards": {"whiten_rewards": True, "bootstrap_truncated": True, "score_clip": 0.6, "sampling.max_new_tokens": 4},
    "losses": {"kl": {"kind": "fixed", "place": "loss", "estimator": "k2"}, "entropy_coef": 0.1, "dual_clip": 2.0},
    "lora": {"tuning": {"kind": "lora", "rank": 4}, "sharing": "lora"},
    "hydra": {"tuning": {"layers": 1}, "sharing": "hydra"},
}


def with_options(name: str) -> dict[str, Any]:
    changes = dict(OPTIONS[name])
    budget = changes.pop("sampling.max_new_tokens", 10)
    return {**changes, "sampling": {"max_new_tokens": budget, "batch_size": 16}}


@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_of_a_rollout_without_a_score_matters(
    run: Any, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    """With other tokens, log-probabilities, scores and stop reasons in these rows: the same parameters, bit by bit."""
    server.always = some
    plain, lines = run("plain", **with_options(options))
    make_batch, changed = ppo.make_batch, []

    def scrambled(rollouts: list[Rollout], *args: Any) -> Any:
        batch = make_batch(rollouts, *args)
        for i in [i for i, r in enumerate(rollouts) if r.score is None]:
            # Below its own layers a trunk is shared with the sampler, which has seen the tokens.
            tokens = batch.tokens_BT[i] if options == "hydra" else (7 * batch.tokens_BT[i] + 3) % 50
            batch.tokens_BT[i] = torch.where(batch.attention_mask_BT[i], tokens, 0)
            batch.sampler_logprobs_BT[i] = -5.0
            batch.scores_B[i] = 1e30
            batch.truncated_B[i] = ~batch.truncated_B[i]
            changed.append(i)
        return batch

    monkeypatch.setattr(ppo, "make_batch", scrambled)
    other, others = run("other", **with_options(options))
    assert changed
    assert untimed(lines) == untimed(others)
    assert distance(plain, other) == 0.0


@pytest.mark.parametrize("options", ["rewards", "losses"])
def test_it_is_the_run_without_these_rollouts(
    run: Any, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    """Every denominator and moment counts the others alone."""
    server.always = some
    masked, lines = run("masked", **with_options(options), optim=LINEAR, micro_batch_size=2, steps=1)
    score_rollouts = ppo.score_rollouts

    def left_out(rollouts: list[Rollout], *args: Any) -> Any:
        rollouts[:] = [r for r in rollouts if not fails(r)]
        return score_rollouts(rollouts, *args)

    monkeypatch.setattr(ppo, "score_rollouts", left_out)
    without, others = run("without", **with_options(options), optim=LINEAR, micro_batch_size=2, steps=1)
    assert {line["objective/invalid_frac"] for line in others} == {0.0}
    assert min(line["objective/invalid_frac"] for line in lines) > 0
    for mine, theirs in zip(*(untimed(x, but="objective/invalid_frac") for x in (lines, others)), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert distance(masked, without) < 2e-6


def test_a_batch_without_any_score_has_no_nan(runtime: Any, stage_config: Any) -> None:
    """One rank's, when the others have some."""
    rows = [Rollout("p", "r", [1, 2, 3], [False, True, True], [0.0, -1.0, -2.0], StopReason.LENGTH) for _ in range(2)]
    cfg = stage_config("ppo", whiten_rewards=True, kl={"kind": "fixed"})
    batch = ppo.make_batch(rows, cfg, runtime)
    assert not batch.action_mask_BT.any()
    for name in ("logprobs_BT", "ref_logprobs_BT", "values_BT", "entropy_BT"):
        setattr(batch, name, torch.zeros(2, 3))
    ppo.shape_rewards(batch, cfg, runtime, kl_coef=0.1)
    ppo.estimate_advantages(batch, cfg, runtime, bootstrap_B=torch.ones(2))
    assert batch.rewards_BT.tolist() == batch.advantages_BT.tolist() == batch.returns_BT.tolist() == [[0.0] * 3] * 2
    metrics = rollout_metrics(batch, rows, runtime, kl_coef=0.1)
    assert math.isnan(metrics.pop("val/explained_var")), "there is nothing to explain"
    assert metrics.pop("objective/invalid_frac") == 1.0
    assert set(metrics.values()) <= {0.0, 0.1}


# --- the end of a run -----------------------------------------------------------------------------------------


def test_too_many_without_a_score_end_the_run_and_it_goes_on_from_there(run: Any, server: ScriptedServer) -> None:
    settings = {"steps": 4, "save_every": 1, "endpoint": {"max_invalid": 0.2, "parallel": 1}}
    whole, lines = run("whole", **settings)
    # The third step's first rollout is answered, then the server is gone.
    server.requests.clear()
    server.always = lambda rows: "close" if len(server.requests) > 17 else None
    with pytest.raises(RewardError, match=r"no score for 87\.5% of .*7 of 8, allowed: 20\.0%.*without response"):
        run("cut", **settings)
    cut = whole.with_name("cut")
    assert len((cut / "metrics.jsonl").read_text().splitlines()) == 2
    assert not (cut / "final").exists()
    server.always = None
    again, resumed = run("cut", **settings)
    assert untimed(resumed) == untimed(lines)
    assert distance(again, whole) == 0.0


ENVIRONMENT = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}


def on_two_ranks(cfg: Any, file: Path) -> subprocess.CompletedProcess[str]:
    file.write_text(dump(cfg))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rlhf"]
    command = [*launch, "ppo", str(file)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_a_rank_without_any_score_takes_part(
    run: Any, served: Any, server: ScriptedServer, metrics_of: Any, tmp_path: Path
) -> None:
    """Half of the rollouts, those that a run of half the size did not have, get none: the same parameters as there."""
    settings = {"steps": 1, "batch_size": 4, "optim": LINEAR}
    half, _ = run("half", **settings)
    known = [(row["prompt_id"], row["response"]) for rows in server.requests for row in rows]
    server.always = lambda rows: None if (rows[0]["prompt_id"], rows[0]["response"]) in known else 500
    both = served("both", **settings)
    done = on_two_ranks(both, tmp_path / "both.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert metrics_of(both.run_dir)[0]["objective/invalid_frac"] == 0.5
    assert distance(half, Path(both.run_dir)) < 2e-6


@pytest.mark.slow
def test_too_many_without_a_score_end_all_ranks(served: Any, server: ScriptedServer, tmp_path: Path) -> None:
    """4 of 16 are too many, whichever rank they fell to: no rank goes on, nor waits for another one."""
    server.script = [500] * 4
    done = on_two_ranks(served("stop", endpoint={"max_invalid": 0.2}), tmp_path / "stop.yaml")
    assert done.returncode != 0
    said = " ".join(done.stderr.replace("│", " ").split())  # the panel breaks lines
    assert "gave no score for 25.0% of the step's rollouts (4 of 16, allowed: 20.0%)" in said
    assert not (tmp_path / "stop" / "metrics.jsonl").exists()
