"""`rlhf plan`: what it counts, says and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rlhf import machine, plan
from rlhf.cli import app
from rlhf.config import dump
from rlhf.errors import ConfigError, ModelError
from rlhf.footprint import Models
from rlhf.functional.flops import training_flops
from rlhf.machine import GPUS, Machine, gpu_named, with_given
from rlhf.models.load import load_config
from rlhf.models.shape import dimensions_of
from rlhf.planning import Cluster, advice, decoded_bytes, plans, ppo_seconds, supervised_seconds, variants
from rlhf.rollout.work import StepWork

SLOW = Machine("slow", 1e9, {"bf16": 1e9, "fp32": 1e9}, 1e9, 1e9, 1e8)
CLUSTER = Cluster(SLOW, gpus=4)


@pytest.fixture(scope="module")
def models(tiny: Any) -> Models:
    policy, reward = dimensions_of(load_config(tiny.path)), dimensions_of(load_config(tiny.reward), scalar=True)
    return Models(policy, reward, policy, reward)


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`invoke(cfg, "a.b=c", "--gpus", "8")`: the plan of a configuration."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(cfg: Any, *arguments: str) -> Any:
        file = tmp_path / "in.yaml"
        file.write_text(cfg if isinstance(cfg, str) else dump(cfg), encoding="utf-8")
        return CliRunner().invoke(app, ["plan", str(file), *arguments])

    return run


# --- planning -----------------------------------------------------------------------------------------------


def test_every_way_of_sharing_under_every_stage_the_own_one_first(stage_config: Any, models: Models) -> None:
    cfg = stage_config("ppo", tuning={"kind": "lora"})
    found = plans(cfg, models, CLUSTER)
    assert [(p.sharing, p.setup.stage) for p in found] == [
        *(("separate", stage) for stage in range(4)),
        *((way, stage) for way in ("lora", "hydra") for stage in range(3)),  # common weights are not cut up
    ]
    assert found[0].cfg is cfg
    hydra = variants(stage_config("ppo", sharing="hydra", tuning={"layers": 1}), models)
    assert list(hydra) == ["hydra", "separate", "lora"]
    assert len(plans(cfg, models, Cluster(SLOW))) == 3, "alone there is nothing to shard"


def test_the_other_ways_are_valid_configurations(stage_config: Any, models: Models) -> None:
    for changes in ({}, {"tuning": {"kind": "lora"}}, {"sharing": "hydra", "tuning": {"layers": 2}}):
        for way, cfg in variants(stage_config("ppo", **changes), models).items():
            checked = type(cfg).model_validate(cfg.model_dump())
            assert checked.sharing == way


@pytest.mark.parametrize("way", ["separate", "hydra"])
def test_the_work_is_that_of_the_profile(stage_config: Any, models: Models, way: str) -> None:
    """As `StepWork.of` counts it from the model's files, at one FLOP/s of everything."""
    cfg = variants(stage_config("ppo", epochs=3), models)[way]
    begins: dict[str, int] = {role: 1 for role in ("policy", "reference", "critic", "reward") if way == "hydra"}
    work = StepWork.of(cfg, begins)
    assert work is not None
    expected = work.flops([(cfg.max_prompt_tokens, 10)] * 8, epochs=3)
    adder = Machine("arithmetic alone", 1e9, {"fp32": 1.0}, 1e30, None, None)
    assert ppo_seconds(cfg, models, Cluster(adder), 0) == pytest.approx(expected)


def test_decoding_reads_weights_and_half_of_the_cache_for_every_token(stage_config: Any, models: Models) -> None:
    """Two rounds of 4 rows, 10 tokens each; at the middle of an answer 5 + 5 columns stand in the cache."""
    sampling = {"max_new_tokens": 10, "batch_size": 4}
    cfg = stage_config("ppo", max_prompt_tokens=5, sampling=sampling)
    weights = 4 * (models.policy.shape.layers * models.policy.shape.layer_weights + models.policy.shape.head_weights)
    assert decoded_bytes(cfg, models) == 2 * 10 * (weights + 2 * 2 * 16 * 4 * 10 * 4)


def test_gradients_are_exchanged_over_the_slowest_way(stage_config: Any, models: Models) -> None:
    """fp32 gradients of policy and critic; 3 of 4 parts travel twice for each of 4 updates; 8 backwards of ZeRO."""
    cfg = stage_config("ppo", minibatches=2, micro_batch_size=2)
    size = 4 * (models.policy.parameters + models.critic.parameters)

    def exchange(stage: int, cluster: Cluster = CLUSTER) -> float:
        return ppo_seconds(cfg, models, cluster, stage)["exchange"]

    assert exchange(0) == exchange(1) == pytest.approx(2 * 4 * size * 3 / 4 / 1e9)
    assert exchange(2) == pytest.approx((8 + 4) * size * 3 / 4 / 1e9)
    assert exchange(3) == pytest.approx(3 * 8 * size * 3 / 4 / 1e9)
    assert exchange(0, Cluster(SLOW, gpus=2, nodes=2)) == pytest.approx(10 * exchange(0))
    assert "exchange" not in ppo_seconds(cfg, models, Cluster(SLOW), 0)


def test_sft_is_a_forward_and_a_backward_of_full_rows(stage_config: Any, models: Models, prompts_file: str) -> None:
    cfg = stage_config("sft", dataset={"path": prompts_file}, max_length=20, batch_size=4, micro_batch_size=2)
    flops = training_flops(models.policy.shape, load=_load(4, 20), head_positions=80)
    expected = flops / 1e9 + 28 * models.policy.parameters / 1e9
    assert supervised_seconds(cfg, models.policy, Cluster(SLOW), 0) == {"update": pytest.approx(expected)}


def _load(rows: int, length: int) -> Any:
    from rlhf.functional.flops import Load

    return Load(rows * length, rows * length * (length + 1) // 2)


def test_what_fits_and_what_to_lower(stage_config: Any, models: Models) -> None:
    cfg = stage_config("ppo", batch_size=64, micro_batch_size=64)
    needs = min(p.resident for p in plans(cfg, models, CLUSTER) if p.sharing == "separate")
    roomy = Cluster(replace(SLOW, memory=needs), gpus=4)
    assert advice(cfg, models, roomy)[0].startswith("fits: sharing separate, ZeRO-3")
    least = min(p.resident for p in plans(cfg, models, CLUSTER))
    tight = Cluster(replace(SLOW, memory=least - 1), gpus=4)
    (line,) = advice(cfg, models, tight)
    assert line.startswith("fits with micro_batch_size=1: sharing ")
    (line,) = advice(cfg, models, Cluster(replace(SLOW, memory=1e8), gpus=4))
    assert "nothing fits" in line
    assert "micro_batch_size=1 gradient_checkpointing=true sampling.batch_size=8" in line


def test_a_machine_by_name_and_by_numbers() -> None:
    h100 = gpu_named("H100")
    assert (h100.memory, h100.flops["bf16"], h100.bandwidth) == (80e9, 989e12, 3350e9)
    given = with_given(h100, "bf16", 40, 400, None)
    assert (given.memory, given.flops["bf16"], given.bandwidth) == (40e9, 400e12, 3350e9)
    assert given.flops["fp32"] == h100.flops["fp32"]
    with pytest.raises(ConfigError, match="not above 0"):
        with_given(h100, "bf16", -1, None, None)
    with pytest.raises(ConfigError, match="not known") as caught:
        gpu_named("h1000")
    assert all(name in str(caught.value) for name in GPUS)


def test_the_tables_fit_into_80_characters(
    invoke: Any, stage_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = {"model_type": "llama", "tie_word_embeddings": False, **large}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = invoke(stage_config("ppo", model=str(tmp_path)), "--gpu", "h100", "--gpus", "8")
    assert result.exit_code == 0, result.output
    assert "\u2026" not in result.output, "a number is cut short"
    assert max(map(len, result.output.splitlines())) <= 80


# --- the command ----------------------------------------------------------------------------------------------


def test_the_tables(invoke: Any, stage_config: Any) -> None:
    result = invoke(stage_config("ppo"), "--gpus", "2", "--nodes", "2", "--gpu", "h100")
    assert result.exit_code == 0, result.output
    for word in ("2 x 2 x h100 (80 GB)", "separate", "hydra", "ZeRO-3", "logits", "sampler", "fits: ", "exchange"):
        assert word in result.output


def test_json_for_programs_and_no_times_without_rates(invoke: Any, stage_config: Any) -> None:
    shown = json.loads(invoke(stage_config("ppo"), "--gpu-memory", "24", "--json").output)
    assert shown["stage"] == "ppo"
    assert [p["sharing"] for p in shown["plans"]] == ["separate", "lora", "hydra"]
    first = shown["plans"][0]
    assert first["fits"]
    assert first["seconds"] == {}
    assert first["roles"]["policy"]["optimizer"] == 2 * first["roles"]["policy"]["weights"]
    timed = json.loads(invoke(stage_config("ppo"), "--gpu-memory", "24", "--rates", "10", "500", "--json").output)
    assert timed["plans"][0]["seconds"]["generate"] > 0


def test_a_model_needs_no_more_than_its_config(invoke: Any, stage_config: Any, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_bytes((Path(tiny.path) / "config.json").read_bytes())
    cfg = stage_config("ppo", model=str(tmp_path / "shape"), reward_model="runs/later/final")
    result = invoke(cfg, "--gpu", "h100")
    assert result.exit_code == 0, result.output
    assert "taken for one of the policy's shape" in result.output


def test_a_model_that_is_not_here_is_not_fetched(invoke: Any, stage_config: Any) -> None:
    for name in ("owner/name", "runs/nowhere/final"):
        result = invoke(stage_config("ppo", model=name), "--gpu", "h100")
        assert result.exit_code == 2
        assert "model=FOLDER (no weights are needed)" in result.stderr


def test_what_is_missing_is_said(invoke: Any, stage_config: Any) -> None:
    assert "--gpu-memory 80" in invoke(stage_config("ppo"), "--gpus", "8").stderr
    assert "--nodes 0 is not above 0" in invoke(stage_config("ppo"), "--nodes", "0").stderr
    assert "is a configuration of the stage label" in invoke("run_dir: x\nrollouts: y\nannotators: []\n").stderr
    assert "no configuration 'nothing'" in CliRunner().invoke(app, ["plan", "nothing"]).stderr


def test_sft_and_reward_have_one_role(invoke: Any, stage_config: Any, prompts_file: str) -> None:
    for stage in ("sft", "reward"):
        shown = invoke(stage_config(stage, dataset={"path": prompts_file}), "--gpu", "a100", "--gpus", "2", "--json")
        found = json.loads(shown.output)
        assert found["stage"] == stage
        assert [p["zero_stage"] for p in found["plans"]] == [0, 1, 2, 3]
        assert list(found["plans"][0]["roles"]) == ["model"]


@pytest.fixture
def pipeline(tiny: Any, tmp_path: Path) -> dict[str, Any]:
    return {
        "run_dir": str(tmp_path / "run"),
        "model": tiny.path,
        "precision": "fp32",
        "sft": {"dataset": {"path": "x.jsonl"}},
        "sample": {"prompts": {"path": "x.jsonl"}},
        "label": {"annotators": [{"name": "ann"}]},
        "reward": {},
        "ppo": {"prompts": {"path": "x.jsonl"}},
        "evaluate": {"prompts": {"path": "x.jsonl"}},
    }


def test_a_pipeline_is_planned_by_its_stages_that_train(invoke: Any, pipeline: dict[str, Any]) -> None:
    found = json.loads(invoke(yaml.safe_dump(pipeline), "--gpu", "h100", "--json").output)
    assert [part["stage"] for part in found] == ["sft", "reward", "ppo"]


def test_further_rounds_are_planned_and_said_once(invoke: Any, pipeline: dict[str, Any]) -> None:
    rounds = {"rounds": 3, "later_rounds": {"ppo": {"sampling": {"max_new_tokens": 7}}}}
    text = yaml.safe_dump({**pipeline, **rounds})
    found = {part["stage"]: part for part in json.loads(invoke(text, "--gpu", "h100", "--json").output)}
    further = [f"round_{number}/{stage}" for number in (2, 3) for stage in ("reward", "ppo")]
    assert list(found) == ["sft", "reward", "ppo", *further]
    sampled = [found[stage]["plans"][0]["roles"]["sampler"]["kv_cache"] for stage in ("ppo", "round_2/ppo")]
    assert sampled[0] > sampled[1] > 0
    shown = invoke(text, "--gpu", "h100").output
    assert "round_2/reward: as reward\n" in shown
    assert "round_3/ppo: as round_2/ppo\n" in shown
    assert "round_2/ppo: " in shown


def test_a_hydra_reference_that_is_another_model_counts_its_top_alone(stage_config: Any, models: Models) -> None:
    """That of a further round, which has the policy's lower layers; as the reward model's."""
    cfg = stage_config("ppo", sharing="hydra", tuning={"layers": 1})
    other = cfg.model_copy(update={"reference": "elsewhere"})
    own, further = (plans(c, models, CLUSTER)[0].footprint.roles["reference"].weights for c in (cfg, other))
    assert own == further > 0


def test_this_machine_is_measured_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "square_rate", lambda device, dtype: 2.0)
    monkeypatch.setattr(machine, "_COPIED", 2**20)
    cluster = plan.cluster_of(plan.Options(), "fp32")
    assert cluster.machine.flops == {"fp32": 2.0}
    assert cluster.machine.bandwidth is not None
    assert cluster.machine.bandwidth > 1e6
    assert cluster.machine.memory > 1e9
    assert cluster.exchange is None


def test_an_adapter_counts_as_what_can_be_shared(stage_config: Any, tiny: Any, tmp_path: Path) -> None:
    whole, notes = plan.models_of(stage_config("ppo"))
    assert isinstance(whole, Models)
    assert not whole.shared_reward
    assert "is a whole model" in notes[-1]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="reward_model"):
        plan.models_of(stage_config("ppo", reward_model=str(tmp_path / "empty")))
