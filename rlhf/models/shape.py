"""The shape of a model, for counting its work: read from its modules, or from its configuration alone."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from rlhf.errors import ModelError
from rlhf.functional.flops import Shape
from rlhf.models.load import load_config


def shape_of(model: Any) -> Shape:
    """Of a language model or a one-label classifier of transformers, without adapters.

    Raises:
        ModelError: its layers cannot be found, or they are not alike.
    """
    backbone = getattr(model, model.base_model_prefix, None)
    layers = [module for name, module in backbone.named_children() if name in ("layers", "h")] if backbone else []
    if len(layers) != 1:
        raise ModelError("the layers of this model cannot be found", fix="use a decoder-only model")
    matrices = [tuple(tuple(p.shape) for p in layer.parameters() if p.dim() == 2) for layer in layers[0]]
    if len(set(matrices)) != 1:
        raise ModelError("the layers of this model differ in shape", fix="use a model whose layers are alike")
    config = model.config
    heads = config.num_attention_heads
    head = model.get_output_embeddings() or model.score
    return Shape(
        layers=len(matrices),
        layer_weights=sum(rows * columns for rows, columns in matrices[0]),
        query_width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        head_weights=head.weight.numel(),
        matrices=matrices[0],
    )


def shape_from_config(name: str, *, scalar: bool = False) -> Shape:
    """As `shape_of`, from the configuration of model `name`: nothing is loaded.

    Args:
        scalar: with one output instead of the vocabulary.

    Raises:
        ModelError: as `shape_of`.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    config = load_config(name)
    if scalar:
        config.num_labels = 1
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = (AutoModelForSequenceClassification if scalar else AutoModelForCausalLM).from_config(config)
    return shape_of(model)
