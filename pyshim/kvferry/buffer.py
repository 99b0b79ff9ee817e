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
    """A run of bytes: pinned memory from an engine's pool, or memory of the caller's.

    Registered memory is the caller's, and pinned until this has been closed, or dropped, and the
    last view of it is gone.

    Its bytes are reached through ``view``, ``numpy()``, ``numpy.asarray(buffer)`` and, from Python
    3.12 on, ``memoryview(buffer)``; none of them copies. Views keep the memory alive: pool memory
    goes back to its pool once it has been closed, or dropped, and the last view of it is gone. It
    may outlive its engine.
    """

    _writable = True

    def __init__(self, memory: CData, nbytes: int) -> None:
        """For kvferry itself: programs use ``Engine.allocate`` or pass memory of theirs."""
        self._memory: CData | None = memory  # whatever refers to this keeps the memory alive
        self._nbytes = nbytes
        self.transfers: set[object] = set()
        """Those in flight that were given this object; for kvferry itself."""

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __len__(self) -> int:
        return self._nbytes

    @property
    def jobs(self) -> int:
        """How many transfers in flight use this object."""
        return len(self.transfers)

    @property
    def memory(self) -> CData:
        """The address, for the C library."""
        if self._memory is None:
            raise error(lib.KVF_ERR_INVALID_HANDLE, f"this {type(self).__name__} has been closed")
        return self._memory

    @property
    def view(self) -> memoryview:
        """The bytes, as a memoryview."""
        view = memoryview(ffi.buffer(self.memory, self._nbytes))
        return view if self._writable else view.toreadonly()

    def numpy(self) -> NDArray[numpy.uint8]:
        """The bytes, as an array of uint8."""
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
        """A copy of the bytes."""
        return self.view.tobytes()

    def close(self) -> None:
        """Lets go of the memory. Closing twice is allowed. Raises Busy while a transfer uses it."""
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

    Blocks: microseconds where the pool has one to use again, else as long as mapping and pinning
    takes, a third of a second for 1 GiB.
    """
    nbytes = integer("nbytes", nbytes)
    address = ffi.new("void **")
    text = ErrorText()
    size = ffi.sizeof(text.buffer)
    check(lib.kvf_buffer_alloc_with_error(engine, max(1, nbytes), address, text.buffer, size), text)
    memory = ffi.gc(ffi.cast("uint8_t *", address[0]), lib.kvf_buffer_free, nbytes)
    return Buffer(memory, nbytes)


def registered(engine: int, memory: HostMemory) -> Buffer:
    """Pins memory of the caller's. Blocks: about 30 ms a GiB."""
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
        # A copy that did not end may still write there, so that the memory must stay.
        _never_unmapped.append(memory)


def borrow(memory: HostMemory, name: str, *, writable: bool = False) -> Buffer:
    """The contiguous memory of an object with the buffer protocol, which can't be resized then.

    ``name`` is that of the argument, for errors.
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
    """What keeps its memory from being borrowed."""
    view = memoryview(memory)  # type: ignore[arg-type]
    if writable and view.readonly:
        return "is read-only"
    return "can't be used" if view.c_contiguous else "is not contiguous"
