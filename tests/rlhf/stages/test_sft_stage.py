"""Supervised fine-tuning: the loss falls, answers alone are trained, TRL's keys are checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.data.templates import prompt_tokens, response_tokens
from rlhf.errors import ConfigError, DataError
from rlhf.models import bundled
from rlhf.models.load import load_tokenizer
from rlhf.runs import RunOptions
from rlhf.stages import sft

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*", "ignore::UserWarning:trl.*")


@pytest.fixture
def config(stage_config: Any, demonstrations_file: str) -> Any:
    return lambda **changes: stage_config("sft", **{"dataset": {"path": demonstrations_file}, **changes})


class Seen(Exception):
    """Ends a run as soon as the examples were shown."""


def shown(cfg: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[bool]]]:
    """The examples of a run: tokens and whether each is trained."""
    caught: list[Any] = []

    def capture(console: Any, tokenizer: Any, title: str, examples: Any) -> None:
        caught.extend(examples)
        raise Seen

    monkeypatch.setattr(sft, "show_examples", capture)
    with pytest.raises(Seen):
        sft.main(cfg, RunOptions())
    return caught


@pytest.mark.parametrize("tuning", [{"kind": "full"}, {"kind": "lora", "rank": 4}], ids=["full", "lora"])
def test_the_loss_falls_and_the_model_loads_in_transformers(
    config: Any, metrics_of: Any, tiny: Any, tuning: Any, demonstrations_file: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cfg = config(epochs=6, lr=1e-2, tuning=tuning, eval_dataset={"path": demonstrations_file})
    result = sft.main(cfg, RunOptions())
    losses = [line["loss/train"] for line in metrics_of(cfg.run_dir) if "loss/train" in line]
    assert len(losses) == 18  # 12 rows, 4 a step, 6 epochs
    assert losses[-1] < losses[0] - 0.5
    held_out = [line["loss/eval"] for line in metrics_of(cfg.run_dir) if "loss/eval" in line]
    assert len(held_out) == 6
    assert held_out[-1] < held_out[0]
    assert result.summary["steps"] == 18
    final = Path(result.outputs["model"])
    AutoModelForCausalLM.from_pretrained(final)
    assert AutoTokenizer.from_pretrained(final).chat_template == tiny.tokenizer.chat_template
    start, end = load_file(Path(tiny.path) / "model.safetensors"), load_file(final / "model.safetensors")
    assert start.keys() == end.keys()
    assert any(not torch.equal(start[name], end[name]) for name in start)


def test_only_the_answer_and_its_eos_are_trained(config: Any, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SFT trains is what sampling and the reward model call a response, token by token."""
    cfg = config()
    rows = [json.loads(line) for line in Path(cfg.dataset.path).read_text().splitlines()]
    for row, (tokens, trained) in zip(rows[:2], shown(cfg, monkeypatch), strict=True):
        prompt = prompt_tokens(tiny.tokenizer, row["prompt"], chat=True)
        answer = response_tokens(tiny.tokenizer, row["completion"], finished=True)
        assert tokens == prompt + answer
        assert trained == [False] * len(prompt) + [True] * len(answer)


@pytest.mark.model
def test_nothing_after_the_eos_is_trained_with_the_real_template(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2's template writes a line break after <|im_end|>; no stage but SFT would ever see it."""
    tokenizer = load_tokenizer(bundled.NAME)
    monkeypatch.setattr(sft, "load_tokenizer", lambda name: tokenizer)
    for tokens, trained in shown(config(), monkeypatch):
        answer = [token for token, t in zip(tokens, trained, strict=True) if t]
        assert answer.index(tokenizer.eos_token_id) == len(answer) - 1


def test_without_completion_only_everything_is_trained(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(all(trained) for _, trained in shown(config(completion_only_loss=False), monkeypatch))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (
            {"learning_rat": 1e-3},
            "trainer.learning_rat: unknown to trl.SFTConfig; did you mean 'learning_rate'?",
        ),
        ({"learning_rate": 1e-3}, "trainer.learning_rate is set by our own keys"),
        ({"output_dir": "x"}, "trainer.output_dir is set by our own keys"),
        ({"max_grad_norm": "abc"}, "trainer.max_grad_norm: 'abc' is not a number"),
        ({"eval_strategy": "epoch"}, "trl.SFTTrainer refuses it"),
    ],
)
def test_keys_for_trl_are_checked(config: Any, trainer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        sft.main(config(trainer=trainer), RunOptions())


def test_a_value_that_trl_refuses_is_a_configuration_error(config: Any) -> None:
    with pytest.raises(ConfigError, match="lr_scheduler_type"):
        sft.main(config(trainer={"lr_scheduler_type": "sideways"}), RunOptions())


def test_keys_for_trl_arrive(config: Any) -> None:
    assert sft.main(config(trainer={"max_steps": 2}), RunOptions()).summary["steps"] == 2


def test_a_prompt_that_leaves_no_room_is_named(config: Any, jsonl: Any) -> None:
    path = jsonl("long.jsonl", [{"prompt": "why", "completion": "so"}, {"prompt": "why " * 80, "completion": "so"}])
    with pytest.raises(DataError, match=r"long\.jsonl:2: the prompt has 87 tokens, max_length is 64"):
        sft.main(config(dataset={"path": path}), RunOptions())


def test_a_cut_demonstration_is_said_aloud(config: Any, jsonl: Any, capsys: Any) -> None:
    """Without its EOS it teaches the policy never to stop."""
    rows = [{"prompt": "why", "completion": "so"}, {"prompt": "why", "completion": "so " * 80}]
    sft.main(config(dataset={"path": jsonl("long.jsonl", rows)}), RunOptions())
    assert "1 of 2 demonstrations are cut at max_length and teach no EOS" in " ".join(capsys.readouterr().out.split())


def test_lora_leaves_its_adapter_and_names_modules_that_are_not_there(config: Any, tiny: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = sft.main(config(tuning={"kind": "lora", "rank": 4}, lr=1e-2), RunOptions())
    adapter = Path(result.outputs["model"]).with_name("adapter")
    tokens = torch.tensor([[2, 9, 12, 15]])
    with torch.no_grad():
        folded = AutoModelForCausalLM.from_pretrained(result.outputs["model"])(tokens).logits
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.path), adapter)(tokens).logits
    torch.testing.assert_close(adapted, folded, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="target_modules"):
        sft.main(config(tuning={"kind": "lora", "target_modules": ["nosuch"]}), RunOptions())


def test_with_layers_the_top_ones_and_the_norm_change_alone(config: Any, tiny: Any) -> None:
    result = sft.main(config(tuning={"kind": "full", "layers": 1}, lr=1e-2), RunOptions())
    start = load_file(Path(tiny.path) / "model.safetensors")
    end = load_file(Path(result.outputs["model"]) / "model.safetensors")
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed == {name for name in start if "layers.1." in name or name == "model.norm.weight"}
