"""The exceptions of kvferry: one for each status of the C library that a program may want to catch.

Some are Python's own exceptions too: ValueError, MemoryError, TimeoutError.
"""

from __future__ import annotations

import errno

from ._native import ffi, lib


class KvferryError(Exception):
    """A kvferry call or transfer failed.

    ``str(error)`` is the C library's text for the status, followed by ``detail``.
    """

    status: int
    """The negative ``kvf_status``."""
    detail: str
    """One line that says what went wrong in this case, or ""."""

    def __init__(self, status: int, detail: str = "") -> None:
        super().__init__(status, detail)
        self.status = status
        self.detail = detail

    @property
    def name(self) -> str:
        """The name of the status, such as ``KVF_ERR_BUSY``."""
        return ffi.string(lib.kvf_status_name(self.status)).decode()

    def __str__(self) -> str:
        text = strerror(self.status)
        return f"{text}: {self.detail}" if self.detail else text


class InvalidArgument(KvferryError, ValueError):
    """A value that makes no sense, such as a region of no width."""


class OutOfMemory(KvferryError, MemoryError):
    """The system or a device has not enough memory."""


class PinnedLimit(KvferryError, MemoryError):
    """The engine's ``pinned_limit`` is reached."""


class BufferTooSmall(KvferryError, ValueError):
    """The buffer is too small for the bytes of the transfer."""


class Busy(KvferryError):
    """A transfer in flight, or another object, uses the buffer, sequence or object."""


class EngineClosed(KvferryError):
    """The engine or the attachment is closing, or has been closed."""


class TransferCancelled(KvferryError):
    """The transfer was ended early by ``Transfer.cancel()``.

    A task that is cancelled gets the cancellation of its event loop, never this.
    """


class TimedOut(KvferryError, TimeoutError):
    """The transfer did not end within the ``timeout``, and was cancelled."""

    def __init__(self, status: int, detail: str = "") -> None:
        super().__init__(status, detail)
        self.errno = errno.ETIMEDOUT  # OSError has taken the status for an errno


class Forked(KvferryError):
    """The object was made by the parent process, before ``fork()``."""


class NoDevice(KvferryError):
    """There is no such device, or it cannot be used."""


class DeviceLost(KvferryError):
    """A device is lost: its transfers fail, and nothing new can be attached. Make a new engine."""


class Unreachable(KvferryError):
    """No device of the engine can reach this memory."""


class LibraryNotFound(KvferryError):
    """No libllama is loaded in this process, or several are and none was named."""


class TapUnavailable(KvferryError):
    """This libllama's calls cannot be recorded; see ``allow_blocking`` of ``Engine.attach``."""


class ContextFreed(KvferryError):
    """The llama context has been freed."""


class SequenceRange(KvferryError, ValueError):
    """The sequence id is outside of the context's range."""


class SequenceEmpty(KvferryError, ValueError):
    """The sequence holds nothing that could be saved."""


class StateDamaged(KvferryError, ValueError):
    """The state is truncated, its structure is damaged, or its checksum is wrong."""


class StateMismatch(KvferryError, ValueError):
    """The state belongs to another model or to another kind of cache."""


class CacheFull(KvferryError):
    """The cache has not enough free cells for the state."""


_CLASSES: dict[int, type[KvferryError]] = {
    lib.KVF_ERR_INVALID_ARGUMENT: InvalidArgument,
    lib.KVF_ERR_OUT_OF_MEMORY: OutOfMemory,
    lib.KVF_ERR_PINNED_LIMIT: PinnedLimit,
    lib.KVF_ERR_BUFFER_TOO_SMALL: BufferTooSmall,
    lib.KVF_ERR_BUSY: Busy,
    lib.KVF_ERR_CLOSED: EngineClosed,
    lib.KVF_ERR_CANCELLED: TransferCancelled,
    lib.KVF_ERR_TIMEOUT: TimedOut,
    lib.KVF_ERR_FORKED: Forked,
    lib.KVF_ERR_NO_DEVICE: NoDevice,
    lib.KVF_ERR_DEVICE_LOST: DeviceLost,
    lib.KVF_ERR_UNREACHABLE: Unreachable,
    lib.KVF_ERR_LIBRARY_NOT_FOUND: LibraryNotFound,
    lib.KVF_ERR_LIBRARY_AMBIGUOUS: LibraryNotFound,
    lib.KVF_ERR_TAP: TapUnavailable,
    lib.KVF_ERR_CONTEXT_FREED: ContextFreed,
    lib.KVF_ERR_SEQUENCE_RANGE: SequenceRange,
    lib.KVF_ERR_SEQUENCE_EMPTY: SequenceEmpty,
    lib.KVF_ERR_STATE_DAMAGED: StateDamaged,
    lib.KVF_ERR_STATE_MISMATCH: StateMismatch,
    lib.KVF_ERR_CACHE_FULL: CacheFull,
}


def error(status: int, detail: str = "") -> KvferryError:
    """Returns the exception for a status, to be raised."""
    return _CLASSES.get(status, KvferryError)(status, detail)


class ErrorText:
    """Memory for the line of text that some C functions write when they fail."""

    __slots__ = ("buffer",)

    def __init__(self) -> None:
        self.buffer = ffi.new("char[]", 256)

    def detail(self, status: int) -> str:
        """Returns the line without the status's own text, with which it begins."""
        line = ffi.string(self.buffer).decode(errors="replace")
        return line.removeprefix(strerror(status)).removeprefix(": ")


def strerror(status: int) -> str:
    """Returns the C library's text for a status."""
    return ffi.string(lib.kvf_strerror(status)).decode()


def check(status: int, text: ErrorText | None = None) -> int:
    """Returns a count or KVF_OK; raises the exception for a negative status."""
    if status < 0:
        raise error(status, text.detail(status) if text else "")
    return status
