"""Preference records as token rows for the reward model: K responses per prompt, EOS included, truncation counted."""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from rlhf.data.records import Records
from rlhf.data.templates import located, prompt_tokens, response_tokens
from rlhf.errors import DataError
from rlhf.types import Ranking, Rating


@dataclass
class RankedTokens:
    """K token rows (prompt + response + EOS) of one prompt, with their ranks (1 best) and win probabilities.

    `ratings`: where the labels are numbers, those of the rows; a row that is trained on is then an item of its own.
    """

    rows: list[list[int]]
    ranks: list[int]
    wins: list[list[float]]
    group: str
    response_lengths: list[int]
    margin: float = 0.0
    gold: list[float] | None = None
    ratings: list[float] | None = None


@dataclass
class TokenizedRankings:
    """The rankings, and how many rows had to be truncated or tokenised again."""

    items: list[RankedTokens]
    truncated: int = 0
    retokenized: int = 0

    def remarks(self, max_length: int) -> list[str]:
        """What a user should know of it."""
        said = []
        if self.truncated:
            said.append(f"{self.truncated} responses longer than {max_length} tokens keep their end")
        if self.retokenized:
            said.append(f"{self.retokenized} responses tokenised anew for this model")
        return said


def tokenize_rankings(
    rankings: Sequence[Ranking], tokenizer: Any, *, chat: bool, max_length: int, truncation: str
) -> TokenizedRankings:
    """Tokens of every response as the policy sampled them, or from the text when they are not known.

    A text that was edited after sampling counts for more than its tokens, which are made anew from it.
    Over-long rows keep their end (the response; the oldest prompt tokens go) or are refused, by `truncation`.

    Raises:
        DataError: a row is longer than `max_length` and `truncation` is "error", or a prompt cannot be tokenised;
            with file and line when `rankings` were read from a file.
    """
    out = TokenizedRankings([])
    vocabulary = len(tokenizer)
    for where, ranking in zip(_places(rankings), rankings, strict=True):
        prompt = located(where, prompt_tokens, tokenizer, ranking.prompt, chat=chat)
        rows, lengths = [], []
        known = ranking.tokens is not None and all(t[: len(prompt)] == prompt for t in ranking.tokens)
        for i, response in enumerate(ranking.responses):
            tokens = ranking.tokens[i] if known and ranking.tokens is not None else None
            if tokens is None or max(tokens) >= vocabulary or not _says(tokenizer, tokens[len(prompt) :], response):
                tokens = prompt + response_tokens(tokenizer, response, finished=True)
                out.retokenized += ranking.tokens is not None
            lengths.append(len(tokens) - len(prompt))
            if len(tokens) > max_length:
                if truncation == "error":
                    raise DataError(
                        f"{where}, response {i + 1}: {len(tokens)} tokens, max_length is {max_length}",
                        fix="raise max_length, or set truncation: keep_end",
                    )
                out.truncated += 1
                tokens = tokens[-max_length:]
            rows.append(tokens)
        wins = ranking.wins or wins_from_ranks(ranking.ranks)
        group = ranking.prompt_id or hashlib.sha1(repr(ranking.prompt).encode()).hexdigest()[:12]
        margin = ranking.margin or 0.0
        out.items.append(RankedTokens(rows, ranking.ranks, wins, group, lengths, margin, ranking.gold_scores))
    return out


def tokenize_ratings(
    ratings: Records[Rating], tokenizer: Any, *, chat: bool, max_length: int, truncation: str
) -> TokenizedRankings:
    """One item per rating; arguments and errors as `tokenize_rankings`."""
    singles = Records(Ranking(r.prompt, [r.response], [1], prompt_id=r.prompt_id) for r in ratings)
    singles.places = ratings.places
    out = tokenize_rankings(singles, tokenizer, chat=chat, max_length=max_length, truncation=truncation)
    for item, rating in zip(out.items, ratings, strict=True):
        item.ratings = [rating.rating]
    return out


def merge_by_prompt(items: Sequence[RankedTokens]) -> list[RankedTokens]:
    """Rated responses, as one item per prompt, ranked by their ratings."""
    merged: dict[str, RankedTokens] = {}
    for item in items:
        into = merged.setdefault(item.group, RankedTokens([], [], [], item.group, [], ratings=[]))
        into.rows += item.rows
        into.response_lengths += item.response_lengths
        into.ratings = [*(into.ratings or []), *(item.ratings or [])]
    for item in merged.values():
        ratings = item.ratings or []
        item.ranks = [1 + sum(other > rating for other in ratings) for rating in ratings]
        item.wins = wins_from_ranks(item.ranks)
    return list(merged.values())


@dataclass(frozen=True)
class RatingScale:
    """Mean and standard deviation of the ratings that a model is trained on: it learns (rating - mean) / std, or its
    first scores would be a whole scale away from what they shall be."""

    mean: float
    std: float

    @classmethod
    def of(cls, items: Sequence[RankedTokens]) -> RatingScale:
        """Of rated items.

        Raises:
            DataError: all ratings are equal.
        """
        ratings = [rating for item in items for rating in item.ratings or []]
        mean = statistics.fmean(ratings)
        std = statistics.pstdev(ratings, mean)
        if std == 0:
            raise DataError(f"all {len(ratings)} ratings are {ratings[0]}", fix="give ratings that differ")
        return cls(mean, std)

    def apply(self, items: Sequence[RankedTokens]) -> None:
        """Put the ratings of `items` on this scale."""
        for item in items:
            item.ratings = [(rating - self.mean) / self.std for rating in item.ratings or []]


def _places(rankings: Sequence[Ranking]) -> list[str]:
    """Where each ranking stands, in the words of an error: "file.jsonl:12", or "ranking 12"."""
    if isinstance(rankings, Records) and rankings.places:
        return rankings.places
    return [f"ranking {number}" for number in range(1, len(rankings) + 1)]


def _says(tokenizer: Any, response: list[int], text: str) -> bool:
    """Whether sampled tokens decode to `text` in the way in which sampling decoded them, EOS left out."""
    ended = response[-1:] == [tokenizer.eos_token_id]
    return tokenizer.decode(response[:-1] if ended else response, skip_special_tokens=True) == text


def wins_from_ranks(ranks: Sequence[int]) -> list[list[float]]:
    """Win probabilities that a hard ranking stands for: 1 above, 0 below, 0.5 tied."""
    return [[0.5 if a == b else float(a < b) for b in ranks] for a in ranks]


def pairs_of(item: RankedTokens) -> list[RankedTokens]:
    """Every untied pair of a ranking as a ranking of two, the preferred one first."""
    pairs = []
    for i, j in combinations(range(len(item.rows)), 2):
        if item.ranks[i] == item.ranks[j]:
            continue
        best, worst = (i, j) if item.ranks[i] < item.ranks[j] else (j, i)
        # The aggregated probability may contradict the overall rank on a close pair; it stays as it was voted.
        p = item.wins[best][worst]
        gold = None if item.gold is None else [item.gold[best], item.gold[worst]]
        lengths = [item.response_lengths[best], item.response_lengths[worst]]
        rows = [item.rows[best], item.rows[worst]]
        pairs.append(RankedTokens(rows, [1, 2], [[0.5, p], [1 - p, 0.5]], item.group, lengths, item.margin, gold))
    return pairs


def split_by_prompt(
    items: Sequence[RankedTokens], fraction: float, seed: int
) -> tuple[list[RankedTokens], list[RankedTokens]]:
    """(train, held-out): all rankings of a prompt on one side, so that nothing leaks.

    Raises:
        DataError: too few prompts to hold any out.
    """
    groups = sorted({item.group for item in items}, key=lambda g: hashlib.sha256(f"{seed}:{g}".encode()).digest())
    held_out = set(groups[: round(fraction * len(groups))])
    if fraction > 0 and (not held_out or len(held_out) == len(groups)):
        raise DataError(
            f"{len(groups)} prompts are too few for heldout_fraction {fraction}", fix="add prompts or an eval_dataset"
        )
    return [i for i in items if i.group not in held_out], [i for i in items if i.group in held_out]


def pad_scores(scores_N: Tensor, items: Sequence[RankedTokens]) -> tuple[Tensor, Tensor]:
    """Flat scores of a batch of rankings as (scores_BK, mask_BK); K the largest of the batch.

    M members' scores, [N, M], become [B, K, M].
    """
    counts = [len(item.rows) for item in items]
    scores_BK = scores_N.new_zeros(len(items), max(counts), *scores_N.shape[1:])
    mask_BK = torch.zeros(len(items), max(counts), dtype=torch.bool, device=scores_N.device)
    for b, part in enumerate(scores_N.split(counts)):
        scores_BK[b, : len(part)] = part
        mask_BK[b, : len(part)] = True
    return scores_BK, mask_BK


def targets(items: Sequence[RankedTokens], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ranks_BK, wins_BKK) of a batch, padded."""
    k = max(len(item.rows) for item in items)
    ranks_BK = torch.ones(len(items), k, dtype=torch.long)
    wins_BKK = torch.full((len(items), k, k), 0.5)
    for b, item in enumerate(items):
        n = len(item.rows)
        ranks_BK[b, :n] = torch.tensor(item.ranks)
        wins_BKK[b, :n, :n] = torch.tensor(item.wins)
    return ranks_BK.to(device), wins_BKK.to(device)
