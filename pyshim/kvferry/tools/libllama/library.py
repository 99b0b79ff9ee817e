"""A loaded libllama."""

from __future__ import annotations

import collections
import ctypes
import itertools
import os
from pathlib import Path
from typing import Any

from .errors import LlamaError
from .finding import Found
from .functions import SIGNATURES
from .parameters import context_params, is_plausible

# libllama logs until the process ends, and does not keep its callbacks alive.
_callbacks: list[Any] = []


class Libllama:
    """A loaded libllama with its backends."""

    def __init__(self, found: Found) -> None:
        self.source = found.source
        try:
            self.functions: Any = ctypes.CDLL(found.path)
        except OSError as failure:
            raise LlamaError(f"{found.path} ({found.source}) can't be loaded: {failure}") from None
        self.log: collections.deque[str] = collections.deque(maxlen=100)
        """The latest lines of its log, the newest at the end. They say why a call has failed."""
        try:
            self._declare()
        except AttributeError as failure:
            raise LlamaError(f"{found.path} does not fit this kvferry: {failure}") from None
        self.loaded_as = _path_of(self.functions.llama_decode)
        """The path by which the loader knows it, with links not resolved."""
        self.path = os.path.realpath(self.loaded_as)
        self._load_backends()
        self.context_params = self._context_params_type()

    def _declare(self) -> None:
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self.functions, name)
            function.restype, function.argtypes = result, arguments
        callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

        def keep(_level: int, text: bytes, _data: object) -> None:
            self.log.append(text.decode(errors="replace").rstrip())

        kept = callback(keep)
        _callbacks.append(kept)
        self.functions.llama_log_set(kept, None)

    def _load_backends(self) -> None:
        """Loads the backends of builds that have them in libraries beside libllama."""
        # This symbol of libggml.so is found through libllama, which depends on libggml.
        load = getattr(self.functions, "ggml_backend_load_all_from_path", None)
        if load is not None:
            load.argtypes, load.restype = [ctypes.c_char_p], None
            load(os.fsencode(Path(self.path).parent))

    def _context_params_type(self) -> type[ctypes.Structure]:
        for earlier, has_type, gap in itertools.product(range(6), (True, False), (0, 8, 16)):
            layout = context_params(earlier, has_type, gap)
            if is_plausible(self._use_layout(layout)):
                return layout
        raise LlamaError(f"unknown layout of llama_context_params in {self.path}")

    def _use_layout(self, layout: type[ctypes.Structure]) -> Any:
        """Declares the functions that take or return the parameters; returns the defaults."""
        self.functions.llama_context_default_params.restype = layout
        self.functions.llama_init_from_model.argtypes = [ctypes.c_void_p, layout]
        self.functions.llama_init_from_model.restype = ctypes.c_void_p
        return self.functions.llama_context_default_params()

    @property
    def build(self) -> str:
        """The name of the library, with the version of its ggml."""
        said = []
        for name in ("ggml_version", "ggml_commit"):
            function = getattr(self.functions, name, None)
            if function is not None:
                function.restype = ctypes.c_char_p
                said.append((function() or b"").decode())
        return f"{Path(self.path).name}, ggml {' '.join(said) or 'of unknown version'}"

    @property
    def offloads(self) -> bool:
        """Whether it has a backend for a GPU of this machine."""
        return bool(self.functions.llama_supports_gpu_offload())

    def refusal(self, what: str) -> LlamaError:
        """Returns an error for a call that has failed, with the latest lines of the log."""
        lines = [line for line in self.log if line.strip(" .")][-3:]
        return LlamaError(f"{what}: {' | '.join(lines) or 'no reason in its log'}")


def _path_of(function: Any) -> str:
    """Returns the file that a loaded function comes from, under the name that was loaded."""

    class Info(ctypes.Structure):
        _fields_ = (
            ("path", ctypes.c_char_p),
            ("base", ctypes.c_void_p),
            ("symbol", ctypes.c_char_p),
            ("address", ctypes.c_void_p),
        )

    dladdr = ctypes.CDLL(None).dladdr
    dladdr.argtypes = [ctypes.c_void_p, ctypes.POINTER(Info)]
    info = Info()
    if not dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info)) or not info.path:
        raise LlamaError("the loader doesn't say where libllama came from")
    return os.fsdecode(info.path)
