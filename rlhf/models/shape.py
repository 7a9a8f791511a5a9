"""The shape of a model, for counting its work: read from its modules, or from its configuration alone."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from rlhf.errors import ModelError
from rlhf.functional.flops import Shape
from rlhf.functional.memory import Dimensions
from rlhf.models.load import load_config
from rlhf.models.tuning import backbone_of, layers_of


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
    return shape_of(_without_weights(load_config(name), scalar=scalar))


def dimensions_of(config: Any, *, scalar: bool = False) -> Dimensions:
    """Of a configuration of transformers; arguments and errors as `shape_from_config`."""
    model = _without_weights(config, scalar=scalar)
    shape, config, backbone = shape_of(model), model.config, backbone_of(model)
    head = model.get_output_embeddings() or model.score
    embedding = backbone.get_input_embeddings().weight
    layer = sum(p.numel() for p in layers_of(backbone)[0].parameters())
    outputs = 0 if head.weight is embedding else sum(p.numel() for p in head.parameters())
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return Dimensions(
        shape=shape,
        hidden=config.hidden_size,
        heads=heads,
        key_width=shape.query_width // heads * key_heads,
        mlp_width=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        layer_parameters=layer,
        embedding=embedding.numel(),
        outputs=outputs,
        further=sum(p.numel() for p in model.parameters()) - shape.layers * layer - embedding.numel() - outputs,
        vocabulary=head.weight.shape[0],
    )


def _without_weights(config: Any, *, scalar: bool) -> Any:
    """The model's modules on a device that holds nothing."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if scalar:
        config.num_labels = 1
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (AutoModelForSequenceClassification if scalar else AutoModelForCausalLM).from_config(config)
