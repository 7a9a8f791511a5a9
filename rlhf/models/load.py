"""Find and load a model and its tokenizer by short name, local folder or hub id."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rlhf.data.templates import tokenizer_fingerprint
from rlhf.errors import ModelError
from rlhf.models import adapters, bundled
from rlhf.models.tuning import lora_layers, merge_tuning

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
transformers_logging.disable_progress_bar()


def resolve_model(name: str, *, convert: bool = True) -> str:
    """What transformers can load for `name`: our short name, a local folder, or a hub id; of an adapter, its base.

    Raises:
        ModelError: a path that does not exist, or a folder without a model.
    """
    if name == bundled.NAME:
        return bundled.resolve(convert=convert)
    path = Path(name).expanduser()
    if chain := adapters.chain_of(name):
        try:
            return resolve_model(adapters.base_of(chain[-1]), convert=convert)
        except ModelError as error:
            fix = f"correct base_model_name_or_path in {chain[-1] / adapters.CONFIG_FILE}"
            raise ModelError(f"{name} is an adapter: {error.message}", fix=fix) from None
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder {name} holds no model (no config.json)", fix="give the folder that does")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"no model folder {name}", fix="check the path, or run the stage that writes it first")
    return name


def _explained(name: str, error: Exception) -> ModelError:
    first_line = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if Path(name).expanduser().is_dir():
        return ModelError(f"the folder {name} cannot be loaded ({first_line})", fix="write it again, or restore it")
    return ModelError(
        f"model {name!r} is neither a local folder nor loadable from the hub ({first_line})",
        fix=f"check the name and the network, or use `model: {bundled.NAME}` ({bundled.INSTALL})",
    )


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, as shipped. Masks are carried everywhere, so pad == eos is left alone.

    Raises:
        ModelError: it cannot be loaded, or has no EOS token.
    """
    try:
        own = [str(folder) for folder in adapters.chain_of(name) if (folder / "tokenizer_config.json").is_file()]
        tokenizer = AutoTokenizer.from_pretrained(own[0] if own else resolve_model(name))
    except (OSError, ValueError) as error:
        raise _explained(name, error) from None
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {name} has no EOS token", fix="set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(name: str, *, dtype: torch.dtype) -> Any:
    """A causal language model with dropout off (checklist 6: a ratio of 1 on the first minibatch needs that).

    An adapter is folded into its base.

    Raises:
        ModelError: it cannot be loaded, or its logits are not a plain matrix product of the last hidden state.
    """
    lm, _ = _load(AutoModelForCausalLM, name, dtype)
    _check_head(lm, name)
    return lm


@torch.no_grad()
def _check_head(lm: Any, name: str) -> None:
    """Our log-probabilities are those of `head(last hidden state)`: some models scale or cap their logits."""
    head, backbone = lm.get_output_embeddings(), getattr(lm, lm.base_model_prefix, None)
    if head is None or backbone is None:
        raise ModelError(f"{name} has no backbone with a language-model head", fix="use a decoder-only language model")
    tokens_BT = torch.arange(4, device=lm.device)[None] % lm.config.vocab_size
    logits_BTV = lm(input_ids=tokens_BT, use_cache=False).logits.float()
    plain_BTV = head(backbone(input_ids=tokens_BT, use_cache=False).last_hidden_state).float()
    if float((logits_BTV - plain_BTV).abs().max()) > 1e-2 * float(logits_BTV.abs().max()):
        raise ModelError(
            f"{name} transforms its logits after the head, which is not supported", fix="use another model"
        )


def load_config(name: str) -> Any:
    """The model's configuration alone."""
    try:
        return AutoConfig.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as error:
        raise _explained(name, error) from None


def _load(
    auto_class: Any, name: str, dtype: torch.dtype, *, keep_adapter: bool = False, **kwargs: Any
) -> tuple[Any, set[str]]:
    """The model, and the names of weights that its files lack; adapters are folded in, but for one that is kept."""
    if adapter := adapters.adapter_folder(name):
        resolve_model(name)  # for its errors
        model, missing = _load(auto_class, adapters.base_of(adapter), dtype, **kwargs)
        handle = adapters.put_in(model, adapter)
        model = model if keep_adapter else merge_tuning(handle)
        model.name_or_path = model.config._name_or_path = str(adapter)  # an adapter that comes next is over this one
        return model, missing - ({"score.weight"} if adapters.has_score_head(adapter) else set())
    config = load_config(name)
    if getattr(config, "final_logit_softcapping", None):  # near 0 a soft cap is the identity: `_check_head` is blind
        raise ModelError(
            f"{name} transforms its logits after the head, which is not supported", fix="use another model"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} is an encoder-decoder model, which is not supported yet", fix="use a decoder-only model"
        )
    for key in list(config.to_dict()):
        if "dropout" in key and isinstance(getattr(config, key, None), float):
            setattr(config, key, 0.0)
    for key, value in kwargs.items():
        setattr(config, key, value)
    try:
        model, info = auto_class.from_pretrained(
            resolve_model(name), config=config, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _explained(name, error) from None
    if lora_layers(model):  # transformers has found both
        raise ModelError(
            f"the folder {name} holds a model and an adapter", fix="put the adapter into a folder of its own"
        )
    return model, set(info["missing_keys"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' warnings off."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def load_sequence_classifier(
    name: str, *, dtype: torch.dtype, new_head: bool = False, keep_adapter: bool = False
) -> Any:
    """A one-label `AutoModelForSequenceClassification`.

    Args:
        new_head: a language model will do, too; its head is drawn anew, to be trained.
        keep_adapter: an adapter stays one, over weights that may then be shared; else it is folded into its base.

    Raises:
        ModelError: it cannot be loaded, does not have one label, or has no trained head where one is needed.
    """
    from transformers import AutoModelForSequenceClassification

    config = load_config(name)
    is_classifier = any("SequenceClassification" in a for a in (config.architectures or []))
    if is_classifier and config.num_labels != 1:
        raise ModelError(f"{name} has {config.num_labels} labels", fix="use a reward model with one label")
    with _quiet():  # a missing head is either expected or an error below
        model, missing = _load(AutoModelForSequenceClassification, name, dtype, keep_adapter=keep_adapter, num_labels=1)
    if not isinstance(getattr(model, "score", None), torch.nn.Linear):
        raise ModelError(
            f"{name} ({config.model_type}) has no linear `score` head", fix="use a Llama/Qwen/Gemma/Mistral class model"
        )
    if "score.weight" in missing:
        if not new_head:
            raise ModelError(
                f"{name} is no reward model: it has no trained `score` head",
                fix="train one with `rlhf reward`, and give its folder `final` or `adapter`",
            )
        # Stiennon 2020: N(0, 1/sqrt(d+1)); small scores at the start, whatever the width.
        torch.nn.init.normal_(model.score.weight, std=(model.config.hidden_size + 1) ** -0.5)
    return model


def require_same_tokens(name: str, tokenizer: Any, *, role: str) -> None:
    """A model that is given token ids of `tokenizer` means the same by them.

    Raises:
        ModelError: it does not.
    """
    if tokenizer_fingerprint(load_tokenizer(name)) != tokenizer_fingerprint(tokenizer):
        raise ModelError(
            f"the {role} {name} has another tokenizer than the policy: their token ids differ in meaning",
            fix="use models that were trained from the same base model",
        )


def eos_token_ids(lm: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: those of the generation configuration and of the tokenizer."""
    configured = getattr(lm.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
