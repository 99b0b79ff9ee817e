"""Where a prompt leaves the conversations that were kept before."""

from __future__ import annotations

import numpy as np
from kvferry._bridge.recent_tokens import RecentTokens, Tokens


def tokens(*values: int) -> Tokens:
    return np.array(values, np.int32)


def test_the_longest_shared_beginning_counts() -> None:
    recent = RecentTokens()
    assert recent.fork([1, 2, 3]) == 0
    recent.add(tokens(1, 2, 9))
    recent.add(tokens(1, 8))
    assert recent.fork([1, 2, 3]) == 2
    assert recent.fork([1, 2]) == 2
    assert recent.fork([1]) == 1
    assert recent.fork([7]) == 0


def test_a_conversation_that_goes_on_leaves_none() -> None:
    recent = RecentTokens()
    recent.add(tokens(1, 2, 3))
    recent.add(tokens(1, 5))
    assert recent.fork([1, 2, 3, 4]) == 1


def test_a_conversation_takes_the_place_of_its_beginning() -> None:
    recent = RecentTokens()
    for length in range(1, 200):
        recent.add(np.arange(length, dtype=np.int32))
        recent.add(tokens(1000))
    for other in range(62):
        recent.add(tokens(2000 + other))
    assert recent.fork([*range(150), 7]) == 150


def test_the_oldest_conversation_is_forgotten() -> None:
    recent = RecentTokens()
    for value in range(65):
        recent.add(tokens(value, 1, 2))
    assert recent.fork([0, 1, 9]) == 0
    assert recent.fork([1, 1, 9]) == 2
