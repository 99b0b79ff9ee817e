"""How a transfer is submitted: the words that programs use, and the options of the C library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .._native import ffi, lib
from ..errors import ErrorText
from .arguments import choice, integer
from .completions import Completions

if TYPE_CHECKING:
    from .._native import CData

Priority = Literal["background", "urgent"]
"""``background`` transfers are paced, so that they hardly slow down decoding. ``urgent`` transfers
are as fast as the link, and go before background transfers. Within a priority the oldest transfer
goes first. On a context's thread an urgent transfer also goes before calls of ``Llama.run`` that
have not begun."""

_PRIORITIES: dict[str, int] = {
    "background": lib.KVF_PRIORITY_BACKGROUND,
    "urgent": lib.KVF_PRIORITY_URGENT,
}

SaveMode = Literal["auto", "in_place", "snapshot"]
"""``in_place`` moves the bytes straight from the cache. kvferry.h has a table of what may be done
to the sequence until the save has ended; for most of it, the next decode waits. A decode of a
recurrent or sliding-window sequence waits, too. ``snapshot`` first copies the bytes aside: the
sequence may be used as soon as the save has been started. ``auto`` is ``snapshot`` where decoding
the sequence would overwrite what is being saved, else ``in_place``."""

_SAVE_MODES: dict[str, int] = {
    "auto": lib.KVF_SAVE_AUTO,
    "in_place": lib.KVF_SAVE_IN_PLACE,
    "snapshot": lib.KVF_SAVE_SNAPSHOT,
}

LoadMode = Literal["auto", "in_place", "ahead"]
"""``in_place`` moves the bytes straight to the cache, once llama.cpp has taken cells. ``ahead``
begins before that: the bytes go to extra device memory, and from there to the cache. ``auto`` is
``in_place``."""

_LOAD_MODES: dict[str, int] = {
    "auto": lib.KVF_LOAD_AUTO,
    "in_place": lib.KVF_LOAD_IN_PLACE,
    "ahead": lib.KVF_LOAD_AHEAD,
}


def save_mode(mode: SaveMode) -> int:
    return choice("mode", mode, _SAVE_MODES)


def load_mode(mode: LoadMode) -> int:
    return choice("mode", mode, _LOAD_MODES)


def stream_handle(after_stream: int | None) -> int | None:
    """Returns the handle of the CUDA stream to follow, or None. Raises TypeError."""
    return None if after_stream is None else integer("after_stream", after_stream)


class SubmitOptions:
    """A ``kvf_submit_options`` with room for the error text."""

    def __init__(
        self,
        completions: Completions | None,
        token: int,
        priority: Priority,
        *,
        mode: int = 0,
        trust: bool = False,
        after_stream: int | None = None,
        each_block: bool = False,
    ) -> None:
        flags = 0
        if trust:
            flags |= lib.KVF_SUBMIT_TRUST_STATE
        if after_stream is not None:
            flags |= lib.KVF_SUBMIT_FOLLOW_STREAM
        if each_block:
            flags |= lib.KVF_SUBMIT_EACH_BLOCK
        self.text = ErrorText()
        self.options: CData = ffi.new(
            "kvf_submit_options *",
            {
                "size": ffi.sizeof("kvf_submit_options"),
                "priority": choice("priority", priority, _PRIORITIES),
                "queue": 0 if completions is None else completions.queue,
                "user_data": token,
                "mode": mode,
                "flags": flags,
                "stream": after_stream or 0,
                "error": self.text.buffer,
                "error_size": ffi.sizeof(self.text.buffer),
            },
        )
