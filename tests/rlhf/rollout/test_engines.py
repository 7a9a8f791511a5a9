"""Engines behind one interface, against each other and the model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlhf.config_schema import SamplingConfig
from rlhf.errors import ConfigError
from rlhf.models.load import load_causal_lm
from rlhf.rollout.engines import NativeEngine, TransformersEngine, engine_for
from rlhf.rollout.generate import GenerationSettings
from rlhf.rollout.vllm import VllmEngine
from rlhf.types import StopReason

PROMPTS = [[2, 9, 12], [2, 30], [2, 14, 15, 16, 17, 18], [40, 7, 8, 9], [2, 5, 6, 7, 8, 9, 10]]
ENGINES = [NativeEngine, TransformersEngine]
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' remarks on its own generation settings


@pytest.fixture(scope="module")
def lm(tiny: Any) -> Any:
    return load_causal_lm(tiny.path, dtype=torch.float32).eval()


def sample(engine: Any, *, seed: int = 0, copies: int = 1, **settings: Any) -> list[Any]:
    given = GenerationSettings(**{"eos_ids": (3,), "max_new_tokens": 12, "batch_size": 6, **settings})
    seeds = range(1000 * seed, 1000 * seed + len(PROMPTS) * copies)
    return engine.generate(PROMPTS, given, seeds=seeds, copies=copies)


def words(tokens: list[int]) -> str:
    return "".join(f"{chr(97 + t // 8)}{chr(97 + t % 8)}" for t in tokens)


def even_only(sampled: list[list[int]], logits_BV: torch.Tensor) -> torch.Tensor:
    logits_BV = logits_BV.clone()
    logits_BV[:, 1::2] = -torch.inf
    return logits_BV


def test_the_likeliest_answers_are_the_same(lm: Any) -> None:
    native, reference = (sample(kind(lm), temperature=1e-4, copies=2) for kind in ENGINES)
    assert [c.tokens for c in native] == [c.tokens for c in reference]
    assert [c.stop for c in native] == [c.stop for c in reference]
    assert len({len(c.tokens) for c in native}) > 1


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("constrain", [None, even_only])
def test_logprobs_and_entropies_are_the_model_s(lm: Any, kind: Any, constrain: Any) -> None:
    drawn = sample(kind(lm), temperature=0.7, copies=3, constrain=constrain, eos_ids=(4, 3))
    for i, c in enumerate(drawn):
        prompt = PROMPTS[i // 3]
        with torch.no_grad():
            logits_TV = lm(torch.tensor([[*prompt, *c.tokens]])).logits[0, len(prompt) - 1 : -1] / 0.7
        if constrain:
            logits_TV = constrain([], logits_TV)
        exact = torch.distributions.Categorical(logits=logits_TV)
        torch.testing.assert_close(torch.tensor(c.logprobs), exact.log_prob(torch.tensor(c.tokens)), atol=1e-4, rtol=0)
        entropies = -(exact.probs * exact.probs.clamp(min=1e-30).log()).sum(1)
        torch.testing.assert_close(torch.tensor(c.entropies), entropies, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ENGINES)
def test_answers_end_at_eos_stop_strings_or_the_budget(lm: Any, kind: Any) -> None:
    drawn = sample(kind(lm), copies=12, stop=("cb", "da"), decode=words)
    assert {c.stop for c in drawn} == set(StopReason)
    for c in drawn:
        stopped = [any(s in words(c.tokens[: n + 1]) for s in ("cb", "da")) for n in range(len(c.tokens))]
        assert not any(stopped[:-1])
        assert (c.stop is StopReason.EOS) == (c.tokens[-1] == 3)
        assert (c.stop is StopReason.STOP) == (stopped[-1] and c.tokens[-1] != 3)
        assert c.stop is not StopReason.LENGTH or len(c.tokens) == 12
        assert 3 not in c.tokens[:-1]


@pytest.mark.parametrize("kind", ENGINES)
def test_the_seeds_are_the_only_source_of_chance(lm: Any, kind: Any) -> None:
    torch.manual_seed(1)
    one, state = sample(kind(lm), seed=4), torch.get_rng_state()
    torch.manual_seed(2)
    assert [c.tokens for c in sample(kind(lm), seed=4)] == [c.tokens for c in one]
    assert [c.tokens for c in sample(kind(lm), seed=5)] != [c.tokens for c in one]
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left as it was"


@pytest.mark.parametrize("kind", ENGINES)
def test_on_tokens_counts_every_new_token(lm: Any, kind: Any) -> None:
    seen: list[int] = []
    settings = GenerationSettings((3,), 9, batch_size=4)
    drawn = kind(lm).generate(PROMPTS, settings, seeds=range(len(PROMPTS)), on_tokens=seen.append)
    assert sum(seen) == sum(len(c.tokens) for c in drawn)


def test_the_configuration_chooses(lm: Any) -> None:
    url = "http://localhost:1"
    assert isinstance(engine_for(SamplingConfig(), lm, "m"), NativeEngine)
    assert isinstance(engine_for(SamplingConfig(engine="transformers"), lm, "m"), TransformersEngine)
    for server in (url, {"m": url, "other": "http://localhost:2"}):
        engine = engine_for(SamplingConfig(engine="vllm", server=server), lm, "m")
        assert isinstance(engine, VllmEngine)
        assert (engine._server.url, engine._model, engine.context) == (url, "m", lm.config.max_position_embeddings)


@pytest.mark.parametrize(
    ("stage", "sampling", "message"),
    [
        ("sample", {"engine": "vllm"}, "engine vllm needs a server"),
        ("sample", {"server": "http://localhost:1"}, "engine native uses no server"),
        ("sample", {"engine": "vllm", "server": {"other": "http://localhost:1"}}, "has no URL for"),
        ("sample", {"stop": [""]}, "at least 1 character"),
        ("ppo", {"engine": "vllm", "server": "http://localhost:1"}, "serves fixed weights"),
    ],
)
def test_configurations_that_cannot_work(stage_config: Any, stage: str, sampling: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_config(stage, sampling=sampling)
