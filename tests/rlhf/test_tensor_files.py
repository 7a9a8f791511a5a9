"""Tensors in pieces of several files are one tensor again, whatever part of it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.errors import CheckpointError
from rlhf.tensor_files import TensorFiles, piece_name, write_tensors

WHOLE = torch.arange(24.0).reshape(4, 6)


@pytest.fixture
def files(tmp_path: Path) -> TensorFiles:
    """`w` in three pieces of two files, out of order; `b` whole; `v` with a hole."""
    flat = WHOLE.flatten()
    first = {piece_name("w", 10): flat[10:17], "b": WHOLE[0], piece_name("v", 0): flat[:3]}
    second = {piece_name("w", 17): flat[17:], piece_name("w", 0): flat[:10], piece_name("v", 5): flat[5:]}
    for name, tensors in (("one", first), ("two", second)):
        write_tensors(tmp_path / f"{name}.safetensors", tensors)
    return TensorFiles(sorted(tmp_path.glob("*.safetensors")))


def test_pieces_are_one_tensor(files: TensorFiles) -> None:
    assert files.names() == {"w", "b", "v"}
    assert torch.equal(files.whole("w"), WHOLE.flatten())
    assert torch.equal(files.whole("b"), WHOLE[0])


@pytest.mark.parametrize("start", [0, 3, 9, 10, 16, 17, 23])
@pytest.mark.parametrize("count", [0, 1, 7, 12, 24])
def test_any_part_of_pieces_and_of_wholes(files: TensorFiles, start: int, count: int) -> None:
    count = min(count, 24 - start)
    assert torch.equal(files.part("w", start, count), WHOLE.flatten()[start : start + count])
    if start + count <= 6:
        assert torch.equal(files.part("b", start, count), WHOLE[0, start : start + count])


@pytest.mark.parametrize(("name", "start", "count"), [("w", 20, 5), ("b", 0, 7), ("v", 0, 4), ("v", 4, 2), ("x", 0, 1)])
def test_what_is_not_there_is_named(files: TensorFiles, name: str, start: int, count: int) -> None:
    with pytest.raises(
        CheckpointError, match=rf"one\.safetensors, two\.safetensors: no '{name}' with elements {start}"
    ):
        files.part(name, start, count)


def test_a_missing_tensor_without_elements_is_missing_too(files: TensorFiles) -> None:
    with pytest.raises(CheckpointError, match="no 'x'"):
        files.whole("x")
