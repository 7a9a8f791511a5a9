"""How much a policy repeats itself. A policy that collapses onto a few answers shows here first.

Both measures are shares of a whole corpus and depend on its size: compare only corpora of the same prompts,
the same number of answers and similar length. Pure Python; no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


def words(text: str) -> list[str]:
    """Lower-cased word tokens; an inner apostrophe belongs to its word (`don't` is one token)."""
    return _WORD.findall(text.lower())


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Unique n-grams over all n-grams of the corpus, in [0, 1]; n-grams do not cross texts.

        distinct_n = |set of n-grams| / |n-grams|

    Length-sensitive: by Heaps' law the vocabulary grows slower than the text, so longer or more answers lower
    the value even when nothing repeats more. Read it beside the answer length, as a ratio to another policy.

    Returns:
        The share; 0 when no text holds `n` words (there is no diversity to speak of).

    Raises:
        ValueError: `n` is below 1.

    Source: Li et al. 2016, arXiv:1510.03055, section 5.
    """
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has at least one word")
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        for gram in _ngrams(words(text), n):
            seen.add(gram)
            total += 1
    return len(seen) / total if total else 0.0


def duplicate_share(texts: Sequence[str]) -> float:
    """Share of texts that repeat an earlier one: `1 - unique / all`, in [0, 1). Case and spacing are equal.

    Given the answers to one prompt it measures collapse on that prompt; given a corpus, stock answers.
    Without texts it is 0.
    """
    if not texts:
        return 0.0
    unique = {" ".join(text.lower().split()) for text in texts}
    return 1.0 - len(unique) / len(texts)


def _ngrams(tokens: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(tokens[i:] for i in range(n)), strict=False)
