"""The conversations that were kept last, to see where a new prompt leaves them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

Tokens = NDArray[numpy.int32]

_MOST = 64
"""Conversations that are remembered: a comparison with all of them takes well under 1 ms, and at
8,192 tokens each they take 2 MiB."""


def shared_length(first: Tokens, second: Tokens) -> int:
    """How many tokens two conversations have in common from the beginning on."""
    length = min(len(first), len(second))
    different = numpy.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


class RecentTokens:
    """The tokens of the latest conversations."""

    def __init__(self) -> None:
        self._latest: deque[Tokens] = deque(maxlen=_MOST)

    def add(self, tokens: Tokens) -> None:
        """Remembers a conversation, in place of those that it continues."""
        others = [each for each in self._latest if shared_length(each, tokens) < len(each)]
        self._latest.clear()
        self._latest.extend([*others, tokens])

    def fork(self, tokens: Sequence[int]) -> int:
        """How many of the first tokens are also those of a conversation that goes on otherwise."""
        wanted = numpy.asarray(tokens, numpy.int32)
        shared = [(shared_length(each, wanted), len(each)) for each in self._latest]
        return max((count for count, length in shared if count < length), default=0)
