"""Regions, which are rows of equal width at an equal pitch; and how arrays become regions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from ._bridge import dlpack
from ._bridge.arguments import Array, check_no_objects, integer, invalid
from ._bridge.submission import stream_handle
from ._native import ffi, lib
from .errors import check, error

if TYPE_CHECKING:
    from ._native import CData


@dataclass(frozen=True)
class Region:
    """``rows`` rows of ``width`` bytes in device or host memory, and their place in a buffer.

    All numbers but ``rows`` are bytes. With one row, pitches are ignored. The caller keeps the
    memory alive until the transfer has ended. Raises TypeError, InvalidArgument.
    """

    address: int
    """Address of the first row."""
    width: int
    rows: int = 1
    pitch: int = 0
    """From the start of a row to the start of the next, in memory."""
    offset: int = 0
    """Offset of the first row in the buffer."""
    buffer_pitch: int = 0
    """From the start of a row to the start of the next, in the buffer."""

    def __post_init__(self) -> None:
        integer("address", self.address, least=1)
        width = integer("width", self.width, least=1)
        rows = integer("rows", self.rows, least=1)
        integer("offset", self.offset)
        least = width if rows > 1 else 0
        integer("pitch", self.pitch, least=least)
        integer("buffer_pitch", self.buffer_pitch, least=least)

    def __repr__(self) -> str:
        return (
            f"Region(address={self.address:#x}, width={self.width}, rows={self.rows}, "
            f"pitch={self.pitch}, offset={self.offset}, buffer_pitch={self.buffer_pitch})"
        )

    def native(self) -> _Native:
        """For kvferry itself."""
        return self.address, self.width, self.rows, self.pitch, self.offset, self.buffer_pitch


Memory = Array | Region | Sequence[Array | Region]
"""What ``copy_out`` reads and ``copy_in`` writes: arrays or Regions, not both in one list."""

_Native = tuple[int, int, int, int, int, int]
"""A ``kvf_region``: the numbers of a Region. Arrays can have too many regions to make objects."""


@dataclass(frozen=True)
class RegionList:
    """Regions as the C library takes them, and what belongs to them."""

    regions: CData
    count: int
    nbytes: int
    """Size of the buffer that they need."""
    packed: bool
    """Whether they fill that buffer without gaps. Arrays do; Regions have offsets."""
    owner: object
    """Keeps the memory alive."""
    stream: int | None
    """The CUDA stream that the transfer must follow."""

    def check_fits(self, nbytes: int) -> None:
        """Raises InvalidArgument for more data than arrays take. (Too little is the C library's to
        refuse.)"""
        if self.packed and nbytes > self.nbytes:
            raise invalid(f"the target takes {self.nbytes} bytes, {nbytes} were given")


def region_list(memory: Memory, *, writable: bool, after_stream: int | None = None) -> RegionList:
    """Describes an array, a sequence of arrays, a Region or a sequence of Regions.

    Arrays are packed one after the other, each in C order. Pass ``writable`` for a load.
    ``after_stream`` is the stream to follow, whatever streams the arrays name. Raises TypeError,
    InvalidArgument, Unreachable.
    """
    sources: Sequence[object] = memory if isinstance(memory, (list, tuple)) else [memory]
    # Each array is asked once, and before the first __dlpack__ call: that needs the stream.
    interfaces = [getattr(source, "__cuda_array_interface__", None) for source in sources]
    stream = stream_handle(after_stream)
    if stream is None:
        stream = _named_stream(interfaces)
    regions: list[_Native] = []
    owners: list[object] = []
    arrays = 0
    offset = 0
    for source, interface in zip(sources, interfaces, strict=True):
        if isinstance(source, Region):
            regions.append(source.native())
            continue
        if interface is not None:
            array = _cuda_array(source, interface)
            silent = "stream" not in interface and hasattr(source, "__dlpack__")
            if silent and dlpack.is_on_stream(source):
                # Version 2 of the interface (PyTorch's) names no stream. Through DLPack the library
                # makes our stream wait for its work.
                stream = stream or _LEGACY_STREAM
                owners.append(dlpack.lent(source, stream, writable=False))
        elif (host := _host_array(source)) is not None:
            array = _numpy_array(host)
        elif not dlpack.is_on_stream(source):
            array = _lent_array(dlpack.lent(source, None, writable=writable))
        else:
            # DLPack calls the legacy default stream 1; CUDA calls it 0 or 1.
            stream = stream or _LEGACY_STREAM
            array = _lent_array(dlpack.lent(source, stream, writable=writable))
        if writable:
            array.check_writable()
        regions.extend(array.regions(offset))
        offset += array.nbytes
        owners.append(array.owner)
        arrays += 1
    if arrays and arrays != len(sources):
        raise TypeError("either Regions, which have offsets, or arrays, which get theirs here")
    native = ffi.new("kvf_region[]", regions)
    nbytes = ffi.new("uint64_t *")
    check(lib.kvf_regions_size(native, len(regions), nbytes))
    return RegionList(native, len(regions), nbytes[0], arrays > 0, owners, stream)


_LEGACY_STREAM = 1  # CU_STREAM_LEGACY


def _named_stream(interfaces: Iterable[Any]) -> int | None:
    """Returns the stream that the arrays name, or None. Raises InvalidArgument for several streams.

    https://nvidia.github.io/numba-cuda/user/cuda_array_interface.html defines the entry.
    """
    named = {interface.get("stream") for interface in interfaces if interface is not None}
    streams = sorted(named - {None})
    if 0 in streams:
        raise error(lib.KVF_ERR_INVALID_ARGUMENT, "an array names stream 0: it is None, 1 or 2")
    if len(streams) > 1:
        raise error(
            lib.KVF_ERR_INVALID_ARGUMENT,
            f"the arrays name {len(streams)} streams ({', '.join(map(hex, streams))}), and a "
            "transfer follows one: let one wait for the others and pass it as after_stream",
        )
    return streams[0] if streams else None


@dataclass(frozen=True)
class _Strided:
    """The memory of an array, which lives as long as ``owner``.

    ``shape`` counts elements; ``item`` (an element's size) and ``strides`` are bytes.
    """

    owner: object
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item: int
    read_only: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.item

    def check_writable(self) -> None:
        if self.read_only:
            raise error(lib.KVF_ERR_INVALID_ARGUMENT, "the target is read-only")
        repeated = any(
            n > 1 and step == 0 for n, step in zip(self.shape, self.strides, strict=True)
        )
        if repeated and self.nbytes:
            raise error(lib.KVF_ERR_INVALID_ARGUMENT, "elements of the target share memory")

    def regions(self, offset: int) -> Iterator[_Native]:
        """As few regions as the strides allow: inner dimensions become rows, one region for each
        index of the outer ones."""
        if self.nbytes == 0:
            return
        # The stride of a dimension with one element means nothing.
        outer = [(n, step) for n, step in zip(self.shape, self.strides, strict=True) if n > 1]
        width = self.item
        while outer and outer[-1][1] == width:
            width *= outer.pop()[0]
        rows, pitch = 1, width
        if outer and outer[-1][1] >= width:
            rows, pitch = outer.pop()
            while outer and outer[-1][1] == rows * pitch:
                rows *= outer.pop()[0]
        for index in itertools.product(*(range(n) for n, _ in outer)):
            start = sum(i * step for i, (_, step) in zip(index, outer, strict=True))
            yield self.address + start, width, rows, pitch, offset, width
            offset += rows * width


def _cuda_array(source: object, interface: dict[str, Any]) -> _Strided:
    shape = tuple(interface["shape"])
    dtype = numpy.dtype(interface["typestr"])
    check_no_objects(numpy.empty(0, dtype))
    item = dtype.itemsize
    address, read_only = interface["data"]
    strides = interface.get("strides") or _packed(shape, item)
    return _Strided(source, address, shape, tuple(strides), item, read_only)


def _numpy_array(array: NDArray[Any]) -> _Strided:
    address = array.__array_interface__["data"][0]
    read_only = not array.flags.writeable
    # The array keeps its export of the buffer, so that a bytearray cannot be resized meanwhile.
    return _Strided(array, address, array.shape, array.strides, array.itemsize, read_only)


def _lent_array(array: dlpack.LentArray) -> _Strided:
    strides = array.strides or _packed(array.shape, array.item)
    return _Strided(array, array.address, array.shape, strides, array.item, bool(array.unwritable))


def _host_array(source: Any) -> NDArray[Any] | None:
    """Returns the memory of ``source`` as an array, never a copy; None if only DLPack gives it."""
    check_no_objects(source)
    if isinstance(source, numpy.ndarray):
        return source
    try:
        view = memoryview(source)
    except (TypeError, BufferError) as refusal:
        # BufferError too: JAX's arrays have the buffer protocol, but refuse it for bfloat16.
        if hasattr(source, "__dlpack__"):
            return None
        if isinstance(refusal, BufferError):
            raise
        raise TypeError(
            f"{type(source).__name__} has neither the buffer protocol, nor "
            "__cuda_array_interface__, nor __dlpack__"
        ) from None
    try:
        return numpy.asarray(view)
    except (ValueError, TypeError, NotImplementedError):
        return numpy.asarray(view.cast("B"))  # a format that numpy does not know


def _packed(shape: tuple[int, ...], item: int) -> tuple[int, ...]:
    strides = []
    for length in reversed(shape):
        strides.append(item)
        item *= length
    return tuple(reversed(strides))
