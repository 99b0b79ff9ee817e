"""What ``kvferry.Engine`` and ``kvferry.sync.Engine`` have in common."""

from __future__ import annotations

import warnings
import weakref

from .._native import ffi, lib
from ..errors import ErrorText, check
from .arguments import integer
from .attachment import Attachment, attach
from .completions import Completions
from .devices import Devices, engine_devices
from .engine_core import EngineCore, in_flight

_UINT32_MAX = (1 << 32) - 1


class OpenEngine:
    """Opens an engine, and takes it down where the program has forgotten to close it."""

    _name = "Engine"

    def __init__(
        self,
        devices: Devices = "auto",
        *,
        copy_threads: int = 0,
        pinned_limit: int = 0,
        staging_bytes: int = 0,
        trace: bool = False,
    ) -> None:
        kind, cuda_devices = engine_devices(devices)
        text = ErrorText()
        options = ffi.new(
            "kvf_engine_options *",
            {
                "size": ffi.sizeof("kvf_engine_options"),
                "devices": kind,
                "cuda_devices": cuda_devices,
                "flags": lib.KVF_ENGINE_TRACE if trace else 0,
                "copy_threads": integer("copy_threads", copy_threads, most=_UINT32_MAX),
                "pinned_limit": integer("pinned_limit", pinned_limit),
                "staging_bytes": integer("staging_bytes", staging_bytes),
                "error": text.buffer,
                "error_size": ffi.sizeof(text.buffer),
            },
        )
        self._devices = devices
        completions = Completions()
        completions.owner = weakref.ref(self)
        handle = ffi.new("kvf_engine *")
        try:
            completions.open()
            check(lib.kvf_engine_create(options, handle), text)
            core = EngineCore(handle[0], completions)
            # Called when this object is collected unclosed, or by atexit.
            self._finalizer = weakref.finalize(self, core.abandon)
            self._core = core
        except BaseException:
            if handle[0]:
                lib.kvf_engine_destroy(handle[0])
            completions.destroy()
            raise

    def _attach(
        self, llm: object, *, library: str | None, allow_blocking: bool, variant: str
    ) -> Attachment:
        """Attaches to a llama context. From then on, closing the engine detaches."""
        core = self._core
        core.completions.check_usable()
        attachment = attach(
            core.handle,
            core.completions,
            llm,
            library=library,
            allow_blocking=allow_blocking,
            variant=variant,
        )
        core.attachments.append(attachment)
        return attachment

    def __repr__(self) -> str:
        core: EngineCore | None = getattr(self, "_core", None)
        if core is None:
            return f"<{self._name} that could not be made>"
        condition = "closed" if core.closed else in_flight(len(core.completions.transfers()))
        return f"<{self._name} {self._devices!r}, {condition}>"

    def __del__(self) -> None:
        core = getattr(self, "_core", None)
        if core is not None and not core.closed and not core.is_inherited():
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
