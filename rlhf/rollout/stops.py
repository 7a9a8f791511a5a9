"""Stop strings: an answer ends once its text holds one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_MARGIN = 4
"""Characters read beyond the longest stop string: some tokenizers drop a space in front of what they decode."""


class StopStrings:
    """Looks for stop strings in answers as they grow.

    A stop string can straddle tokens, so text is searched, not tokens. Only the end of an answer is decoded: what
    stands before it was searched when it was the end.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self._strings, self._decode = tuple(strings), decode
        self._reach = max(map(len, strings), default=0) + _MARGIN

    def ended(self, tokens: list[int]) -> bool:
        """Whether the answer holds a stop string that its last token completed."""
        count = self._reach
        while self._strings:
            text = self._decode(tokens[-count:])
            # A token can have no text (special ones) or a part of a character: then more tokens are read.
            if len(text) >= self._reach or count >= len(tokens):
                return any(string in text for string in self._strings)
            count *= 2
        return False


def before_stop(text: str, strings: Sequence[str]) -> str:
    """`text` up to the first stop string in it; all of it where there is none."""
    found = [place for string in strings if (place := text.find(string)) >= 0]
    return text[: min(found)] if found else text
