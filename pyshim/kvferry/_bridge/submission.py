"""How a transfer is submitted: the words that programs use, and what the C library takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .._native import ffi, lib
from ..errors import ErrorText
from .arguments import choice
from .completions import Completions

if TYPE_CHECKING:
    from .._native import CData

Priority = Literal["background", "urgent"]
"""``background`` is paced, so that decoding beside it hardly notices; ``urgent`` is as fast as the
link, and goes before background transfers. Within a priority the oldest transfer goes first. On a
context's thread an urgent transfer also begins before what ``Llama.run`` was asked to run and has
not begun."""

_PRIORITIES: dict[str, int] = {
    "background": lib.KVF_PRIORITY_BACKGROUND,
    "urgent": lib.KVF_PRIORITY_URGENT,
}

SaveMode = Literal["auto", "in_place", "snapshot"]
"""``in_place`` moves bytes straight from the cache: until the save has ended, the sequence must not
be removed, shifted, divided or copied onto, nor decoded if it is recurrent or sliding-window.
``snapshot`` copies them aside first: the sequence is free as soon as the save has been started.
``auto`` is ``snapshot`` where decoding the sequence would overwrite what is being saved, else
``in_place``."""

_SAVE_MODES: dict[str, int] = {
    "auto": lib.KVF_SAVE_AUTO,
    "in_place": lib.KVF_SAVE_IN_PLACE,
    "snapshot": lib.KVF_SAVE_SNAPSHOT,
}

LoadMode = Literal["auto", "in_place", "ahead"]
"""``ahead`` brings the bytes to device memory of their own while llama.cpp still takes cells.
``auto`` is ``in_place``: straight to the cache."""

_LOAD_MODES: dict[str, int] = {
    "auto": lib.KVF_LOAD_AUTO,
    "in_place": lib.KVF_LOAD_IN_PLACE,
    "ahead": lib.KVF_LOAD_AHEAD,
}


def save_mode(mode: SaveMode) -> int:
    return choice("mode", mode, _SAVE_MODES)


def load_mode(mode: LoadMode) -> int:
    return choice("mode", mode, _LOAD_MODES)


class SubmitOptions:
    """A ``kvf_submit_options`` with room for the error text."""

    def __init__(
        self,
        completions: Completions | None,
        token: int,
        priority: Priority,
        *,
        mode: int = 0,
        flags: int = 0,
        after_stream: int | None = None,
    ) -> None:
        self.text = ErrorText()
        self.options: CData = ffi.new(
            "kvf_submit_options *",
            {
                "size": ffi.sizeof("kvf_submit_options"),
                "priority": choice("priority", priority, _PRIORITIES),
                "queue": 0 if completions is None else completions.queue,
                "user_data": token,
                "mode": mode,
                "flags": flags | (0 if after_stream is None else lib.KVF_SUBMIT_FOLLOW_STREAM),
                "stream": after_stream or 0,
                "error": self.text.buffer,
                "error_size": ffi.sizeof(self.text.buffer),
            },
        )
