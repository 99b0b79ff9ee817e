"""The tiers of a store, which restores and keeps share."""

from __future__ import annotations

from dataclasses import dataclass

from .away import Away
from .behind import Behind
from .buffers import Buffers
from .counts import Counts
from .ram import Ram


@dataclass(frozen=True)
class Tiers:
    """The tiers of a store, nearest first, and settings of all of them."""

    ram: Ram
    behind: Behind | None
    """The disk."""
    away: Away | None
    """The object store."""
    buffers: Buffers
    """Buffers within the budget of ``ram``."""
    block_tokens: int
    counts: Counts
