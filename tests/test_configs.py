"""Every shipped YAML loads; what the loader promises; the hub's data sets, tried on files with their columns."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf import config
from rlhf.config_schema import STAGES, DatasetConfig
from rlhf.data.records import read_demonstrations, read_prompts, read_rankings
from rlhf.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
NAMES = [str(path.relative_to(CONFIGS)) for path in FILES]


def load(path: Path, *overrides: str) -> Any:
    return config.load(path, path.relative_to(CONFIGS).parts[0], overrides)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, stage: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(path, stage, overrides)
    assert caught.value.fix
    return str(caught.value)


# --- the shipped files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_shipped_file_is_a_valid_configuration_of_its_folder_s_stage(path: Path) -> None:
    stage = path.relative_to(CONFIGS).parts[0]
    assert isinstance(load(path), STAGES[stage])


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_top_comment_has_the_command_that_runs_the_file(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    stage = path.relative_to(CONFIGS).parts[0]
    command = {"labeling": "label serve"}.get(stage, stage)
    assert f"rlhf {command} " in comment
    assert path.stem in comment


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_dumped_configuration_loads_equal(path: Path, tmp_path: Path) -> None:
    loaded = load(path)
    stage = path.relative_to(CONFIGS).parts[0]
    again = config.load(write(tmp_path / "config.yaml", config.dump(loaded)), stage)
    assert again == loaded
    assert config.fingerprint(again) == config.fingerprint(loaded)


@pytest.mark.parametrize("name", ["hh", "tldr", "ultrafeedback"])
def test_ppo_starts_from_what_sft_and_reward_leave(name: str) -> None:
    sft, reward, ppo = (load(CONFIGS / stage / f"{name}.yaml") for stage in ("sft", "reward", "ppo"))
    assert ppo.model == f"{sft.run_dir}/final"
    assert ppo.reward_model == f"{reward.run_dir}/final"
    assert sft.model == reward.model, "policy and reward model need one tokenizer"
    assert ppo.prompts.chat == sft.dataset.chat == reward.dataset.chat


# --- the loader -----------------------------------------------------------------------------------------------

REWARD = """
run_dir: runs/x
model: m
dataset: {path: d.jsonl}
"""


def test_overrides_reach_nested_keys_and_survive_a_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", REWARD)
    overrides = ["optim.lr=3e-6", "dataset.limit=7", "tuning.kind=lora", "eval_dataset.path=e.jsonl", "run_dir=r=s"]
    cfg = config.load(path, "reward", overrides)
    values = (cfg.optim.lr, cfg.dataset.limit, cfg.tuning.kind, cfg.eval_dataset.path, cfg.run_dir)
    assert values == (3e-6, 7, "lora", "e.jsonl", "r=s")
    assert config.load(write(tmp_path / "again.yaml", config.dump(cfg)), "reward") == cfg


@pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("1E-6", 1e-6), ("-2e+1", -20.0), ("1.e-6", 1e-6)])
def test_an_exponent_makes_a_float(tmp_path: Path, text: str, value: float) -> None:
    data = config.read_yaml(write(tmp_path / "a.yaml", f"a: {text}\nb: 1e-6x\nc: e5\n"))
    assert data == {"a": value, "b": "1e-6x", "c": "e5"}
    assert type(data["a"]) is float


def test_all_errors_come_at_once_with_key_and_proposal(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", REWARD + "epoch: 2\nbatch_size: many\nloss: bradley_tery\noptim: {learning: 1}\n")
    text = refused(path, "reward", "dataset.pth=x")
    assert text.startswith(f"{path}: 6 errors in the reward configuration")
    for part in (
        "epoch: unknown key; did you mean 'epochs'?",
        "dataset.pth: unknown key; did you mean 'path'?",
        "batch_size: ",
        "(got 'many')",
        "did you mean 'bradley_terry'?",
        "optim.learning: unknown key; known: betas",
        "optim.lr: required, but not set",
    ):
        assert part in text


def test_the_known_keys_are_listed_once(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", REWARD + "zzz: 1\nqqq: 2\noptim: {lr: 1, zzz: 1, qqq: 2}\n")
    text = refused(path, "reward")
    assert text.count("known: batch_size, centering") == 1
    assert text.count("known: betas") == 1
    assert "qqq: unknown key\n" in text


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("epochs", "not of the form a.b=c"),
        ("=3", "not of the form a.b=c"),
        ("model.name=3", "model is a single value"),
        ("epochs=[1", "not valid YAML"),
        ("epochs=[1", "close the bracket, or quote the value"),
        ("epochs", "for example epochs=5 (in a pipeline"),
        ("epochs=!!timestamp 2020-13-45", "not valid YAML"),
        ("epochs=" + 3000 * "[", "not valid YAML"),
    ],
)
def test_a_malformed_override_is_named(tmp_path: Path, override: str, part: str) -> None:
    text = refused(write(tmp_path / "r.yaml", REWARD), "reward", override)
    assert override[:50] in text
    assert part in text
    assert len(text) < 500


def test_a_date_is_text(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", REWARD)
    assert config.load(path, "reward", ["run_dir=2020-01-01"]).run_dir == "2020-01-01"
    assert "epochs: Input should be a valid integer" in (text := refused(path, "reward", "epochs=2020-13-45"))
    assert "(got '2020-13-45')" in text


@pytest.mark.parametrize("text", ["a: !!timestamp 2020-13-45\n", "a: !!int x\n", "a: " + 3000 * "[" + "\n"])
def test_values_that_yaml_cannot_build_name_the_file(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    assert re.match(rf"{path}(:1)?: not valid YAML: ", refused(path, "reward"))


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "x:\n  a: 1\n  a: 2\n"])
def test_a_key_set_twice_is_an_error_with_its_line(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    message = refused(path, "reward")
    assert f"{path}:3: not valid YAML: key 'a' is set twice" in message


@pytest.mark.parametrize("text", ["a: 1\n{b: 1}: 2\n", "a: 1\n? [b, c]\n: 2\n", "a:\n  {{b}}: 1\n"])
def test_a_key_that_is_no_single_value_is_an_error_with_its_line(tmp_path: Path, text: str) -> None:
    """`{{name}}`, a template's placeholder left in the file, is the usual way to get one."""
    path = write(tmp_path / "a.yaml", text)
    message = refused(path, "reward")
    assert f"{path}:2: not valid YAML: a key is a" in message
    assert "not a single value" in message


def test_a_key_that_is_no_single_value_is_an_error_in_an_override_too(tmp_path: Path) -> None:
    assert "not valid YAML" in refused(write(tmp_path / "r.yaml", REWARD), "reward", "optim={{a: 1}: 2}")


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"run_dir: x\nmodel: caf\xe9\n")
    assert f"{path}:2: not UTF-8" in refused(path, "reward")


@pytest.mark.parametrize(
    ("text", "part"), [("a: [1\n", "a.yaml:2: not valid YAML"), ("- a\n", "holds a list"), ("", "a.yaml is empty")]
)
def test_what_is_no_mapping_is_named(tmp_path: Path, text: str, part: str) -> None:
    assert part in refused(write(tmp_path / "a.yaml", text), "reward")


# --- the schema -----------------------------------------------------------------------------------------------

PPO = """
run_dir: runs/x
model: m
reward_model: r
prompts: {path: d.jsonl}
"""
PIPELINE = "run_dir: runs/x\nmodel: m\nsft: {}\nsample: {}\nlabel: {}\nreward: {}\nppo: {}\nevaluate: {}\n"


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf"])
@pytest.mark.parametrize(
    "key",
    [
        "kl.coef", "kl.target", "optim.lr", "optim.weight_decay", "optim.eps", "optim.max_grad_norm", "critic_lr",
        "gamma", "clip_range", "dual_clip", "value_coef", "entropy_coef", "missing_eos.value", "score_clip",
        "target_kl", "ptx_coef", "sampling.temperature", "prompts.max_bad_fraction",
    ],
)  # fmt: skip
def test_a_number_that_is_not_finite_is_refused_by_its_key(tmp_path: Path, key: str, value: str) -> None:
    text = refused(write(tmp_path / "p.yaml", PPO), "ppo", f"{key}={value}")
    assert f"  - {key}: " in text
    assert f"(got {value.replace('.', '')})" in text


def test_only_the_clipping_of_the_value_may_be_infinite_which_switches_it_off(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", PPO)
    cfg = config.load(path, "ppo", ["value_clip_range=.inf"])
    assert cfg.value_clip_range == float("inf")
    assert config.load(write(tmp_path / "again.yaml", config.dump(cfg)), "ppo") == cfg
    assert "value_clip_range: " in refused(path, "ppo", "value_clip_range=.nan")


@pytest.mark.parametrize("key", ["steps", "tuning.rank", "seed", "gamma", "critic_lr", "optim.lr", "prompts.limit"])
def test_true_is_no_number(tmp_path: Path, key: str) -> None:
    text = refused(write(tmp_path / "p.yaml", PPO), "ppo", "optim.lr=1", f"{key}=true")
    assert f"  - {key}: " in text
    assert "true or false is no number" in text


def test_true_is_no_number_in_a_list_either_and_stays_a_value_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", PPO)
    assert "optim.betas: " in refused(path, "ppo", "optim.lr=1", "optim.betas=[true, 0.9]")
    cfg = config.load(path, "ppo", ["whiten_rewards=true", "prompts.chat=false"])
    assert (cfg.whiten_rewards, cfg.prompts.chat) == (True, False)


@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999999999999"])
@pytest.mark.parametrize("stage", ["ppo", "pipeline"])
def test_a_seed_fits_in_32_bits(tmp_path: Path, stage: str, seed: str) -> None:
    text = refused(write(tmp_path / "p.yaml", PPO if stage == "ppo" else PIPELINE), stage, f"seed={seed}")
    assert "  - seed: Input should be " in text


def test_a_quote_left_open_in_the_launcher_is_an_error_of_its_key(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", PIPELINE)
    assert config.load(path, "pipeline", ["launcher=accelerate 'x y'", "seed=4294967295"]).seed == 2**32 - 1
    text = refused(path, "pipeline", "launcher=accelerate 'x")
    assert "  - launcher: " in text
    assert "close the quote" in text


def test_errors_are_in_yaml_s_words(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", PPO)
    text = refused(path, "ppo", "optim=3", "prompts=p.jsonl", "scorer=readability")
    assert "optim: Input should be keys and values (got 3)" in text
    assert "prompts: Input should be keys and values (got 'p.jsonl')" in text
    text = refused(path, "ppo", "scorer=readability")
    assert "  - exactly one of reward_model, scorer and reward_endpoint must be set" in text


def test_a_reward_has_one_source(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", PPO)
    served = ["critic_init=policy", "reward_endpoint.url=https://rewards.example.org/score"]
    for further in ([], [*served, "scorer=readability"], [*served, "reward_model=m"]):
        keys = ["reward_model=null", "critic_init=policy", *further]
        assert "exactly one of reward_model, scorer and reward_endpoint" in refused(path, "ppo", *keys)
    cfg = config.load(path, "ppo", ["reward_model=null", *served])
    assert (cfg.reward_endpoint.max_invalid, cfg.reward_endpoint.allow_private) == (0.1, False)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "rewards", "ftp://x/y", "http://", "http://x:99999", "http://x:a", "http://[::1", "'a b'"]
)
@pytest.mark.parametrize("key", ["reward_endpoint.url", "sampling.server"])
def test_a_server_is_named_by_a_url(tmp_path: Path, key: str, url: str) -> None:
    path = write(tmp_path / "p.yaml", PPO)
    text = refused(path, "ppo", f"{key}={url}", "sampling.engine=vllm")
    assert f"  - {key if 'url' in key else 'sampling'}: " in text


def test_secrets_do_not_stand_in_a_configuration(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", PPO)
    text = refused(path, "ppo", "reward_endpoint.url=http://me:s3cret@x.org/y", "reward_endpoint.token_env=s3-cret=")
    assert "reward_endpoint.url: the URL holds a user or password" in text
    assert "reward_endpoint.token_env: no name of an environment variable" in text
    assert "s3" not in text


@pytest.mark.parametrize("setting", ["max_invalid=1", "attempts=0", "timeout_s=0", "batch_size=0", "parallel=0"])
def test_limits_of_a_served_reward_are_limits(tmp_path: Path, setting: str) -> None:
    path = write(tmp_path / "p.yaml", PPO)
    key = f"reward_endpoint.{setting}"
    text = refused(path, "ppo", "reward_endpoint.url=http://x", key)
    assert f"  - {key.split('=')[0]}: Input should be " in text


@pytest.mark.parametrize(("betas", "at"), [("[2, 0.9]", 0), ("[0.9, 1]", 1), ("[-0.1, 0.9]", 0), ("[0.9, .nan]", 1)])
def test_the_betas_of_adam_lie_in_0_to_1(tmp_path: Path, betas: str, at: int) -> None:
    path = write(tmp_path / "p.yaml", PPO)
    assert f"optim.betas.{at}: " in refused(path, "ppo", "optim.lr=1e-6", f"optim.betas={betas}")
    cfg = config.load(path, "ppo", ["optim.lr=1e-6", "optim.betas=[0, 0.999]"])
    assert cfg.optim.betas == (0, 0.999)


@pytest.mark.parametrize(("stage", "text"), [("reward", REWARD), ("ppo", PPO)])
def test_adapters_with_dropout_are_refused_where_it_would_have_no_effect(tmp_path: Path, stage: str, text: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    message = refused(path, stage, "tuning.kind=lora", "tuning.dropout=0.1")
    assert "tuning.dropout must be 0" in message
    assert "set it to 0" in message


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    text = refused(Path("hh_lokal"), "reward")
    assert "no configuration 'hh_lokal'" in text
    assert "did you mean 'hh_local'?" in text


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    text = refused(tmp_path, "reward")
    assert f"{tmp_path} is a folder" in text
    write(tmp_path / "r.yaml", REWARD)
    assert "r.yaml" in refused(tmp_path, "reward")


def test_a_name_that_another_stage_has_is_told() -> None:
    assert "rlhf pipeline plain_language" in refused(Path("plain_language"), "ppo")
    text = refused(Path("hh"), "pipeline")
    assert "rlhf ppo hh" in text
    assert "rlhf reward hh" in text


@pytest.mark.parametrize(
    ("name", "stage", "other"),
    [("pipeline/plain_language", "ppo", "pipeline"), ("ppo/hh", "pipeline", "ppo"), ("reward/hh", "sft", "reward")],
)
def test_a_file_of_another_stage_says_so_in_place_of_its_keys(name: str, stage: str, other: str) -> None:
    text = refused(Path(name), stage, "steps=3")
    assert f"is a configuration of the stage {other}, not of {stage}" in text
    assert f"rlhf {other} " in text
    assert "unknown key" not in text


def test_a_file_that_two_stages_could_mean_is_read_as_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "s.yaml", "run_dir: x\nmodel: m\nprompts: {path: p.jsonl}\n")
    assert config.load(path, "sample").model == "m"
    assert config.load(path, "ppo", ["scorer=readability", "critic_init=policy"]).model == "m"


def test_a_shipped_configuration_is_found_by_name() -> None:
    assert config.load("tldr", "sft") == load(CONFIGS / "sft" / "tldr.yaml")


def test_no_key_can_hold_remote_code() -> None:
    assert "trust_remote_code" not in json.dumps([model.model_json_schema() for model in STAGES.values()])


# --- the hub's data sets: local files with the same columns ----------------------------------------------------

USER = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because of the light."}
POOR = {"role": "assistant", "content": "No idea."}
TLDR = "SUBREDDIT: r/x\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"
ULTRAFEEDBACK = {
    "prompt": "Why?",
    "prompt_id": "0" * 64,
    "chosen": [USER, GOOD],
    "rejected": [USER, POOR],
    "messages": [USER, GOOD],
    "score_chosen": 8.0,
    "score_rejected": 4.5,
}
HUB_ROWS: dict[tuple[str, str], dict[str, Any]] = {
    ("Anthropic/hh-rlhf", split): {
        "chosen": "\n\nHuman: Why?\n\nAssistant: Because of the light.",
        "rejected": "\n\nHuman: Why?\n\nAssistant: No idea.",
    }
    for split in ("train", "test")
}
HUB_ROWS |= {
    ("trl-lib/tldr", split): {"prompt": TLDR, "completion": " Short."} for split in ("train", "validation", "test")
}
HUB_ROWS |= {
    ("trl-lib/tldr-preference", split): {"prompt": TLDR, "chosen": " Short.", "rejected": " Long."}
    for split in ("train", "validation")
}
HUB_ROWS |= {
    ("HuggingFaceH4/ultrafeedback_binarized", f"{part}_{kind}"): ULTRAFEEDBACK
    for part in ("train", "test")
    for kind in ("sft", "prefs")
}
READERS = {
    "sft": {"dataset": read_demonstrations, "eval_dataset": read_demonstrations},
    "reward": {"dataset": read_rankings, "eval_dataset": read_rankings, "normalise_on": read_demonstrations},
    "ppo": {"prompts": read_prompts},
}
BLOCKS = [
    (stage, name, block)
    for stage, readers in READERS.items()
    for name in ("hh", "tldr", "ultrafeedback")
    for block in readers
]


def read_block(tmp_path: Path, stage: str, name: str, block: str) -> list[Any]:
    """The block's data set read by its stage's reader, from a local file with the hub's columns."""
    cfg: DatasetConfig = getattr(load(CONFIGS / stage / f"{name}.yaml"), block)
    row = HUB_ROWS[cfg.path, cfg.split]  # a KeyError: the hub has no such data set or split
    path = write(tmp_path / "rows.jsonl", json.dumps(row) + "\n")
    return READERS[stage][block](cfg.model_copy(update={"path": str(path)}))


@pytest.mark.parametrize(("stage", "name", "block"), BLOCKS, ids=["/".join(block) for block in BLOCKS])
def test_a_hub_configuration_reads_rows_of_the_hub_s_columns(tmp_path: Path, stage: str, name: str, block: str) -> None:
    (record,) = read_block(tmp_path, stage, name, block)
    assert record.prompt == (TLDR if name == "tldr" else [USER])
    good, poor = (" Short.", " Long.") if name == "tldr" else (GOOD["content"], POOR["content"])
    if hasattr(record, "responses"):
        assert record.responses == [good, poor]
    if hasattr(record, "completion"):
        assert record.completion == good


def test_hh_local_reads_its_files_where_they_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load(CONFIGS / "reward" / "hh_local.yaml")
    monkeypatch.chdir(CONFIGS.parent)
    if not Path(cfg.dataset.path).is_file():
        pytest.skip(f"{cfg.dataset.path} is not there")
    assert (len(read_rankings(cfg.dataset)), len(read_rankings(cfg.eval_dataset))) == (1605, 355)


def test_the_yaml_loader_constructs_no_objects(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "a: !!python/object/apply:os.getcwd []\n")
    assert "not valid YAML" in refused(path, "reward")
    with pytest.raises(yaml.YAMLError):
        yaml.load(path.read_text(), config._Loader)
