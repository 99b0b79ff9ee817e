"""Whether a restore is faster than evaluating the tokens again."""

from __future__ import annotations

import math
from collections import Counter

_SEEN_ENOUGH = 3
"""How many restores are always made: the first ones also allocate memory, and find cold disks."""


class RestoreSpeeds:
    """The speeds of restores and of evaluating tokens, as they were seen.

    The best speed of each counts, because other work of the machine may have slowed the others
    down. A tier with too few restores counts as fast, so that it is tried.
    """

    def __init__(self) -> None:
        self._seconds_a_token = math.inf
        self._seconds_a_byte: dict[str, float] = {}
        self._restores: Counter[str] = Counter()

    def evaluated(self, tokens: int, seconds: float) -> None:
        if tokens > 0 and seconds > 0:
            self._seconds_a_token = min(self._seconds_a_token, seconds / tokens)

    def restored(self, tier: str, nbytes: int, seconds: float) -> None:
        self._restores[tier] += 1
        speed = seconds / max(1, nbytes)
        self._seconds_a_byte[tier] = min(self._seconds_a_byte.get(tier, math.inf), speed)

    def is_worth(self, tier: str, nbytes: int, tokens: int) -> bool:
        """Whether a restore of these bytes takes less time than evaluating these tokens."""
        if self._restores[tier] < _SEEN_ENOUGH:
            return True
        return nbytes * self._seconds_a_byte[tier] <= tokens * self._seconds_a_token
