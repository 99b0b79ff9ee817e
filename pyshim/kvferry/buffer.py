"""Host memory that transfers write into and read from."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar

import numpy
from numpy.typing import DTypeLike, NDArray

from ._bridge.arguments import HostMemory, check_no_objects, integer, invalid
from ._native import ffi, lib
from .errors import ErrorText, check, error

if TYPE_CHECKING:
    from ._native import CData

Self = TypeVar("Self", bound="Buffer")


class Buffer:
    """A run of bytes: pinned memory from an engine's pool, or memory that the caller owns.

    ``view``, ``numpy()``, ``numpy.asarray(buffer)`` and, from Python 3.12 on,
    ``memoryview(buffer)`` give access to the bytes without a copy. Such views keep the memory
    alive.

    Memory from the pool returns to the pool when the Buffer has been closed, or collected, and its
    last view is gone. Memory that was registered stays pinned for the same time. Both may outlive
    the engine.

    Any thread may read and write the bytes. ``close`` is for the thread that uses the engine.
    """

    _writable = True

    def __init__(self, memory: CData, nbytes: int) -> None:
        """For kvferry itself: programs use ``Engine.allocate``, or pass their own memory."""
        self._memory: CData | None = memory  # a reference to this object keeps the memory alive
        self._nbytes = nbytes
        self.transfers: set[object] = set()
        """The transfers in flight that use this object. For kvferry itself."""

    @property
    def nbytes(self) -> int:
        """The size in bytes. ``len(buffer)`` is the same."""
        return self._nbytes

    def __len__(self) -> int:
        return self._nbytes

    @property
    def capacity(self) -> int:
        """The bytes of memory that this takes: of a buffer from the pool what it takes of the
        engine's ``pinned_limit``, at least ``nbytes``; of other memory ``nbytes``."""
        taken = ffi.new("uint64_t *")
        if lib.kvf_buffer_capacity(self.memory, taken) < 0:
            return self._nbytes
        capacity: int = taken[0]
        return capacity

    @property
    def jobs(self) -> int:
        """How many transfers in flight use this Buffer."""
        return len(self.transfers)

    @property
    def memory(self) -> CData:
        """The address, for the C library. Raises KvferryError if this has been closed."""
        if self._memory is None:
            raise error(lib.KVF_ERR_INVALID_HANDLE, f"this {type(self).__name__} has been closed")
        return self._memory

    @property
    def view(self) -> memoryview:
        """The bytes as a memoryview, read-only for a Snapshot."""
        view = memoryview(ffi.buffer(self.memory, self._nbytes))
        return view if self._writable else view.toreadonly()

    def numpy(self) -> NDArray[numpy.uint8]:
        """Returns the bytes as an array of uint8, without a copy."""
        return numpy.asarray(self.view)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        array: NDArray[Any] = self.numpy()
        if dtype is not None and array.dtype != dtype:
            if copy is False:
                raise ValueError("a copy is needed for another dtype than uint8")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __buffer__(self, flags: int) -> memoryview:
        return self.view

    def to_bytes(self) -> bytes:
        """Returns a copy of the bytes."""
        return self.view.tobytes()

    def close(self) -> None:
        """Releases the memory. Closing twice is allowed. Raises Busy while a transfer uses this."""
        if self.transfers:
            raise error(lib.KVF_ERR_BUSY)
        self._memory = None

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._nbytes} bytes{self._condition()}>"

    def _condition(self) -> str:
        if self._memory is None:
            return ", closed"
        return ", in use" if self.transfers else ""


def pinned(engine: int, nbytes: int) -> Buffer:
    """Takes a buffer from the pool of the engine with this handle.

    Blocks: some microseconds if the pool has a free buffer, else until new memory has been mapped
    and pinned, a third of a second for each GiB.
    """
    nbytes = integer("nbytes", nbytes)
    address = ffi.new("void **")
    text = ErrorText()
    size = ffi.sizeof(text.buffer)
    check(lib.kvf_buffer_alloc_with_error(engine, max(1, nbytes), address, text.buffer, size), text)
    memory = ffi.gc(ffi.cast("uint8_t *", address[0]), lib.kvf_buffer_free, nbytes)
    return Buffer(memory, nbytes)


def registered(engine: int, memory: HostMemory) -> Buffer:
    """Pins memory that the caller owns. Blocks, for about 30 ms a GiB."""
    borrowed = borrow(memory, "memory", writable=True)
    check(lib.kvf_buffer_register(engine, borrowed.memory, borrowed.nbytes))
    unregister = functools.partial(_unregister, engine)
    return Buffer(ffi.gc(borrowed.memory, unregister), borrowed.nbytes)


def trim(engine: int) -> None:
    """Gives the idle memory of the engine with this handle back to the system. Blocks."""
    check(lib.kvf_buffer_trim(engine))


_never_unmapped: list[CData] = []


def _unregister(engine: int, memory: CData) -> None:
    if lib.kvf_buffer_unregister(engine, memory) == lib.KVF_ERR_DEVICE_LOST:
        # A copy that has not ended may still write there: the memory must never be unmapped.
        _never_unmapped.append(memory)


def borrow(memory: HostMemory, name: str, *, writable: bool = False) -> Buffer:
    """Returns the contiguous memory of an object with the buffer protocol, as a Buffer.

    The object cannot be resized while that Buffer lives. A Buffer is returned as it is. ``name`` is
    the argument's name, for errors. Raises TypeError, InvalidArgument.
    """
    if isinstance(memory, Buffer):
        if writable and not memory._writable:
            raise invalid(f"{name} is read-only: a {type(memory).__name__}")
        return memory
    try:
        check_no_objects(memory)
        data = ffi.from_buffer("uint8_t[]", memory, require_writable=writable)
    except TypeError as refusal:
        kind = type(memory).__name__
        raise TypeError(f"{name} is contiguous memory, not {kind}: {refusal}") from None
    except (BufferError, ValueError) as refusal:
        raise invalid(f"{name} {_fault(memory, writable)}: {refusal}") from None
    return Buffer(data, len(data))


def _fault(memory: HostMemory, writable: bool) -> str:
    """Why memory cannot be borrowed, for the error's text."""
    view = memoryview(memory)  # type: ignore[arg-type]
    if writable and view.readonly:
        return "is read-only"
    return "can't be used" if view.c_contiguous else "is not contiguous"
