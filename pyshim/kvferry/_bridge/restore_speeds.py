"""Whether a prefix is worth its restore."""

from __future__ import annotations

import math
from collections import Counter

_SEEN_ENOUGH = 3
"""The first restores also allocate memory, and find cold disks: so many are always tried."""


class RestoreSpeeds:
    """The speeds of restores and of evaluating tokens, as they were seen.

    The best of each counts: a slow one may be due to what else the machine does. What has not been
    seen often enough is taken for fast where it is a restore, so that it is tried.
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
        """Whether so many bytes are there sooner than so many tokens are evaluated."""
        if self._restores[tier] < _SEEN_ENOUGH:
            return True
        return nbytes * self._seconds_a_byte[tier] <= tokens * self._seconds_a_token
