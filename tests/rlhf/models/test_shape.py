"""Shapes for counting work: from modules and from a configuration alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.errors import ModelError
from rlhf.models.load import load_causal_lm, load_config, load_sequence_classifier
from rlhf.models.shape import dimensions_of, shape_from_config, shape_of


def test_the_tiny_model_by_hand(tiny: Any) -> None:
    """H 32, intermediate 48, 4 heads of 8, 2 of keys: q 32x32, k and v 16x32, o 32x32, and three of 48x32."""
    shape = shape_of(load_causal_lm(tiny.path, dtype=torch.float32))
    assert (shape.layers, shape.query_width) == (2, 32)
    assert shape.layer_weights == 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    assert shape.head_weights == 32 * len(tiny.tokenizer)
    assert sorted(shape.matrices) == sorted([(32, 32)] * 2 + [(16, 32)] * 2 + [(48, 32)] * 2 + [(32, 48)])


def test_a_configuration_says_the_same(tiny: Any) -> None:
    assert shape_from_config(tiny.path) == shape_of(load_causal_lm(tiny.path, dtype=torch.float32))
    scalar = shape_from_config(tiny.reward, scalar=True)
    assert scalar == shape_of(load_sequence_classifier(tiny.reward, dtype=torch.float32))
    assert scalar.head_weights == 32


def test_layers_that_differ_are_refused(tiny: Any) -> None:
    lm = load_causal_lm(tiny.path, dtype=torch.float32)
    lm.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    with pytest.raises(ModelError, match="differ in shape"):
        shape_of(lm)


@pytest.mark.parametrize("tied", [True, False])
def test_dimensions_add_up_to_the_parameters(tiny: Any, tied: bool) -> None:
    config = load_config(tiny.path)
    config.tie_word_embeddings = tied
    dims = dimensions_of(config)
    lm = AutoModelForCausalLM.from_config(config)
    assert dims.parameters == sum(p.numel() for p in lm.parameters())
    assert dims.layer_parameters == sum(p.numel() for p in lm.model.layers[0].parameters())
    assert dims.outputs == (0 if tied else 32 * len(tiny.tokenizer))
    assert (dims.hidden, dims.heads, dims.key_width, dims.mlp_width, dims.further) == (32, 4, 16, 48, 32)
    assert (dims.embedding, dims.vocabulary) == (32 * len(tiny.tokenizer), len(tiny.tokenizer))


def test_dimensions_of_a_scalar_model(tiny: Any) -> None:
    dims = dimensions_of(load_config(tiny.reward), scalar=True)
    classifier = load_sequence_classifier(tiny.reward, dtype=torch.float32)
    assert dims.parameters == sum(p.numel() for p in classifier.parameters())
    assert (dims.outputs, dims.vocabulary) == (32, 1)
