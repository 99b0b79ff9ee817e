"""The last position of a sequence, which the C library does not tell."""

from __future__ import annotations

import ctypes
import os


class LibllamaPositions:
    """Asks the libllama of an attachment. For the context's thread, between decodes."""

    def __init__(self, library: str, context: int) -> None:
        """``library`` is the path of a loaded libllama, "" for the main program."""
        functions = ctypes.CDLL(library or None, os.RTLD_NOLOAD | os.RTLD_LAZY)
        memory_of = functions.llama_get_memory
        memory_of.argtypes, memory_of.restype = [ctypes.c_void_p], ctypes.c_void_p
        self._memory = memory_of(context)
        self._last = functions.llama_memory_seq_pos_max
        self._last.argtypes = [ctypes.c_void_p, ctypes.c_int32]
        self._last.restype = ctypes.c_int32

    def last(self, seq: int) -> int:
        """Returns -1 for an empty sequence. libllama ends the process if ``seq`` is no sequence of
        the context."""
        return int(self._last(self._memory, seq))
