"""PPO as a whole stage on a tiny model: what it leaves, what it asserts, how it resumes, what each option changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from rlhf.cli import app
from rlhf.config import dump
from rlhf.errors import CheckpointError, InvariantError
from rlhf.models import policy, value
from rlhf.models.load import load_causal_lm
from rlhf.models.policy import ActorCritic, Policy, hidden_states
from rlhf.rollout import ptx as ptx_texts
from rlhf.rollout.buffer import RolloutBuffer
from rlhf.runs import RunOptions
from rlhf.runtime import Runtime
from rlhf.stages import ppo

METRICS = {
    "objective/kl",
    "objective/scores",
    "objective/rlhf_reward",
    "objective/kl_coef",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/ratio",
    "val/explained_var",
    "response/length_mean",
    "response/eos_frac",
    "time/generate",
    "time/score",
    "time/update",
    "time/step",
    "perf/tokens_per_s",
    "perf/flops",
    "episode",
    "lr",
}


@pytest.fixture
def run(stage_config: Callable[..., Any], metrics_of: Any, tmp_path: Path) -> Callable[..., Any]:
    """`run("name", steps=1, ...)` -> (folder, lines of metrics.jsonl)."""

    def go(name: str = "ppo", *, resume: str = "auto", **changes: Any) -> tuple[Path, list[dict[str, Any]]]:
        cfg = stage_config("ppo", run_dir=str(tmp_path / name), **changes)
        ppo.main(cfg, RunOptions(resume=resume))
        return tmp_path / name, metrics_of(cfg.run_dir)

    return go


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def same(a: Path | str, b: Path | str) -> bool:
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def distance(a: Path, b: Path) -> float:
    first, second = weights(a), weights(b)
    return max(float((first[k] - second[k]).abs().max()) for k in first)


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in lines]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt in the middle of 0-based `step`, after its rollouts, as Ctrl-C would."""
    sample = ppo.sample_rollouts

    def interrupted(at: int, *args: Any, **kwargs: Any) -> Any:
        if at == step:
            raise KeyboardInterrupt
        return sample(at, *args, **kwargs)

    monkeypatch.setattr(ppo, "sample_rollouts", interrupted)


# --- what a run leaves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [{"kind": "full"}, {"kind": "lora", "rank": 4}], ids=["full", "lora"])
@pytest.mark.parametrize("reward", ["model", "scorer"])
def test_a_run_leaves_models_metrics_and_samples(run: Any, tiny: Any, tuning: Any, reward: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    scorer = {"reward_model": None, "scorer": "readability", "critic_init": "policy"}
    folder, lines = run(tuning=tuning, **(scorer if reward == "scorer" else {}))
    assert [line["step"] for line in lines] == [1, 2]
    assert [line["episode"] for line in lines] == [8, 16]
    for line in lines:
        assert line.keys() >= METRICS
        assert all(isinstance(value, int | float) for value in line.values()), line
    assert lines[0]["objective/kl"] == 0.0
    assert lines[1]["objective/kl"] != 0.0
    assert 0 < lines[0]["response/eos_frac"] < 1

    policy = AutoModelForCausalLM.from_pretrained(folder / "final")
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    tokenizer = AutoTokenizer.from_pretrained(folder / "final")
    assert policy(torch.tensor([[2, 5]])).logits.isfinite().all()
    assert critic.num_labels == 1
    assert tokenizer.chat_template == tiny.tokenizer.chat_template
    assert weights(folder / "final").keys() == weights(tiny.path).keys(), "adapters are folded in"
    assert not same(folder / "final", tiny.path)

    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    assert {"step", "prompt", "response", "score", "kl", "tokens", "stop"} <= samples[0].keys()
    assert not (folder / "checkpoints").exists() or not any((folder / "checkpoints").iterdir())


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_first_ratio_is_one_and_the_first_kl_zero(run: Any, temperature: float) -> None:
    sampling = {"max_new_tokens": 10, "batch_size": 16, "temperature": temperature}
    _, lines = run(epochs=1, steps=3, minibatches=1, sampling=sampling)
    assert lines[0]["objective/kl"] == 0.0
    assert lines[0]["objective/rlhf_reward"] == lines[0]["objective/scores_penalised"]
    for line in lines:  # one optimizer step per rollout batch: nothing has moved when the ratio is taken
        assert line["val/ratio"] == pytest.approx(1.0, abs=1e-6)
        assert line["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-12)
        assert line["policy/clipfrac_avg"] == 0.0
        assert line["val/sampler_gap"] < 1e-5


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 1), (2, 4)])
def test_optimizer_steps_are_epochs_times_minibatches(run: Any, epochs: int, minibatches: int) -> None:
    _, lines = run(steps=1, epochs=epochs, minibatches=minibatches)
    assert lines[0]["train/updates"] == epochs * minibatches


def test_metrics_agree_with_the_archived_rollouts(run: Any) -> None:
    folder, lines = run(archive_rollouts=True, missing_eos={"kind": "set", "value": -3.0}, kl={"kind": "fixed"})
    for line in lines:
        rollouts = RolloutBuffer.from_parquet(folder / "rollouts" / f"step_{line['step']:06d}.parquet").rollouts
        assert len(rollouts) == 8
        ended = [r.stop.value == "eos" for r in rollouts]
        scores = [float(r.score) for r in rollouts]
        penalised = [s if e else -3.0 for s, e in zip(scores, ended, strict=True)]
        assert line["response/eos_frac"] == sum(ended) / 8
        assert line["response/length_mean"] == sum(len(r.response_tokens) for r in rollouts) / 8
        assert line["objective/scores"] == pytest.approx(sum(scores) / 8, rel=1e-5)
        assert line["objective/scores_penalised"] == pytest.approx(sum(penalised) / 8, rel=1e-5)
        reward = line["objective/scores_penalised"] - 0.05 * line["objective/kl"]
        assert line["objective/rlhf_reward"] == pytest.approx(reward, rel=1e-5)


def test_the_adaptive_coefficient_follows_ziegler(run: Any) -> None:
    _, lines = run(steps=3, kl={"kind": "adaptive", "coef": 0.1, "target": 0.5, "horizon": 80})
    coef = 0.1
    for line in lines:
        assert line["objective/kl_coef"] == pytest.approx(coef, rel=1e-6)
        coef *= 1 + min(max(line["objective/kl"] / 0.5 - 1, -0.2), 0.2) * 8 / 80


def test_the_learning_rate_falls_linearly(run: Any) -> None:
    _, lines = run(steps=4, epochs=1)
    assert [line["lr"] for line in lines] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_ppo_raises_the_score(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sanity check of all signs at once: a rewarded word becomes more frequent, and less so under a KL penalty."""
    monkeypatch.setitem(ppo.SCORERS, "readability", lambda rows: [float(r.response_tokens.count(10)) for r in rows])
    settings = {
        **{
            "reward_model": None,
            "scorer": "readability",
            "critic_init": "policy",
            "missing_eos": {"kind": "none"},
        },
        **{
            "steps": 12,
            "batch_size": 32,
            "micro_batch_size": 32,
            "optim": {"lr": 1e-2, "schedule": "constant"},
        },
    }
    _, free = run("free", **settings, kl={"kind": "fixed", "coef": 0.0})
    _, held = run("held", **settings, kl={"kind": "fixed", "coef": 2.0})
    assert free[-1]["objective/scores"] > free[0]["objective/scores"] + 1.0
    assert abs(held[-1]["objective/kl"]) < free[-1]["objective/kl"] / 3
    assert held[-1]["objective/scores"] < free[-1]["objective/scores"] - 0.5


# --- the same run however it is cut ---------------------------------------------------------------------------


def test_micro_batches_do_not_change_the_parameters(run: Any) -> None:
    """With a large eps and no clipping an update is proportional to the gradient, so that its size counts, too."""
    optim = {"lr": 0.1, "eps": 1.0, "max_grad_norm": 1e9}
    folders = [run(f"m{size}", micro_batch_size=size, optim=optim)[0] for size in (8, 3, 1)]
    for name in ("final", "critic"):
        assert distance(folders[0] / name, folders[1] / name) < 1e-6
        assert distance(folders[0] / name, folders[2] / name) < 1e-6


@pytest.mark.parametrize("limit", [1, 40])
def test_a_limit_of_tokens_does_not_change_the_parameters(
    run: Any, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and values of truncated answers keep to it, too."""
    settings = {"optim": {"lr": 0.1, "eps": 1.0, "max_grad_norm": 1e9}, "bootstrap_truncated": True}
    whole, _ = run("whole", **settings)
    read: list[tuple[int, int]] = []
    real = hidden_states

    def noting(backbone: Any, tokens_BT: torch.Tensor, *args: Any, **keys: Any) -> torch.Tensor:
        read.append(tuple(tokens_BT.shape))
        return real(backbone, tokens_BT, *args, **keys)

    for module in (policy, value):
        monkeypatch.setattr(module, "hidden_states", noting)
    limited, _ = run("limited", **settings, micro_batch_tokens=limit)
    assert all(rows == 1 or rows * width <= 2 * limit for rows, width in read)  # scores take twice as many
    assert {rows for rows, _ in read} == {1} or limit == 40
    for name in ("final", "critic"):
        assert distance(whole / name, limited / name) < 1e-6


def test_a_seed_gives_one_run(run: Any) -> None:
    (a, lines_a), (b, lines_b), (c, _) = run("a"), run("b"), run("c", seed=1)
    assert untimed(lines_a) == untimed(lines_b)
    assert same(a / "final", b / "final")
    assert not same(a / "final", c / "final")


@pytest.mark.parametrize(
    "trained",
    [
        {"tuning": {"kind": "full"}},
        {"tuning": {"kind": "lora", "rank": 4}},
        {"tuning": {"kind": "full", "layers": 1}, "sharing": "hydra"},
    ],
    ids=["full", "lora", "hydra"],
)
def test_a_resumed_run_is_the_uninterrupted_one(run: Any, monkeypatch: pytest.MonkeyPatch, trained: Any) -> None:
    settings = {
        "steps": 5,
        "save_every": 2,
        **trained,
        "kl": {"coef": 0.05, "target": 0.2, "horizon": 80},
    }
    whole, lines = run("whole", **settings)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run("cut", **settings)
    cut = whole.with_name("cut")
    assert [p.name for p in (cut / "checkpoints").iterdir()] == ["step_2"]
    assert not (cut / "final").exists()
    again, resumed = run("cut", **settings)
    assert untimed(resumed) == untimed(lines)
    assert same(again / "final", whole / "final")
    assert same(again / "critic", whole / "critic")
    samples = [(f / "samples.jsonl").read_text() for f in (whole, again)]
    assert samples[0] == samples[1]


def test_resume_never_starts_anew(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(steps=4, save_every=1)
    _, lines = run(steps=4, save_every=1, resume="never")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_another_configuration_is_refused_on_resume(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(steps=3, save_every=1)
    with pytest.raises(CheckpointError, match="another configuration"):
        run(steps=3, save_every=1, gamma=0.9)
    _, lines = run(steps=3, save_every=2, samples_per_step=1)  # these change nothing that is learned
    assert len(lines) == 3


def test_a_refused_resume_leaves_the_configuration_that_made_the_checkpoints(
    stage_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fix says "restore the configuration": config.yaml must still hold it."""
    (tmp_path / "c.yaml").write_text(dump(stage_config("ppo", steps=3, save_every=1)))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert CliRunner().invoke(app, ["ppo", str(tmp_path / "c.yaml")]).exit_code == 130
    result = CliRunner().invoke(app, ["ppo", str(tmp_path / "c.yaml"), "gamma=0.9"])
    assert result.exit_code == 2
    assert yaml.safe_load((tmp_path / "ppo" / "config.yaml").read_text())["gamma"] == 1.0


def test_a_new_start_is_resumed_and_not_the_run_before_it(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After --resume never with another configuration, the older run's later checkpoints must not be found."""
    for changes in ({"gamma": 1.0, "at": 4}, {"gamma": 0.9, "at": 2, "resume": "never"}):
        with monkeypatch.context() as patch:
            stop_at(patch, changes.pop("at"))
            with pytest.raises(KeyboardInterrupt):
                run(steps=5, save_every=1, **changes)
    _, lines = run(steps=5, save_every=1, gamma=0.9)
    assert len(lines) == 5


# --- run-time assertions --------------------------------------------------------------------------------------


def noisy(forward: Any, when: Callable[[], bool]) -> Any:
    """`forward` with logprobs that differ by chance from call to call, as with dropout."""

    def noised(*args: Any, **kwargs: Any) -> Any:
        logprobs, *rest = forward(*args, **kwargs)
        if when():
            logprobs = logprobs + 1e-2 * torch.randn_like(logprobs) * (logprobs != 0)
        return (logprobs, *rest)

    return noised


def test_noise_in_the_policy_is_caught_by_the_first_kl(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "forward", noisy(Policy.forward, lambda: True))
    with pytest.raises(InvariantError, match="it must be 0"):
        run()


def test_noise_in_the_update_is_caught_by_the_first_ratio(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActorCritic, "forward", noisy(ActorCritic.forward, torch.is_grad_enabled))
    with pytest.raises(InvariantError, match="first minibatch's ratio"):
        run()


def test_another_reference_is_no_error(run: Any, tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(tiny.path)
    with torch.no_grad():
        lm.lm_head.weight.mul_(0.9)
    lm.save_pretrained(tmp_path / "other")
    tiny.tokenizer.save_pretrained(tmp_path / "other")
    _, lines = run(steps=1, reference=str(tmp_path / "other"))
    assert lines[0]["objective/kl_k3"] > 0


def test_the_first_update_reuses_the_forward_of_the_scoring(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same training from one forward less a step, but for step 0, whose first ratio is checked."""
    forward, calls = ppo.forward, []
    monkeypatch.setattr(ppo, "forward", lambda *args: calls.append(args) or forward(*args))
    a, lines = run("kept", steps=3, epochs=2, micro_batch_size=8)
    assert len(calls) == 2 + 1 + 1
    monkeypatch.setattr(Runtime, "is_alone", False)
    b, anew = run("anew", steps=3, epochs=2, micro_batch_size=8)
    assert len(calls) == 4 + 6
    assert [line.pop("train/reused_forwards") for line in lines] == [0, 1, 1]
    assert [line.pop("train/reused_forwards") for line in anew] == [0, 0, 0]
    assert untimed(lines) == untimed(anew)
    assert same(a / "final", b / "final")
    run("in parts", steps=2, epochs=1, micro_batch_size=4)
    assert len(calls) == 10 + 4


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """NaN in the loss of the given calls of `ppo_loss`."""
    loss_of, count = ppo.ppo_loss, iter(range(10_000))

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        loss, stats = loss_of(*args, **kwargs)
        return (loss * float("nan") if next(count) in calls else loss), stats

    monkeypatch.setattr(ppo, "ppo_loss", poisoned)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(run: Any, tiny: Any, monkeypatch: Any) -> None:
    poison(monkeypatch, {0})
    folder, lines = run(steps=1, epochs=1, micro_batch_size=8)
    assert (lines[0]["train/skipped_updates"], lines[0]["train/updates"]) == (1, 1)
    assert same(folder / "final", tiny.path)


def test_the_steps_around_a_skipped_one_count(run: Any, tiny: Any, monkeypatch: Any) -> None:
    poison(monkeypatch, {1, 2})
    folder, lines = run(steps=1, epochs=4, micro_batch_size=8)
    assert (lines[0]["train/skipped_updates"], lines[0]["train/updates"]) == (2, 4)
    final = weights(folder / "final")
    assert all(tensor.isfinite().all() for tensor in final.values())
    assert not same(folder / "final", tiny.path)


@pytest.mark.parametrize(("epochs", "minibatches"), [(2, 2), (1, 1), (2, 1)])
def test_three_skipped_in_a_row_end_the_run_and_keep_its_rollouts(
    run: Any, monkeypatch: Any, tmp_path: Path, epochs: int, minibatches: int
) -> None:
    """In a row over the run: with the default of two optimizer steps a step, too."""
    poison(monkeypatch, set(range(10_000)))
    with pytest.raises(InvariantError, match="3 times in a row") as caught:
        run(steps=5, epochs=epochs, minibatches=minibatches)
    (path,) = (tmp_path / "ppo" / "failed").iterdir()
    assert str(path) in caught.value.message
    kept = RolloutBuffer.from_parquet(path).rollouts
    assert len(kept) == 8
    assert {f"step_{r.step + 1:06d}_rank_0.parquet" for r in kept} == {path.name}


# --- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pull", ["none", "weight_decay", "ptx"])
def test_critic_warm_up_leaves_the_policy_as_it_is(run: Any, tiny: Any, demonstrations_file: str, pull: str) -> None:
    changes: dict[str, Any] = {"optim": {"lr": 1e-3, "weight_decay": 0.1 if pull == "weight_decay" else 0.0}}
    if pull == "ptx":
        changes |= {"ptx": {"path": demonstrations_file}, "ptx_coef": 1.0}
    folder, lines = run(steps=2, critic_warmup_steps=2, **changes)
    assert same(folder / "final", tiny.path)
    assert not same(folder / "critic", tiny.reward)
    assert [line["objective/kl"] for line in lines] == [0.0, 0.0]


def test_the_kl_controller_waits_for_the_critic(run: Any) -> None:
    """KL is 0 until the policy moves; the coefficient must not run away meanwhile."""
    kl = {"kind": "adaptive", "coef": 0.5, "target": 6.0, "horizon": 10}
    _, lines = run(steps=4, critic_warmup_steps=2, kl=kl)
    coefs = [line["objective/kl_coef"] for line in lines]
    assert coefs[:3] == [0.5, 0.5, 0.5]
    assert coefs[3] < 0.5


def test_lora_also_leaves_its_adapter(run: Any, tiny: Any) -> None:
    """final/ is the adapter folded in; adapter/ is peft's, with nothing rounded."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, _ = run(steps=2, tuning={"kind": "lora", "rank": 4}, optim={"lr": 1e-2})
    tokens = torch.tensor([[2, 9, 12, 15]])
    with torch.no_grad():
        folded = AutoModelForCausalLM.from_pretrained(folder / "final")(tokens).logits
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.path), folder / "adapter")
        torch.testing.assert_close(adapted(tokens).logits, folded, atol=1e-5, rtol=1e-5)


def test_after_the_critic_s_warm_up_the_policy_moves(run: Any, tiny: Any) -> None:
    assert not same(run(steps=2, critic_warmup_steps=1)[0] / "final", tiny.path)


def test_target_kl_stops_the_epochs(run: Any) -> None:
    settings = {"steps": 1, "epochs": 4, "optim": {"lr": 1e-2}}
    _, lines = run("free", **settings)
    assert lines[0]["train/updates"] == 4
    _, lines = run("bound", **settings, target_kl=1e-6)
    assert lines[0]["train/updates"] == 2  # approx_kl is 0 in the first epoch, above the target in the second


def test_ptx_makes_its_texts_likelier(run: Any, demonstrations_file: str, tiny: Any, stage_config: Any) -> None:
    settings = {"steps": 3, "optim": {"lr": 3e-3}}
    ptx = {"ptx": {"path": demonstrations_file}, "ptx_coef": 2.0}
    plain, mixed = run("plain", **settings)[0], run("mixed", **settings, **ptx)[0]
    batch = RolloutBuffer(ppo.load_ptx(stage_config("ppo", **ptx), tiny.tokenizer)).batch()
    # every token of the answer counts, the EOS too: "the sun is hot ." are 6 of them
    assert batch.action_mask_BT.sum(1)[:4].tolist() == [6, 5, 5, 5]

    def likelihood(folder: Any) -> float:
        policy = Policy(load_causal_lm(str(folder), dtype=torch.float32))
        with torch.no_grad():
            logprobs, _ = policy(batch.tokens_BT, batch.attention_mask_BT, batch.action_mask_BT)
        return float(logprobs.sum() / batch.action_mask_BT.sum())

    assert likelihood(mixed / "final") > max(likelihood(plain / "final"), likelihood(tiny.path)) + 0.5


def test_ptx_rows_differ_between_the_steps_of_a_batch(
    run: Any, demonstrations_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 texts, 4 optimizer steps, 4 rows each: one and the same four would be learned by heart."""
    seen: list[tuple[int, ...]] = []
    rows_for_step = ptx_texts.rows_for_step

    def spied(step: int, count: int, rows: int, **kwargs: Any) -> list[int]:
        picks = rows_for_step(step, count, rows, **kwargs)
        if rows == 12:
            seen.append(tuple(picks))
        return picks

    monkeypatch.setattr(ptx_texts, "rows_for_step", spied)
    run(steps=1, epochs=2, minibatches=2, ptx={"path": demonstrations_file}, ptx_coef=1.0)
    assert len(seen) == 4
    assert len(set(seen)) > 1


def test_bootstrapping_changes_the_update_only_where_answers_are_truncated(run: Any) -> None:
    for budget, changes in ((3, True), (60, False)):
        sampling = {"max_new_tokens": budget, "batch_size": 16}
        settings = {"steps": 1, "epochs": 1, "sampling": sampling}
        a, lines = run(f"off{budget}", **settings)
        assert (lines[0]["response/eos_frac"] < 1) == changes
        b, _ = run(f"on{budget}", **settings, bootstrap_truncated=True)
        assert same(a / "final", b / "final") != changes


def test_whitened_rewards_change_the_update(run: Any) -> None:
    a, lines = run("off", steps=1, epochs=1)
    b, whitened = run("on", steps=1, epochs=1, whiten_rewards=True)
    assert not same(a / "critic", b / "critic")
    assert lines[0]["objective/scores"] == whitened[0]["objective/scores"], "reported as they were given"


def test_a_kl_loss_is_weighted_by_the_controller_s_coefficient(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With place: loss, the adaptive coefficient that is logged is the one that is used."""
    ppo_loss, totals = ppo.ppo_loss, []

    def zeroed(function: Any) -> Any:
        return lambda *args, **kwargs: ((out := function(*args, **kwargs))[0] * 0.0, out[1])

    def total(*args: Any, **kwargs: Any) -> Any:
        loss, stats = ppo_loss(*args, **kwargs)
        totals.append(float(loss.detach()))
        return loss, stats

    monkeypatch.setattr(ppo, "policy_loss", zeroed(ppo.policy_loss))
    monkeypatch.setattr(ppo, "value_loss", zeroed(ppo.value_loss))
    monkeypatch.setattr(ppo, "kl_loss", lambda *_, **__: torch.ones(()))
    monkeypatch.setattr(ppo, "ppo_loss", total)
    kl = {"kind": "adaptive", "coef": 0.5, "target": 6.0, "horizon": 10, "place": "loss", "estimator": "k2"}
    _, lines = run(steps=3, epochs=1, micro_batch_size=8, kl=kl)
    assert lines[2]["objective/kl_coef"] < 0.45, "the controller moves"
    assert totals == pytest.approx([line["objective/kl_coef"] for line in lines], rel=1e-5)


def test_kl_in_the_loss_runs_and_pulls_to_the_reference(run: Any) -> None:
    settings = {"steps": 6, "epochs": 2, "optim": {"lr": 1e-2, "schedule": "constant"}}
    _, free = run("free", **settings, kl={"kind": "fixed", "coef": 0.0})
    _, held = run("held", **settings, kl={"kind": "fixed", "coef": 3.0, "place": "loss", "estimator": "k2"})
    assert held[-1]["objective/kl_k3"] < free[-1]["objective/kl_k3"] / 2


@pytest.mark.parametrize(
    "changes", [{"entropy_coef": 0.1}, {"dual_clip": 1.5}, {"score_clip": 0.1}, {"whiten_advantages": False}]
)
def test_options_run_and_change_the_result(run: Any, changes: dict[str, Any]) -> None:
    settings = {"steps": 1, "epochs": 3, "optim": {"lr": 3e-2}, "missing_eos": {"kind": "none"}}
    assert not same(run("off", **settings)[0] / "final", run("on", **settings, **changes)[0] / "final")


@pytest.mark.parametrize("tuning", [{"kind": "full"}, {"kind": "lora", "rank": 4}], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing_but_memory(run: Any, monkeypatch: Any, tuning: Any) -> None:
    from transformers import modeling_utils

    calls, checkpoint = [], modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: (calls.append(1), checkpoint(*a, **k))[1])
    a = run("off", steps=1, tuning=tuning)[0]
    assert not calls
    b = run("on", steps=1, tuning=tuning, gradient_checkpointing=True)[0]
    assert calls
    assert distance(a / "final", b / "final") < 1e-6


def test_bf16_runs_with_float32_weights(run: Any) -> None:
    folder, lines = run(steps=2, precision="bf16")
    assert abs(lines[0]["objective/kl"]) < 0.05
    assert weights(folder / "final")["model.norm.weight"].dtype == torch.bfloat16


def test_the_saved_critic_gives_the_values_of_the_run(run: Any, tiny: Any) -> None:
    """A critic that starts from the reward model keeps its mean and std; without them its values mean nothing."""
    from rlhf.models.value import load_scalar_model

    folder, _ = run(steps=1, critic_lr=1e-12)  # as good as untrained: equal to the reward model
    tokens, mask = torch.tensor([[2, 9, 12, 3]]), torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad():
        saved = load_scalar_model(str(folder / "critic"), dtype=torch.float32)(tokens, mask)
        start = load_scalar_model(tiny.reward, dtype=torch.float32)(tokens, mask)
    torch.testing.assert_close(saved, start, atol=1e-4, rtol=0)
