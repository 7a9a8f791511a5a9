"""Shapes for counting work: from modules and from a configuration alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.errors import ModelError
from rlhf.models.load import load_causal_lm, load_sequence_classifier
from rlhf.models.shape import shape_from_config, shape_of


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
