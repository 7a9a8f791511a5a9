"""Sampling against transformers' own decoding, the exact distribution, and the policy that is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf.errors import DataError
from rlhf.models.load import load_causal_lm
from rlhf.models.policy import Policy
from rlhf.rollout import decode, llama
from rlhf.rollout import generate as generate_module
from rlhf.rollout.buffer import pad_right
from rlhf.rollout.generate import Completion, GenerationSettings, draw, generate
from rlhf.types import StopReason

PROMPTS = [[2, 9, 12], [2, 30], [2, 14, 15, 16, 17, 18], [40, 7, 8, 9], [2, 5, 6, 7, 8, 9, 10]]


@pytest.fixture(scope="module")
def lm(tiny: Any) -> Any:
    return load_causal_lm(tiny.path, dtype=torch.float32).eval()


def sample(lm: Any, prompts: list[list[int]], *, seed: int = 0, copies: int = 1, **settings: Any) -> list[Completion]:
    given = GenerationSettings(**{"eos_ids": (3,), "max_new_tokens": 12, **settings})
    return generate(lm, prompts, given, seeds=seeds_of(seed, len(prompts) * copies), copies=copies)


def seeds_of(seed: int, count: int) -> list[int]:
    return [1000 * seed + i for i in range(count)]


# --- draw -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("u", "index"), [(0.0, 1), (0.2499, 1), (0.25, 2), (0.7499, 2), (0.75, 4), (0.999999, 4)])
def test_draw_inverts_the_cumulative_sum(u: float, index: int) -> None:
    # cumulative: 0, 1/4, 3/4, 3/4, 1, 1: the empty cells 0, 3 and 5 are never drawn
    probabilities = torch.tensor([[0.0, 0.25, 0.5, 0.0, 0.25, 0.0]])
    assert draw(probabilities, torch.tensor([u])).tolist() == [index]


def test_draw_scales_to_a_total_that_is_not_one() -> None:
    probabilities = torch.tensor([[0.2, 0.2, 0.2, 0.2], [2.0, 2.0, 0.0, 1.0]])  # halves: 0.4 of 0.8; 3 of 5
    assert draw(probabilities, torch.tensor([0.5, 0.6])).tolist() == [2, 1]


def test_draw_at_the_total_gives_the_last_index_with_probability() -> None:
    uniform = torch.tensor([1.0, 1.0, 0.0])  # u = total: what rounding can make of 0.99999997
    probabilities = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.3, 0.7], [0.0, 1.0, 0.0, 0.0]])
    assert draw(probabilities, uniform).tolist() == [1, 3, 1]


def test_draw_at_the_edge_of_a_block_gives_no_token_without_weight() -> None:
    """Rounding can put the edge of a block above u, which its predecessor's end says is inside."""
    blocks_NW = torch.rand(400, 128, generator=torch.Generator().manual_seed(0))
    blocks_NW[:, 0] = 0.0
    sums_N = blocks_NW.sum(1)
    ends_N = sums_N.cumsum(0)
    shares_N = ends_N / ends_N[-1]
    hit_N = ((ends_N - sums_N)[1:] > ends_N[:-1]) & (shares_N * ends_N[-1] == ends_N)[:-1]
    edges = hit_N.nonzero().flatten().tolist()
    assert edges, "no such edge among these blocks"
    for edge in edges:
        index = int(draw(blocks_NW.view(1, -1), shares_N[edge : edge + 1]))
        assert index == (edge + 1) * 128 + 1, "the first with weight behind the edge"


def test_draw_has_the_right_frequencies() -> None:
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = draw(torch.tensor([0.05, 0.0, 0.15, 0.5, 0.3]).expand(20_000, 5), uniform)
    first, never, *rest = torch.bincount(drawn, minlength=5).tolist()
    assert never == 0
    assert chisquare([first, *rest], [1_000, 3_000, 10_000, 6_000]).pvalue > 1e-3


# --- generate -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # transformers' remarks on its own generation settings
def test_a_tiny_temperature_is_transformers_greedy_decoding(lm: Any) -> None:
    ours = sample(lm, PROMPTS, temperature=1e-4, batch_size=3)
    for prompt, mine in zip(PROMPTS, ours, strict=True):
        tokens = torch.tensor([prompt])
        mask = torch.ones_like(tokens)
        out = lm.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=0)
        assert mine.tokens == out[0, len(prompt) :].tolist()


def test_the_first_two_tokens_follow_the_exact_distribution(lm: Any) -> None:
    prompt, n, temperature = [2, 9, 12], 6000, 0.7
    drawn = sample(lm, [prompt], copies=n, max_new_tokens=2, temperature=temperature, batch_size=n, seed=1)
    with torch.no_grad():
        first_V = (lm(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        rows = torch.tensor([[*prompt, v] for v in range(len(first_V))])
        second_VV = (lm(rows).logits[:, -1] / temperature).softmax(-1)
    pair_VV = first_V[:, None] * second_VV
    pair_VV[3], pair_VV[3, 0] = 0.0, first_V[3]  # after an EOS comes nothing: one cell
    counts_VV = torch.zeros_like(pair_VV)
    for completion in drawn:
        first, second = completion.tokens if len(completion.tokens) == 2 else (3, 0)
        counts_VV[first, second] += 1
    expected, counts = n * pair_VV.flatten().double(), counts_VV.flatten().double()
    common = expected >= 5  # rarer cells are pooled, as the chi-square needs
    observed = [*counts[common].tolist(), float(counts[~common].sum())]
    wanted = [*expected[common].tolist(), float(expected[~common].sum())]
    assert len(wanted) > 100
    assert chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_taken_while_sampling_are_the_policy_s(lm: Any, temperature: float) -> None:
    drawn = sample(lm, PROMPTS, copies=3, temperature=temperature)
    rows = [[*PROMPTS[i // 3], *c.tokens] for i, c in enumerate(drawn)]
    actions = [[False] * len(PROMPTS[i // 3]) + [True] * len(c.tokens) for i, c in enumerate(drawn)]
    mask_BT = pad_right([[True] * len(row) for row in rows], False, torch.bool)
    action_BT = pad_right(actions, False, torch.bool)
    with torch.no_grad():
        logprobs, _ = Policy(lm)(pad_right(rows, 0, torch.long), mask_BT, action_BT, temperature=temperature)
    taken = torch.tensor([x for c in drawn for x in c.logprobs])
    torch.testing.assert_close(taken, logprobs[action_BT], atol=1e-4, rtol=0)


def test_an_answer_ends_with_its_first_eos_or_at_the_budget(lm: Any) -> None:
    drawn = sample(lm, PROMPTS, copies=20, max_new_tokens=9)
    assert {c.stop for c in drawn} == {StopReason.EOS, StopReason.LENGTH}
    for c in drawn:
        assert len(c.tokens) == len(c.logprobs) <= 9
        if c.stop is StopReason.EOS:
            assert c.tokens.index(3) == len(c.tokens) - 1
        else:
            assert len(c.tokens) == 9
            assert 3 not in c.tokens


def test_an_eos_as_the_last_token_of_the_budget_still_ends_the_answer(lm: Any) -> None:
    drawn = sample(lm, [[2, 9]], copies=60, max_new_tokens=1, batch_size=60)
    assert all((c.stop is StopReason.EOS) == (c.tokens == [3]) for c in drawn)
    assert any(c.tokens == [3] for c in drawn)


def test_each_of_several_eos_ids_ends_an_answer(lm: Any) -> None:
    drawn = sample(lm, PROMPTS, copies=20, eos_ids=(3, 20, 21, 22))
    ends = {c.tokens[-1] for c in drawn if c.stop is StopReason.EOS}
    assert len(ends) > 1
    assert all(not {3, 20, 21, 22} & set(c.tokens[:-1]) for c in drawn)


def test_copies_stand_behind_their_prompt_whatever_the_batches(lm: Any) -> None:
    # at a tiny temperature each prompt has one answer: order and batching cannot change it
    alone = [sample(lm, [p], temperature=1e-4)[0].tokens for p in PROMPTS]
    assert len({tuple(a) for a in alone}) > 1
    for batch_size in (1, 4, 64):
        together = sample(lm, PROMPTS, copies=3, temperature=1e-4, batch_size=batch_size)
        assert [c.tokens for c in together] == [a for a in alone for _ in range(3)]


def test_the_generator_is_the_only_source_of_chance(lm: Any) -> None:
    torch.manual_seed(1)
    one = sample(lm, PROMPTS, seed=4)
    torch.manual_seed(2)
    assert [c.tokens for c in sample(lm, PROMPTS, seed=4)] == [c.tokens for c in one]
    assert [c.tokens for c in sample(lm, PROMPTS, seed=5)] != [c.tokens for c in one]


def test_ragged_prompts_get_the_logprobs_of_their_own_context(lm: Any) -> None:
    """Left padding, the repeated cache and leaving rows must not move a position or show another row's keys."""
    drawn = sample(lm, PROMPTS, copies=4, batch_size=20)
    for i, c in enumerate(drawn):
        tokens = torch.tensor([[*PROMPTS[i // 4], *c.tokens]])
        with torch.no_grad():
            logprobs_TV = lm(tokens).logits[0].log_softmax(-1)
        start = len(PROMPTS[i // 4])
        exact = [float(logprobs_TV[start + j - 1, token]) for j, token in enumerate(c.tokens)]
        assert c.logprobs == pytest.approx(exact, abs=1e-4)


def test_on_tokens_counts_every_new_token(lm: Any) -> None:
    seen: list[int] = []
    drawn = generate(
        lm,
        PROMPTS,
        GenerationSettings((3,), 12),
        seeds=seeds_of(0, len(PROMPTS)),
        on_tokens=seen.append,
    )
    assert sum(seen) == sum(len(c.tokens) for c in drawn)


def test_an_answer_depends_on_its_prompt_and_seed_alone(lm: Any) -> None:
    """Not on its neighbours, on the order, or on how many fit beside it."""
    settings = GenerationSettings((3,), 12, batch_size=4)
    prompts = [[2, *range(5, 6 + i % 7)] for i in range(12)]
    together = generate(lm, prompts, settings, seeds=range(24), copies=2)
    assert len({tuple(c.tokens) for c in together}) > 12
    for i in (11, 3, 7):
        (alone,) = generate(lm, [prompts[i]], settings, seeds=[2 * i + 1])
        assert alone.tokens == together[2 * i + 1].tokens


@pytest.mark.parametrize("kind", ["lean", "transformers"])
def test_places_are_filled_again_while_others_decode(lm: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many prompts through a few places: logprobs of each row's own context, whoever stood in its place before."""
    if kind == "transformers":
        monkeypatch.setattr(decode, "has_llama_shape", lambda lm: False)
    joined: list[int] = []
    monkeypatch.setattr(generate_module.Rows, "join", spied(generate_module.Rows.join, joined))
    prompts = [[2, 5 + i, 9, *range(10, 10 + i % 5)] for i in range(14)]
    drawn = sample(lm, prompts, copies=2, batch_size=6, max_new_tokens=20)
    assert len({len(c.tokens) for c in drawn}) > 4, "answers of different length, or no place is free early"
    # all 28 rows stand in at most 6 places; the lean decoder fills them while others decode
    assert max(joined) <= 6
    assert (len(joined) > 5) == (kind == "lean")
    for i, c in enumerate(drawn):
        prompt = prompts[i // 2]
        with torch.no_grad():
            logprobs_TV = lm(torch.tensor([[*prompt, *c.tokens]])).logits[0].log_softmax(-1)
        exact = [float(logprobs_TV[len(prompt) + j - 1, token]) for j, token in enumerate(c.tokens)]
        assert c.logprobs == pytest.approx(exact, abs=1e-4)
        assert len(c.tokens) == 20 or c.stop is StopReason.EOS


def spied(join: Any, counts: list[int]) -> Any:
    """`join` that notes how many rows came."""

    def noting(self: Any, rows: Any) -> None:
        before = len(self)
        join(self, rows)
        counts.append(len(self) - before)

    return noting


def test_rows_that_leave_are_replaced_by_the_last_ones(lm: Any) -> None:
    rows = generate_module.Rows(GenerationSettings((3,), 9))
    answers = [Completion() for _ in range(6)]
    rows.join(answers)
    assert rows.record(torch.tensor([3, 7, 3, 7, 3, 7]), torch.zeros(6), torch.zeros(6)) == 6
    assert (rows.alive, len(rows), rows.idle) == (3, 6, 0), "their last token has yet to be read"
    assert rows.leave() == [0, 1, 2, 3, 4, 5]
    assert rows.record(torch.tensor([8, 8, 8, 3, 8, 8]), torch.zeros(6), torch.zeros(6)) == 3
    assert (rows.alive, rows.idle) == (2, 3)
    assert rows.just_ended == [(3, answers[3])]
    assert rows.leave() == [5, 1, 3]
    assert rows.just_ended == [(2, answers[3])]
    assert rows.record(torch.tensor([9, 10, 11]), torch.zeros(3), torch.zeros(3)) == 2
    assert [a.tokens for a in answers] == [[3], [7, 8, 10], [3], [7, 3], [3], [7, 8, 9]]


# --- entropies, stop strings, constraints -----------------------------------------------------------------------


def words(tokens: list[int]) -> str:
    """A text of two letters per token: strings can straddle tokens. Token 7 has no text."""
    return "".join(f"{chr(97 + t // 8)}{chr(97 + t % 8)}" for t in tokens if t != 7)


def exact_logprobs(lm: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return lm(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def test_entropies_are_those_of_the_distributions(lm: Any) -> None:
    for i, c in enumerate(sample(lm, PROMPTS, copies=2, temperature=0.7)):
        with torch.no_grad():
            logits_TV = lm(torch.tensor([[*PROMPTS[i // 2], *c.tokens]])).logits[0, len(PROMPTS[i // 2]) - 1 : -1]
        exact = torch.distributions.Categorical(logits=logits_TV / 0.7).entropy()
        torch.testing.assert_close(torch.tensor(c.entropies), exact, atol=1e-4, rtol=0)


def test_a_stop_string_ends_an_answer_where_it_is_complete(lm: Any) -> None:
    plain = sample(lm, PROMPTS, copies=8, max_new_tokens=20, batch_size=40)
    stop = ("cb", "da")  # within a token; or across two: "?d" "a?"
    drawn = sample(lm, PROMPTS, copies=8, max_new_tokens=20, batch_size=40, stop=stop, decode=words)
    stopped = [c for c in drawn if c.stop is StopReason.STOP]
    assert 5 < len(stopped) < len(drawn)
    for c in drawn:
        inside = [n for n in range(1, len(c.tokens) + 1) if any(s in words(c.tokens[:n]) for s in stop)]
        if c.stop is StopReason.STOP:
            assert inside == [len(c.tokens)], "it ends with the token that completes the string"
            assert len(c.logprobs) == len(c.entropies) == len(c.tokens)
        elif c.stop is StopReason.LENGTH:
            assert not inside
    assert any(words(c.tokens[-1:]) not in ("cb", "da") for c in stopped), "one straddles tokens"
    # until the first one leaves, nothing else is drawn than without stop strings
    assert [c.tokens[0] for c in drawn] == [c.tokens[0] for c in plain]


def test_settings_refuse_stop_strings_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="need `decode`"):
        GenerationSettings((3,), 4, stop=("a",))
    with pytest.raises(ValueError, match="empty stop string"):
        GenerationSettings((3,), 4, stop=("",), decode=words)


def test_a_constraint_shapes_the_distribution_and_its_logprobs(lm: Any) -> None:
    """Even tokens after even ones: log-probabilities are those of the allowed tokens, renormalised."""

    def same_parity(sampled: list[list[int]], logits_BV: torch.Tensor) -> torch.Tensor:
        assert len(sampled) == len(logits_BV)
        out_BV = logits_BV.clone()
        for row, tokens in enumerate(sampled):
            out_BV[row, 1 - (tokens[-1] if tokens else 0) % 2 :: 2] = -torch.inf
        return out_BV

    drawn = sample(lm, PROMPTS, copies=6, batch_size=11, constrain=same_parity, eos_ids=(20, 22, 24))
    assert len({len(c.tokens) for c in drawn}) > 2
    for i, c in enumerate(drawn):
        assert not any(token % 2 for token in c.tokens)
        allowed_TV = exact_logprobs(lm, PROMPTS[i // 6], c.tokens)[:, ::2].log_softmax(-1)
        exact = [float(allowed_TV[j, token // 2]) for j, token in enumerate(c.tokens)]
        assert c.logprobs == pytest.approx(exact, abs=1e-4)
        entropy_T = -(allowed_TV.exp() * allowed_TV).sum(1)
        torch.testing.assert_close(torch.tensor(c.entropies), entropy_T, atol=1e-4, rtol=0)


def test_a_constraint_is_asked_about_rows_only(lm: Any) -> None:
    """All rows end at once while others wait."""
    asked: list[int] = []

    def ends_at_once(sampled: list[list[int]], logits_BV: torch.Tensor) -> torch.Tensor:
        asked.append(len(sampled))
        out_BV = torch.full_like(logits_BV, -torch.inf)
        out_BV[:, 3] = 0.0
        return out_BV

    drawn = sample(lm, PROMPTS, batch_size=2, constrain=ends_at_once)
    assert [c.tokens for c in drawn] == [[3]] * 5
    assert asked == [2, 2, 1]


def test_a_constraint_that_allows_nothing_is_an_error(lm: Any) -> None:
    def nothing_after_two(sampled: list[list[int]], logits_BV: torch.Tensor) -> torch.Tensor:
        return logits_BV.masked_fill(torch.tensor([len(t) == 2 for t in sampled])[:, None], -torch.inf)

    with pytest.raises(DataError, match=r"allows no token after \[\d+, \d+\]"):
        sample(lm, PROMPTS, constrain=nothing_after_two)


# --- a common beginning ---------------------------------------------------------------------------------------


def test_reading_a_common_beginning_once_gives_the_same_answers(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More prompts than places, so that rows join those that are there; the first prompt is the second's beginning."""
    prompts = [[2, 5, 6, 7, *range(8, 8 + n)] for n in (1, 4, 2, 9, 3, 1, 5)]
    read: list[int] = []
    whole = decode.LlamaDecoder._read

    def counting(self: Any, tokens_PT: torch.Tensor, write: Any) -> torch.Tensor:
        read.append(tokens_PT.numel())
        return whole(self, tokens_PT, write)

    monkeypatch.setattr(decode.LlamaDecoder, "_read", counting)
    found, counts = [], []
    decode.has_llama_shape(lm)  # it reads, too
    for pays in (10_000, 1):
        monkeypatch.setattr(decode, "_PREFIX_PAYS", pays)
        read.clear()
        found.append(sample(lm, prompts, batch_size=3, copies=2, max_new_tokens=8))
        counts.append(sum(read))
    assert counts[0] - counts[1] >= (len(prompts) - 1) * 4
    assert [c.tokens for c in found[1]] == [c.tokens for c in found[0]]
    for one, two in zip(*found, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)


# --- states taken on the way ----------------------------------------------------------------------------------


class Notes:
    """A tap that keeps everything."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.rows: list[tuple[list[int], torch.Tensor]] = []

    def remember(self, tokens: list[int], states_TH: torch.Tensor) -> None:
        self.rows.append((tokens, states_TH))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("beginning", [[2], [2, 5, 6, 7]], ids=["own prompts", "a common beginning"])
def test_a_tap_gets_the_states_of_every_row(
    lm: Any, depth: int, beginning: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few places, so that rows move and caches grow; some answers fill the whole budget. The draws stay the same."""
    monkeypatch.setattr(decode, "_PREFIX_PAYS", 20)
    prompts = [[*beginning, *range(9, 10 + i % 5)] for i in range(9)]
    settings = GenerationSettings((3,), 16, batch_size=6)
    found = []
    for tap in (None, notes := Notes(depth)):
        found.append(generate(lm, prompts, settings, seeds=seeds_of(0, 18), copies=2, tap=tap))
    assert [c.tokens for c in found[1]] == [c.tokens for c in found[0]]
    assert {c.stop for c in found[0]} == {StopReason.EOS, StopReason.LENGTH}
    rows = [[*prompts[i // 2], *c.tokens] for i, c in enumerate(found[0])]
    assert sorted(tokens for tokens, _ in notes.rows) == sorted(rows)
    for tokens, states_TH in notes.rows:
        with torch.no_grad():
            exact_TH = lm(torch.tensor([tokens]), output_hidden_states=True).hidden_states[depth][0]
        torch.testing.assert_close(states_TH, exact_TH, atol=1e-5, rtol=1e-4)


def test_a_model_of_another_shape_has_no_states_to_give(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "has_llama_shape", lambda lm: False)
    notes = Notes(1)
    answers = generate(lm, PROMPTS, GenerationSettings((3,), 4), seeds=seeds_of(0, len(PROMPTS)), tap=notes)
    assert len(answers) == len(PROMPTS)
    assert notes.rows == []


# --- training afterwards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ["default", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_has_sampled_trains_as_before(dtype: torch.dtype, rope: str) -> None:
    """Also where prompts are longer than the model's rotary embedding was made for, so that it makes new buffers."""
    shape = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8}
    rope_parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    losses: list[list[float]] = []
    for samples in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(**shape, **heads, rope_parameters=rope_parameters)
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
        tokens = torch.tensor([[2, *range(9, 25)]])
        losses.append([])
        for _ in range(3):
            if samples:
                sample(lm, [[2, 5, 6, *range(7, 7 + n)] for n in (1, 20)], max_new_tokens=4)
                assert not any(t.is_inference() for t in (*lm.parameters(), *lm.buffers()))
            loss = lm(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    if rope == "default":  # the dynamic one's frequencies follow the longest text so far
        assert losses[1] == losses[0]
    assert losses[1][2] < losses[1][0]


def test_memory_that_an_earlier_decoder_left_changes_nothing(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken again, and what stood in it is not seen: 0 times NaN would be NaN."""
    monkeypatch.setattr(llama, "_spare", [])
    fresh = sample(lm, PROMPTS, copies=2)
    left = [id(block) for block in llama._spare]
    assert left
    for block in llama._spare:
        block.fill_(float("nan"))
    assert sample(lm, PROMPTS, copies=2) == fresh
    assert sorted(left) == sorted(id(block) for block in llama._spare)
