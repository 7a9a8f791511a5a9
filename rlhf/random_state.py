"""Random states of this process, for stages in which something draws from them: dropout, mostly."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Json = dict[str, Any]


def rng_state() -> tuple[dict[str, Tensor], Json]:
    """The random states of this process: torch on the CPU and its own GPU, Python, numpy when imported."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    plain: Json = {"python": [version, list(words), gauss]}
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = numpy.random.get_state()
        plain["numpy"] = [kind, keys.tolist(), *rest]
    return tensors, plain


def restore_rng(tensors: Mapping[str, Tensor], plain: Json) -> None:
    """Continue the streams that `rng_state` saved; a GPU's state is passed over where there is no GPU."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in plain:
        import numpy

        kind, keys, *rest = plain["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
