"""Steps of fixed shape, with the capture replaced by plain calls where there is no GPU."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from rlhf.models.load import load_causal_lm
from rlhf.rollout import cuda_graph, decode
from rlhf.rollout.cuda_graph import GraphDecoder, columns_bucket, rows_bucket
from rlhf.rollout.generate import GenerationSettings, generate

PROMPTS = [[2, 5 + i, 9, *range(10, 10 + i % 5)] for i in range(14)] + [[*range(4, 40)]]


@pytest.fixture(scope="module")
def lm(tiny: Any) -> Any:
    return load_causal_lm(tiny.path, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "_LEAST_ROWS", 2)
    monkeypatch.setattr(cuda_graph, "_COLUMNS", 8)


class Notes(dict[tuple[int, ...], torch.Tensor]):
    """A tap: row -> states."""

    depth = 1

    def remember(self, tokens: list[int], states_TH: torch.Tensor) -> None:
        self[tuple(tokens)] = states_TH


def sample(lm: Any, tap: Notes | None = None) -> list[Any]:
    settings = GenerationSettings((3,), 20, batch_size=6)
    return generate(lm, PROMPTS, settings, seeds=range(2 * len(PROMPTS)), copies=2, tap=tap)


class Plain:
    """Runs the function once, as a capture does, and at every replay."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Any) -> Any:
        self.captures += 1
        run()

        def replay() -> torch.Tensor:
            self.replays += 1
            return run()

        return replay


def test_fixed_shapes_give_the_same_answers(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fill buckets, hidden columns and runs for a capture change nothing."""
    plain = sample(lm, of_plain := Notes())
    capture = Plain()
    monkeypatch.setattr(decode, "LlamaDecoder", lambda *args, **keys: GraphDecoder(*args, **keys, capture=capture))
    fixed = sample(lm, of_fixed := Notes())
    assert [c.tokens for c in fixed] == [c.tokens for c in plain]
    for one, two in zip(fixed, plain, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)
    assert of_plain.keys() == of_fixed.keys()
    for row, states_TH in of_plain.items():
        torch.testing.assert_close(of_fixed[row], states_TH, atol=1e-5, rtol=1e-4)
    assert capture.replays > 3 * capture.captures > 0


@torch.no_grad()
def test_every_step_of_one_shape_replays_one_capture(lm: Any) -> None:
    capture = Plain()
    decoder = GraphDecoder(lm, 3, 4, capture=capture)
    decoder.admit([[2, 9], [4]], 1)
    for _ in range(3):
        decoder.step(torch.tensor([5, 6]))
    decoder.keep(torch.tensor([1]))
    decoder.step(torch.tensor([5]))
    assert (capture.captures, capture.replays) == (1, 4), "two rows or one, up to eight columns"


@torch.no_grad()
def test_a_wider_cache_is_captured_anew(lm: Any) -> None:
    """A graph goes on reading the memory that it saw: after a move it must not be replayed."""
    capture = Plain()
    decoder = GraphDecoder(lm, 1, 4, capture=capture)
    for prompt, captures in (([2, 9], 1), ([4], 1), ([*range(4, 24)], 2), ([2, 9], 3)):
        decoder.admit([prompt], 1)
        decoder.step(torch.tensor([5]))
        decoder.keep(torch.zeros(0, dtype=torch.long))
        assert capture.captures == captures, prompt


@torch.no_grad()
def test_a_failed_capture_is_said_once_and_decoding_goes_on(lm: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fail(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    decoders = [GraphDecoder(lm, 2, 4, capture=fail), decode.LlamaDecoder(lm, 2, 4)]
    with caplog.at_level(logging.WARNING):
        logits = [
            [d.admit([[2, 9], [4]], 1), d.step(torch.tensor([5, 6])), d.step(torch.tensor([7, 8]))] for d in decoders
        ]
    for one, two in zip(*logits, strict=True):
        torch.testing.assert_close(one, two)
    assert [r.getMessage() for r in caplog.records] == [
        "no CUDA graph (operation not permitted when stream is capturing); decoding goes on without"
    ]


def test_buckets() -> None:
    assert [rows_bucket(n) for n in (1, 2, 3, 4, 5, 33)] == [2, 2, 4, 4, 8, 64]
    assert [columns_bucket(n) for n in (1, 8, 9, 24)] == [8, 8, 16, 24]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_is_the_plain_one_on_a_gpu(tiny: Any) -> None:
    lm = load_causal_lm(tiny.path, dtype=torch.float32).eval().cuda()
    with torch.no_grad():
        graph, plain = decode.decoder_for(lm, 4, 8), decode.LlamaDecoder(lm, 4, 8)
        assert isinstance(graph, GraphDecoder)
        torch.testing.assert_close(graph.admit([[2, 9], [4]], 2), plain.admit([[2, 9], [4]], 2))
        for n in range(8):
            tokens_B = torch.arange(4, device="cuda") + n
            torch.testing.assert_close(graph.step(tokens_B), plain.step(tokens_B), atol=1e-4, rtol=1e-4)
        assert graph._steps, "it was captured"
