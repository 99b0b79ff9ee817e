"""Histories of sequence 0, each of which puts its cells elsewhere in a cache.

Sequences 4 and 5 stay empty, so that tests can load and copy into them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvferry.tools.synthetic import GEOMETRIES

from support.abilities import Abilities
from support.like_contexts import CACHES
from support.llama_reference import Context

SEQ = 0
TARGET, SPARE = 4, 5
SEQUENCES = 6

WINDOW = GEOMETRIES["small"].window


def options(cache: str) -> dict[str, Any]:
    """Returns the options of a context for histories."""
    chosen = {"n_ctx": 512, "n_seq_max": SEQUENCES, "n_ubatch": 64} | CACHES[cache]
    if "streams" in cache:
        chosen["n_ctx"] = 256 * SEQUENCES
    return chosen


def contiguous(context: Context) -> None:
    """Longer than a sliding window, so that a part of it has been masked."""
    context.decode(SEQ, context.model.prompt(2 * WINDOW + 5))


def in_turn(context: Context) -> None:
    context.decode_in_turn([0, 1, 3], 45)


def at_random(context: Context) -> None:
    context.decode_at_random([0, 1, 3], 45)


def reused(context: Context) -> None:
    """Later tokens are in earlier cells, where another sequence was removed."""
    context.decode(1, context.model.prompt(12, seed=1))
    context.decode_in_turn([0, 3], 30)
    context.seq_rm(1)
    # llama.cpp looks for cells behind the last ones that it gave, so fill what is left.
    context.decode(2, context.model.prompt(20, seed=2))
    context.seq_rm(3)
    for seed in range(3):
        context.decode(SEQ, context.model.prompt(10, seed=seed))


def removed(context: Context) -> None:
    """Positions are missing in the middle, and the end has been decoded anew."""
    context.decode_in_turn([0, 1], 40)
    context.seq_rm(SEQ, 20, 24)
    context.seq_rm(SEQ, 30, -1)
    context.decode_in_turn([0, 2], 25, seed=7)


def shifted(context: Context) -> None:
    """A shift that a decode has applied."""
    context.decode_in_turn([0, 1], 40)
    context.seq_rm(SEQ, 0, 9)
    context.seq_add(SEQ, 9, -1, -9)
    context.decode_in_turn([0, 1], 25, seed=7)


def shared(context: Context) -> None:
    """Sequences that began alike share cells, where the cache is unified."""
    context.decode_in_turn([0, 1], 40)
    context.seq_cp(SEQ, 2)
    context.seq_rm(3)
    context.seq_cp(1, 3)
    context.decode_in_turn([0, 2, 3], 25, seed=7)


HISTORIES: dict[str, Callable[[Context], None]] = {
    each.__name__: each
    for each in (contiguous, in_turn, at_random, reused, removed, shifted, shared)
}


def can(history: str, kind: str, cache: str) -> bool:
    """Whether llama.cpp can do this history with a kind of model and cache."""
    abilities = Abilities.of(kind, cache)
    if history == "shifted":
        return abilities.shifts
    return history != "removed" or not abilities.recurs
