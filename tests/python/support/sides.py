"""Two contexts with the same history. Sequences of one are moved by kvferry, those of the other by
llama.cpp's own calls."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from support import c_interface
from support.llama_reference import Context

OWN, SPARE, OTHER = 0, 1, 2
"""The sequence that is moved, one that operations may remove, and one that they use."""

SEQUENCES = range(4)


class Side:
    """A context, whose sequences llama.cpp's own calls save and load."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def save(self, seq: int) -> bytes:
        return self.context.state_get(seq)

    def load(self, seq: int, state: bytes) -> None:
        assert self.context.state_set(seq, state) == len(state)

    def remove(self, seq: int) -> None:
        self.context.seq_rm(seq)


class Ferried(Side):
    """A context whose sequences kvferry saves and loads."""

    def __init__(self, context: Context, attachment: c_interface.Attachment) -> None:
        super().__init__(context)
        self.attachment = attachment

    def save(self, seq: int) -> bytes:
        buffer = ctypes.create_string_buffer(self.attachment.size(seq))
        assert self.attachment.save(seq, buffer, priority=1).wait() == "KVF_OK"
        return buffer.raw

    def load(self, seq: int, state: bytes) -> None:
        buffer = ctypes.create_string_buffer(state, len(state))
        assert self.attachment.load(seq, buffer, priority=1).wait() == "KVF_OK"

    def remove(self, seq: int) -> None:
        self.attachment.remove(seq)


Operation = Callable[[Side], Any]


def live_alike(*contexts: Context) -> None:
    """Gives contexts the same history.

    In a unified cache SPARE has the first cells, OWN the next ones, and OTHER and a fourth sequence
    alternate in the cells after that. All sequences but SPARE are longer than a sliding window. OWN
    has the second recurrent cell, between SPARE and OTHER.
    """
    for context in contexts:
        context.decode(SPARE, context.model.prompt(8, seed=13))
        context.decode(OWN, context.model.prompt(40, seed=12))
        context.decode_in_turn([OTHER, 3], 40)
