"""Sampling from a causal language model: batched, KV-cached, log-probabilities taken while sampling.

A prompt is read once for all of its completions, and what all prompts begin with once for all of them. Finished rows
leave and the next prompts take their places (continuous batching). A token is drawn by inverting the cumulative
distribution: `torch.multinomial` over 49,152 entries is an order of magnitude slower. What runs the model, one token at
a time, is in `decode.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.errors import DataError
from rlhf.rollout.decode import decoder_for, shared_prefix
from rlhf.rollout.stops import StopStrings
from rlhf.types import StopReason

_BLOCK = 128
"""Vocabulary entries whose weights are added up before the draw."""
_LEAVE_ROWS, _LEAVE_SHARE = 8, 4
"""Finished rows leave once there are 8, or a quarter of all: products take multiples of 8 rows in less time."""
_JOIN_SHARE = 5
"""Prompts join once this part of the places is free: reading a few at a time costs more than a few idle places."""


class Tap(Protocol):
    """Whoever wants the hidden states of what is sampled: they are on their way through the model anyway."""

    depth: int
    """The states that go into this layer."""

    def remember(self, tokens: Sequence[int], states_TH: Tensor) -> None:
        """The states of a finished row: the prompt's and all sampled tokens'."""
        ...


Constraint = Callable[[list[list[int]], Tensor], Tensor]
"""(tokens sampled so far, per row; logits [B, V]) -> logits [B, V] with forbidden tokens at -inf."""
_FORBIDDEN = -1e9
"""In place of -inf: as improbable, but times 0 it is 0."""


@dataclass
class Completion:
    """Sampled tokens (a sampled EOS included), their log-probabilities, and the entropy of each draw, in nats.

    `entropies` is empty where the engine does not know them.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop: StopReason = StopReason.LENGTH
    entropies: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class GenerationSettings:
    """How to sample; `eos_ids` end an answer, `max_new_tokens` is the budget, `batch_size` rows are decoded together.

    `stop` are strings that end an answer; `decode`, which they need, makes text of tokens.

    `constrain` forbids tokens. Log-probabilities and entropies are then those of the constrained distribution; who
    scores the tokens again must apply the same constraint. PPO does not, so it offers none: its first ratio would
    not be 1.
    """

    eos_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0
    batch_size: int = 32
    stop: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] | None = None
    constrain: Constraint | None = None

    def __post_init__(self) -> None:
        if self.stop and self.decode is None:
            raise ValueError("stop strings need `decode`: text is searched, not tokens")
        if not all(self.stop):
            raise ValueError("an empty stop string would end every answer at once")


def draw(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """One index per row by inverse CDF: the first v with `sum(w[:v + 1]) > u * sum(w)`, u uniform on [0, 1).

    The weights need not add up to 1. First the block that u falls into is found, then the place in it: cumulative
    sums over the whole vocabulary would be passes over memory that the sums of blocks make needless.

    float32 sums of 49,152 terms are off by about 1e-6, which moves a draw with that probability.
    """
    vocabulary = weights_BV.shape[1]
    if vocabulary % _BLOCK:  # padding by nothing would copy
        weights_BV = torch.nn.functional.pad(weights_BV, (0, -vocabulary % _BLOCK))
    blocks_BNW = weights_BV.unflatten(1, (-1, _BLOCK))
    sums_BN = blocks_BNW.sum(2)
    ends_BN = sums_BN.cumsum(1)
    u_B1 = uniform_B[:, None] * ends_BN[:, -1:]
    block_B1 = _first_beyond(ends_BN, u_B1, sums_BN)
    inner_BW = blocks_BNW.gather(1, block_B1[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1)
    before_B1 = (ends_BN - sums_BN).gather(1, block_B1)
    # Rounding may leave u before its block: below 0 the first entry would be taken, whatever its weight.
    rest_B1 = (u_B1 - before_B1).clamp_(min=0.0)
    return (block_B1 * _BLOCK + _first_beyond(inner_BW.cumsum(1), rest_B1, inner_BW)).squeeze(1)


def _first_beyond(ends_BN: Tensor, u_B1: Tensor, weights_BN: Tensor) -> Tensor:
    """First index whose end is above u; where rounding left u at the total, the last index with any weight. [B, 1]"""
    index_B1 = torch.searchsorted(ends_BN, u_B1, right=True)
    if bool((index_B1 >= ends_BN.shape[1]).any()):
        last_B1 = ends_BN.shape[1] - 1 - (weights_BN.flip(1) > 0).int().argmax(1, keepdim=True)
        index_B1 = torch.minimum(index_B1, last_B1)
    return index_B1


def sample_tokens(
    logits_BV: Tensor, temperature: float, uniform_B: Tensor, room_2NV: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens_B, their log-probabilities, the entropies of the distributions) at `temperature`, in nats, in float32.

    Args:
        room_2NV: float32 tables of at least B rows to work in; on a CPU fresh pages for them cost as much as the work.
    """
    scaled_BV = logits_BV if temperature == 1.0 else logits_BV.float() / temperature
    logprobs, probabilities = (None, None) if room_2NV is None else room_2NV[:, : len(logits_BV)]
    logprobs_BV = torch.log_softmax(scaled_BV, 1, dtype=torch.float32, out=logprobs)
    probabilities_BV = torch.exp(logprobs_BV, out=probabilities)
    tokens_B = draw(probabilities_BV, uniform_B)
    chosen_B = logprobs_BV.gather(1, tokens_B[:, None]).squeeze(1)
    return tokens_B, chosen_B, -logprobs_BV.mul_(probabilities_BV).sum(1)  # in place: a table of this size is dear


class Chance:
    """Uniform numbers for the rows that are sampled, each row's from a seed of its own.

    So an answer depends on its prompt and its seed alone, not on who is sampled beside it, in which order rows leave,
    or on how many processes there are (but for rounding in the products of larger or smaller batches).
    """

    def __init__(self, seeds: Sequence[int], budget: int, device: torch.device) -> None:
        self._seeds, self._budget = seeds, budget
        self._table_BT = torch.empty(0, budget, device=device)
        self._next_B = torch.zeros(0, dtype=torch.long, device=device)

    def join(self, answers: Sequence[int]) -> None:
        """Rows behind the others: indices into `seeds`."""
        rows = [torch.rand(self._budget, generator=torch.Generator().manual_seed(self._seeds[i])) for i in answers]
        self._table_BT = torch.cat((self._table_BT, torch.stack(rows).to(self._table_BT.device)))
        self._next_B = torch.cat((self._next_B, self._next_B.new_zeros(len(rows))))

    def draw(self) -> Tensor:
        """The next number of every row, [B]; a row that has ended may stay on and gets its last one again."""
        uniform_B = self._table_BT.gather(1, self._next_B.clamp(max=self._budget - 1)[:, None]).squeeze(1)
        self._next_B += 1
        return uniform_B

    def keep(self, rows: Tensor) -> None:
        """These rows, in this order."""
        self._table_BT, self._next_B = self._table_BT[rows], self._next_B[rows]


@torch.no_grad()
def generate(
    lm: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    seeds: Sequence[int],
    copies: int = 1,
    on_tokens: Callable[[int], None] = lambda n: None,
    tap: Tap | None = None,
) -> list[Completion]:
    """Sample `copies` completions of each prompt; result `[i * copies + k]` is the k-th of prompt i.

    Args:
        lm: a causal language model of transformers, in evaluation mode.
        prompts: token ids, at least one each.
        seeds: one per completion, the only source of its chance (`Chance`).
        on_tokens: told the number of new tokens after every decoding step.
        tap: is given the hidden states of every row, if our own code decodes the model. It changes no draw.
    """
    results = [Completion() for _ in range(len(prompts) * copies)]
    # Prompts of similar length are read together, so that little padding is.
    queue = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    places = max(settings.batch_size, copies)
    decoder = decoder_for(
        lm,
        min(places, len(results)),
        settings.max_new_tokens,
        shared_prefix(prompts),
        tap=tap.depth if tap else None,
    )
    prompt_of = {id(answer): prompts[i // copies] for i, answer in enumerate(results)}
    rows, chance = Rows(settings), Chance(seeds, settings.max_new_tokens, lm.device)
    logits_BV: Tensor | None = None
    room_2NV: Tensor | None = None
    while queue or rows.alive:
        if queue and decoder.can_admit and _worth_joining(places - len(rows), copies, places):
            chosen = [queue.popleft() for _ in range(min(len(queue), (places - len(rows)) // copies))]
            new_BV = decoder.admit([prompts[i] for i in chosen], copies)
            logits_BV = new_BV if logits_BV is None else torch.cat((logits_BV, new_BV))
            joining = [i * copies + k for i in chosen for k in range(copies)]
            rows.join(results[i] for i in joining)
            chance.join(joining)
        assert logits_BV is not None, "there are rows, or a decoder without rows admits some"
        if room_2NV is None or room_2NV.shape[1] < len(logits_BV):
            room_2NV = logits_BV.new_empty(2, len(logits_BV), logits_BV.shape[1], dtype=torch.float32)
        tokens_B, *measured = sample_tokens(rows.constrained(logits_BV), settings.temperature, chance.draw(), room_2NV)
        on_tokens(rows.record(tokens_B, *measured))
        if rows.idle >= min(_LEAVE_ROWS, len(rows) / _LEAVE_SHARE):
            kept = torch.tensor(rows.leave(), dtype=torch.long, device=tokens_B.device)
            decoder.keep(kept)
            chance.keep(kept)
            tokens_B = tokens_B[kept]
        logits_BV = decoder.step(tokens_B) if len(rows) and (queue or rows.alive or tap) else None
        if tap:
            for i, answer in rows.just_ended:
                if (states_TH := decoder.states(i)) is not None:
                    tap.remember([*prompt_of[id(answer)], *answer.tokens], states_TH)
    return results


def _worth_joining(free: int, copies: int, places: int) -> bool:
    return free == places or free >= max(copies, places // _JOIN_SHARE)


class Rows:
    """The answers that are being written, in the order in which the model sees them.

    One that has ended stays for another step, in which its last token is read: a tap wants that token's states.
    """

    def __init__(self, settings: GenerationSettings) -> None:
        self._settings = settings
        self._just_ended: list[int] = []
        self._eos = frozenset(settings.eos_ids)
        self._stops = StopStrings(settings.stop, settings.decode or str)
        self._rows: list[Completion] = []
        self.ended: list[bool] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def alive(self) -> int:
        """Rows that have not ended."""
        return len(self._rows) - sum(self.ended)

    @property
    def idle(self) -> int:
        """Rows that may leave."""
        return sum(self.ended) - len(self._just_ended)

    @property
    def just_ended(self) -> list[tuple[int, Completion]]:
        """(place, answer) of the rows that ended with the last token recorded."""
        return [(i, self._rows[i]) for i in self._just_ended]

    def join(self, rows: Iterable[Completion]) -> None:
        """Rows behind the others."""
        self._rows.extend(rows)
        self.ended.extend([False] * (len(self._rows) - len(self.ended)))

    def constrained(self, logits_BV: Tensor) -> Tensor:
        """The logits after the constraint, if there is one; those of rows that have ended stay.

        Raises:
            DataError: the constraint leaves a row no token.
        """
        if self._settings.constrain is None or not self.alive:
            return logits_BV
        alive = [i for i, ended in enumerate(self.ended) if not ended]
        given_BV = self._settings.constrain([list(self._rows[i].tokens) for i in alive], logits_BV[alive])
        forbidden_BV = given_BV == -torch.inf
        if stuck := forbidden_BV.all(1).nonzero().flatten().tolist():
            raise DataError(
                f"the constraint allows no token after {self._rows[alive[stuck[0]]].tokens}",
                fix="let it allow an EOS token where nothing else can follow",
            )
        logits_BV = logits_BV.clone()
        logits_BV[alive] = given_BV.masked_fill(forbidden_BV, _FORBIDDEN)
        return logits_BV

    def record(self, tokens_B: Tensor, logprobs_B: Tensor, entropies_B: Tensor) -> int:
        """Append to every row that has not ended; how many those were."""
        count = self.alive
        self._just_ended = []
        columns = zip(self._rows, tokens_B.tolist(), logprobs_B.tolist(), entropies_B.tolist(), strict=True)
        for i, (row, token, logprob, entropy) in enumerate(columns):
            if self.ended[i]:
                continue
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.entropies.append(entropy)
            if token in self._eos:
                row.stop = StopReason.EOS
            elif self._stops.ended(row.tokens):
                row.stop = StopReason.STOP
            self.ended[i] = row.stop.finished or len(row.tokens) == self._settings.max_new_tokens
            if self.ended[i]:
                self._just_ended.append(i)
        return count

    def leave(self) -> list[int]:
        """Drop rows that may leave; the last ones take their places. The old indices of those that stay."""
        just_ended = set(self._just_ended)
        idle = [ended and i not in just_ended for i, ended in enumerate(self.ended)]
        staying = [i for i, is_idle in enumerate(idle) if not is_idle]
        movers = iter(reversed(staying))
        kept = [next(movers) if is_idle else i for i, is_idle in enumerate(idle[: len(staying)])]
        self._rows, self.ended = [self._rows[i] for i in kept], [self.ended[i] for i in kept]
        self._just_ended = [place for place, i in enumerate(kept) if i in just_ended]
        return kept
