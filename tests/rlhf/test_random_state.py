"""Random streams go on where they were saved."""

from __future__ import annotations

import json
import random

import numpy as np
import torch

from rlhf.random_state import restore_rng, rng_state


def test_random_states_of_torch_python_and_numpy_come_back() -> None:
    def draw() -> tuple[object, ...]:
        return torch.randn(5).tolist(), random.gauss(0, 1), random.random(), np.random.randn(3).tolist()

    draw()
    tensors, plain = rng_state()
    expected = draw()
    draw()
    restore_rng(tensors, json.loads(json.dumps(plain)))
    assert draw() == expected
