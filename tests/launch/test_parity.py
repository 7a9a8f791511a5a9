"""One run is one run: the same weights and metrics for any number of processes and every ZeRO stage, and on a resume.

In float32 and over 20 optimizer steps or more, of rows of different length. Sums of gradients are rounded in another
order, so weights may differ by `CLOSE`; a resume on as many processes repeats every bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CLOSE = 1e-6
DISTRIBUTED = ["ddp", "zero1", "zero2", "zero3"]
PPO = {"steps": 5, "epochs": 2, "minibatches": 2, "micro_batch_size": 2, "optim": {"lr": 1e-4}, "save_every": 2}
REWARD = {"epochs": 6, "micro_batch_size": 3, "optim": {"lr": 1e-4}, "save_every": 7}
LORA = {"tuning": {"kind": "lora", "rank": 4}, "bootstrap_truncated": True, "micro_batch_tokens": 60}


@pytest.fixture
def preferences(jsonl: Callable[..., str]) -> str:
    """Forty pairs of different length."""
    words = "sun star light is big hot gives us energy why how explain what moon sea sky blue red water rain".split()  # noqa: SIM905
    pairs = ([words[(i * k) % 11 : (i * k) % 11 + 1 + (i + k) % 9] for k in (3, 7)] for i in range(40))
    rows = [
        {"prompt": f"explain {words[i % 20]}", "chosen": " ".join(a), "rejected": " ".join(b)}
        for i, (a, b) in enumerate(pairs)
    ]
    return jsonl("preferences.jsonl", rows)


@pytest.fixture
def settings(preferences: str, demonstrations_file: str) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """The settings of a stage under comparison, by name."""
    return {
        "ppo": ("ppo", PPO),
        "ppo lora": ("ppo", {**PPO, **LORA}),
        "ppo shared lora": ("ppo", {**PPO, **LORA, "sharing": "lora"}),
        "ppo hydra": ("ppo", {**PPO, "tuning": {"kind": "full", "layers": 1}, "sharing": "hydra"}),
        "ppo ptx": ("ppo", {**PPO, "ptx": {"path": demonstrations_file}, "ptx_coef": 0.5}),
        "reward": ("reward", {**REWARD, "dataset": {"path": preferences}}),
        "reward lora": ("reward", {**REWARD, "tuning": LORA["tuning"], "dataset": {"path": preferences}}),
        "reward heads": ("reward", {**REWARD, "ensemble": {"members": 3}, "dataset": {"path": preferences}}),
        "reward adapters": (
            "reward",
            {
                **REWARD,
                "ensemble": {"members": 2, "kind": "adapters"},
                "tuning": LORA["tuning"],
                "dataset": {"path": preferences},
            },
        ),
    }.__getitem__


def assert_alike(one: Any, other: Any) -> None:
    assert one.distance(other) <= CLOSE
    assert len(one.metrics) == len(other.metrics) > 4
    for mine, theirs in zip(one.metrics, other.metrics, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def assert_identical(one: Any, other: Any) -> None:
    assert one.distance(other) == 0
    assert one.metrics == other.metrics


def cut(whole: Any, name: str, step: int) -> Path:
    """A copy of a run as it was after the checkpoint of `step`."""
    folder = whole.folder.with_name(name)
    shutil.copytree(whole.folder, folder)
    for path in [folder / "final", folder / "critic", *(folder / "checkpoints").iterdir()]:
        if path.name != f"step_{step}":
            shutil.rmtree(path, ignore_errors=True)
    return folder


def test_ppo_under_zero3_is_ppo_and_goes_on_in_one_process(launch: Any) -> None:
    """The short form of what follows."""
    alone, sharded = launch("ppo", "alone", **PPO), launch("ppo", "zero3", **PPO)
    assert_alike(alone, sharded)
    cut(sharded, "moved", 2)
    moved = launch("ppo", "alone", run="moved", **PPO)
    assert "which 2 processes under ZeRO-3 wrote" in moved.said
    assert_alike(alone, moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("ppo", "ppo lora", "ppo shared lora", "ppo hydra", "ppo ptx"),
        *("reward", "reward lora", "reward heads", "reward adapters"),
    ],
)
def test_processes_and_zero_change_nothing(launch: Any, settings: Any, name: str) -> None:
    stage, changes = settings(name)
    alone = launch(stage, "alone", **changes)
    for kind in DISTRIBUTED[:3] if "sharing" in changes else DISTRIBUTED:  # ZeRO-3 refuses common weights
        assert_alike(alone, launch(stage, kind, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero3"])
@pytest.mark.parametrize("name", ["reward heads", "reward adapters"])
def test_an_ensemble_scores_alike_for_any_number_of_processes(launch: Any, settings: Any, name: str, kind: str) -> None:
    stage, changes = settings(name)
    reward = launch(stage, "alone", run="ensemble", **{**changes, "epochs": 2}).folder / "final"
    ppo = {**PPO, "reward_model": str(reward), "reward_aggregate": "mean_minus_std"}
    alone, many = launch("ppo", "alone", **ppo), launch("ppo", kind, **ppo)
    assert_alike(alone, many)
    assert all(line["objective/reward_std"] > 0 for line in many.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "reward", "reward heads", "reward adapters"])
@pytest.mark.parametrize("kind", ["alone", *DISTRIBUTED])
def test_a_resumed_run_repeats_every_bit(launch: Any, settings: Any, name: str, kind: str) -> None:
    stage, changes = settings(name)
    whole = launch(stage, kind, **changes)
    kept = min(int(path.name.removeprefix("step_")) for path in (whole.folder / "checkpoints").iterdir())
    cut(whole, "again", kept)
    again = launch(stage, kind, run="again", **changes)
    assert f"going on after step {kept}" in again.said
    assert_identical(whole, again)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "processes"),
    [("zero2", "alone", 1), ("alone", "zero3", 2), ("zero3", "ddp", 2), ("ddp", "zero1", 4), ("zero1", "zero2", 2)],
)
def test_a_run_moves_to_another_number_of_processes(launch: Any, before: str, after: str, processes: int) -> None:
    whole = launch("ppo", before, **PPO)
    cut(whole, "moved", 2)
    assert_alike(whole, launch("ppo", after, run="moved", processes=processes, **PPO))


@pytest.mark.slow
@pytest.mark.parametrize("kind", DISTRIBUTED)
def test_evaluation_and_samples_are_the_same(launch: Any, tiny: Any, kind: str) -> None:
    def numbers(summary: Any, prefix: str = "") -> dict[str, float]:
        found: dict[str, float] = {}
        for key, value in summary.items():
            found |= numbers(value, f"{prefix}{key}.") if isinstance(value, dict) else {}
            found |= {prefix + key: value} if isinstance(value, int | float) else {}
        return found

    models = {"policies": {"sft": tiny.path, "ppo": tiny.path}} | dict.fromkeys(("reference", "base"), tiny.path)
    models["reward_model"] = tiny.reward
    for stage, changes in (("evaluate", models), ("sample", {})):
        alone, many = (launch(stage, k, **changes) for k in ("alone", kind))
        assert numbers(alone.result["summary"]) == pytest.approx(numbers(many.result["summary"]), rel=1e-4, abs=1e-5)
        assert alone.answers == many.answers
