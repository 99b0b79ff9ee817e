"""Histories after which a part of sequence 0 is empty, and libllama says that all of it is."""

from __future__ import annotations

from collections.abc import Callable

from support.block_histories import SEQ, SEQUENCES
from support.llama_reference import Context

KEPT = 5
"""Tokens that the sequence still has."""


def lose_cells_to_others(context: Context) -> None:
    """Sequence 2 takes cells of a window that others no longer see."""
    for seed in (2, 3):
        context.decode(2, context.model.prompt(64, seed=seed))


def cut_off_the_end(context: Context) -> None:
    context.decode(SEQ, context.model.prompt(150))
    lose_cells_to_others(context)
    assert context.seq_rm(SEQ, KEPT, -1)


def copy_the_beginning(context: Context) -> None:
    """In a hybrid cache the copy gets the recurrent cell of the whole."""
    context.decode(1, context.model.prompt(150))
    lose_cells_to_others(context)
    context.seq_cp(1, SEQ, 0, KEPT)
    context.seq_rm(1)


def lose_the_recurrent_cell(context: Context) -> None:
    """A copy of nothing takes the recurrent cell away, and leaves the attention cells."""
    context.decode(SEQ, context.model.prompt(KEPT))
    context.seq_cp(4, SEQ, 0, 1)


def lose_the_window(pair: tuple[Context, Context], history: Callable[[Context], None]) -> bytes:
    for context in pair:
        history(context)
        assert context.pos_max(SEQ) == -1
        for seq in (1, 2, 3):
            context.decode(seq, [7])
    return pair[1].state_get(SEQ)


def lose_every_window(pair: tuple[Context, Context], history: Callable[[Context], None]) -> bytes:
    """As `lose_the_window`, where no other sequence has cells."""
    for context in pair:
        history(context)
        for seq in (1, 2, 3):
            context.seq_rm(seq)
        assert all(context.pos_max(seq) == -1 for seq in range(SEQUENCES))
    return pair[1].state_get(SEQ)
