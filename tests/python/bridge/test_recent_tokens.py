"""Where a prompt leaves the conversations that were kept before."""

from __future__ import annotations

import numpy as np
from kvferry._bridge.recent_tokens import RecentTokens, Tokens


def tokens(*values: int) -> Tokens:
    return np.array(values, np.int32)


def test_the_longest_shared_beginning_counts() -> None:
    recent = RecentTokens()
    assert recent.shared([1, 2, 3]) == 0
    recent.add(tokens(1, 2, 9))
    recent.add(tokens(1, 8))
    assert recent.shared([1, 2, 3]) == 2
    assert recent.shared([1, 2, 9, 9]) == 3
    assert recent.shared([1]) == 1
    assert recent.shared([7]) == 0


def test_a_conversation_takes_the_place_of_its_beginning() -> None:
    recent = RecentTokens()
    for length in range(1, 200):
        recent.add(np.arange(length, dtype=np.int32))
        recent.add(tokens(1000))
    for other in range(62):
        recent.add(tokens(2000 + other))
    assert recent.shared(range(500)) == 199


def test_the_oldest_conversation_is_forgotten() -> None:
    recent = RecentTokens()
    for value in range(65):
        recent.add(tokens(value, 1, 2))
    assert recent.shared([0, 1, 2]) == 0
    assert recent.shared([1, 1, 2]) == 3
