"""Mooncake Store behind the remote tier's interface: the memory of several machines."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy

from .objects import PIECE_BYTES, Full, Refused, Unavailable
from .part_format import HEADER_BYTES

if TYPE_CHECKING:
    from mooncake.store import MooncakeDistributedStore

# Mooncake's functions return these codes, which its Python package has no names for. Source:
# mooncake-store/include/types.h, enum ErrorCode, and what version 0.3.13 was seen to return.
_OK = 0
_NO_AVAILABLE_HANDLE = -200
_INVALID_PARAMS = -600
_REPLICA_IS_NOT_READY = -703
_OBJECT_NOT_FOUND = -704
_RPC_FAIL = -900
_RPC_TIMEOUT = -901
_TENANT_QUOTA_EXCEEDED = -1700

_MISSING = (_OBJECT_NOT_FOUND, _REPLICA_IS_NOT_READY)
"""An object that is being replaced is as one that is not there."""
_FULL = (_NO_AVAILABLE_HANDLE, _TENANT_QUOTA_EXCEEDED)
_NOTHING_WAS_READ = (_INVALID_PARAMS, *_MISSING, _RPC_FAIL, _RPC_TIMEOUT)
"""Codes of reads that ended before a transfer began. After others a transfer may go on, and write
to the buffer."""
_ALIGNMENT = 4096


class MooncakeObjects:
    """The objects of a Mooncake Store, each under a prefix and its name.

    Needs ``pip install kvferry[mooncake]``, or Mooncake's package for CUDA, and libibverbs.
    ``store`` is a ``mooncake.store.MooncakeDistributedStore`` that the program has set up. Its
    ``local_buffer_size`` must have room for the parts that are written at a time: four blocks, or
    checkpoints, each with 4,096 bytes more. A part that is larger than this buffer is refused.

    The program closes, in this order, the ``kvferry.Store``, this, and the Mooncake Store: a call
    that the remote tier has left behind may still be in Mooncake's code, and the process would end
    with a fault if the Mooncake Store were closed meanwhile.

    Objects are lost when Mooncake evicts them, or when the process whose segment has them ends.
    A part is read through buffers that are registered with Mooncake, one for each read at a time,
    of up to 8 MiB each, and copied from there.
    """

    def __init__(self, store: MooncakeDistributedStore, prefix: str = "kvferry/") -> None:
        self._store = store
        self._prefix = prefix
        self._buffers = _Buffers(store)
        self._condition = threading.Condition()
        self.running = 0
        """Calls that are under way."""
        self._closed = False

    def __enter__(self) -> MooncakeObjects:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the calls that are under way, and frees the buffers; later calls raise Refused.

        Blocks until Mooncake ends these calls, which may be for ever if its master hangs.
        """
        with self._condition:
            self._closed = True
            self._condition.wait_for(lambda: self.running == 0)
        self._buffers.free()

    @contextlib.contextmanager
    def _call(self) -> Iterator[MooncakeDistributedStore]:
        with self._condition:
            if self._closed:
                raise Refused("the Mooncake objects are closed")
            self.running += 1
        try:
            yield self._store
        finally:
            with self._condition:
                self.running -= 1
                self._condition.notify_all()

    def put(self, name: str, nbytes: int, pieces: Iterator[memoryview]) -> None:
        # An existing object would stay as it is with put_parts.
        with self._call() as store:
            code = store.upsert_parts(self._prefix + name, *pieces)
        if code in _FULL:
            raise Full(f"Mooncake has no room for {nbytes:,} bytes ({code})")
        if code == _INVALID_PARAMS:
            raise Refused(
                f"Mooncake refuses {nbytes:,} bytes ({code}): local_buffer_size may be too small"
            )
        if code != _OK:
            raise Unavailable(f"Mooncake returns {code} for a write")

    def get(self, name: str, offset: int, memories: Sequence[memoryview]) -> int:
        wanted = sum(map(len, memories))
        with self._call(), self._buffers.one(wanted) as buffer:
            count = self._read(buffer, name, offset, wanted)
            if count == _INVALID_PARAMS:  # such as for a range that the object does not fill
                size = self._size(name)
                if size is None:
                    raise FileNotFoundError(name)
                wanted = min(wanted, max(0, size - offset))
                count = self._read(buffer, name, offset, wanted) if wanted else 0
            if count in _MISSING:
                raise FileNotFoundError(name)
            if count < 0:
                raise Unavailable(f"Mooncake returns {count} for a read")
            begin = 0
            for memory in memories:
                piece = buffer.memory[begin : min(begin + len(memory), count)]
                # numpy copies without the interpreter's lock.
                numpy.frombuffer(memory, numpy.uint8)[: len(piece)] = piece
                begin += len(piece)
            return count

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        return [self._size(name) for name in names]

    def delete(self, names: Sequence[str]) -> None:
        # Not even those that somebody has just read, for which Mooncake keeps a lease.
        with self._call() as store:
            codes = store.batch_remove([self._prefix + name for name in names], force=True)
        for code in codes:
            if code not in (_OK, _OBJECT_NOT_FOUND):
                raise Unavailable(f"Mooncake returns {code} for a removal")

    def _size(self, name: str) -> int | None:
        with self._call() as store:
            size: int = store.get_size(self._prefix + name)
        if size in _MISSING:
            return None
        if size < 0:
            raise Unavailable(f"Mooncake returns {size} for a size")
        return size

    def _read(self, buffer: _Buffer, name: str, offset: int, nbytes: int) -> int:
        """Returns how many bytes were read, or a code."""
        key = self._prefix + name
        address = buffer.address
        counts = self._store.get_into_ranges(
            [address], [[key]], [[[0]]], [[[offset]]], [[[nbytes]]]
        )
        count: int = counts[0][0][0]
        buffer.may_be_written = count < 0 and count not in _NOTHING_WAS_READ
        return count


class _Buffer:
    """Memory that Mooncake may write."""

    def __init__(self, nbytes: int) -> None:
        # Mooncake registers whole pages.
        memory = numpy.empty(nbytes + _ALIGNMENT, numpy.uint8)
        begin = -memory.ctypes.data % _ALIGNMENT
        self.memory = memory[begin : begin + nbytes]
        self.address: int = self.memory.ctypes.data
        self.may_be_written = False
        """Whether a transfer that failed may still go on."""


_GIVEN_UP: list[_Buffer] = []
"""Mooncake may still write there: this memory is never freed, nor used again."""


class _Buffers:
    """Buffers that are registered with Mooncake, each for one read at a time.

    They are as many as there were reads at a time, and stay registered until ``free``: with RDMA,
    registering takes long.
    """

    def __init__(self, store: MooncakeDistributedStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._free: list[_Buffer] = []

    @contextlib.contextmanager
    def one(self, nbytes: int) -> Iterator[_Buffer]:
        buffer = self._take(nbytes)
        try:
            yield buffer
        finally:
            with self._lock:
                (_GIVEN_UP if buffer.may_be_written else self._free).append(buffer)

    def free(self) -> None:
        with self._lock:
            while self._free:
                self._store.unregister_buffer(self._free.pop().address)

    def _take(self, nbytes: int) -> _Buffer:
        with self._lock:
            for index, buffer in enumerate(self._free):
                if len(buffer.memory) >= nbytes:
                    return self._free.pop(index)
        buffer = _Buffer(max(nbytes, HEADER_BYTES + PIECE_BYTES))
        code = self._store.register_buffer(buffer.address, len(buffer.memory))
        if code != _OK:
            raise Refused(f"Mooncake returns {code} for the registration of a buffer")
        return buffer
