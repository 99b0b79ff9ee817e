"""From arrays to the regions that the C library moves: rows of equal width at an equal pitch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from ._native import ffi, lib
from .errors import check, error

if TYPE_CHECKING:
    from ._native import CData


@dataclass(frozen=True)
class Region:
    """``rows`` rows of ``width`` bytes in device or host memory, and their place in a buffer.

    All in bytes. With one row, pitches are not read. The caller keeps the memory alive.
    """

    address: int
    """Of the first row."""
    width: int
    rows: int = 1
    pitch: int = 0
    """From row to row in memory."""
    offset: int = 0
    """Of the first row in the buffer."""
    buffer_pitch: int = 0
    """From row to row in the buffer."""


@dataclass(frozen=True)
class RegionList:
    """Regions as the C library takes them, the buffer they need, and what keeps their memory."""

    regions: CData
    count: int
    nbytes: int
    owner: object


def region_list(memory: object, *, writable: bool) -> RegionList:
    """Describes an array, a sequence of arrays, a Region or a sequence of Regions.

    Arrays are packed one after the other, each in C order. ``writable`` memory is for loads.
    """
    sources: Sequence[object] = memory if isinstance(memory, (list, tuple)) else [memory]
    regions: list[Region] = []
    owners: list[object] = []
    offset = 0
    for source in sources:
        if isinstance(source, Region):
            regions.append(source)
            continue
        array = _Strided(source, writable)
        regions.extend(array.regions(offset))
        offset += array.nbytes
        owners.append(array.owner)
    if owners and len(owners) != len(sources):
        raise TypeError("either Regions, which have offsets, or arrays, which get theirs here")
    native = ffi.new("kvf_region[]", [astuple(region) for region in regions])
    nbytes = ffi.new("uint64_t *")
    check(lib.kvf_regions_size(native, len(regions), nbytes))
    return RegionList(native, len(regions), nbytes[0], owners)


class _Strided:
    """What an array says about its memory. Strides are bytes."""

    def __init__(self, source: Any, writable: bool) -> None:
        self.owner: object = source
        if hasattr(source, "__cuda_array_interface__"):
            interface = source.__cuda_array_interface__
            self._shape: tuple[int, ...] = tuple(interface["shape"])
            self._item = numpy.dtype(interface["typestr"]).itemsize
            self._strides = tuple(interface.get("strides") or _packed(self._shape, self._item))
            self._address, read_only = interface["data"]
        else:
            array = _host_array(source)
            # The array holds the export of its buffer: a bytearray can't be resized under it.
            self.owner = array
            self._shape, self._strides, self._item = array.shape, array.strides, array.itemsize
            self._address = array.__array_interface__["data"][0]
            read_only = not array.flags.writeable
        self.nbytes = self._item
        for length in self._shape:
            self.nbytes *= length
        if writable and read_only:
            raise error(lib.KVF_ERR_INVALID_ARGUMENT, "the target is read-only")
        repeated = any(
            n > 1 and step == 0 for n, step in zip(self._shape, self._strides, strict=True)
        )
        if writable and repeated and self.nbytes:
            raise error(lib.KVF_ERR_INVALID_ARGUMENT, "elements of the target share memory")

    def regions(self, offset: int) -> Iterator[Region]:
        """As few as its strides allow: the inner dimensions become rows, the outer are walked."""
        if self.nbytes == 0:
            return
        # A dimension of one element has no stride to speak of.
        outer = [(n, step) for n, step in zip(self._shape, self._strides, strict=True) if n > 1]
        width = self._item
        while outer and outer[-1][1] == width:
            width *= outer.pop()[0]
        rows, pitch = 1, width
        if outer and outer[-1][1] >= width:
            rows, pitch = outer.pop()
            while outer and outer[-1][1] == rows * pitch:
                rows *= outer.pop()[0]
        for index in itertools.product(*(range(n) for n, _ in outer)):
            start = sum(i * step for i, (_, step) in zip(index, outer, strict=True))
            yield Region(self._address + start, width, rows, pitch, offset, width)
            offset += rows * width


def _host_array(source: Any) -> NDArray[Any]:
    """The memory of `source` as an array, never a copy of it."""
    if isinstance(source, numpy.ndarray):
        return source
    try:
        view = memoryview(source)
    except TypeError:
        if hasattr(source, "__dlpack__"):
            return numpy.from_dlpack(source)
        raise TypeError(
            f"{type(source).__name__} has neither the buffer protocol, nor "
            "__cuda_array_interface__, nor __dlpack__"
        ) from None
    try:
        return numpy.asarray(view)
    except (ValueError, TypeError, NotImplementedError):
        return numpy.asarray(view.cast("B"))  # a format that numpy doesn't know


def _packed(shape: tuple[int, ...], item: int) -> tuple[int, ...]:
    strides = []
    for length in reversed(shape):
        strides.append(item)
        item *= length
    return tuple(reversed(strides))
