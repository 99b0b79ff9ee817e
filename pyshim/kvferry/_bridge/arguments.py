"""What callers pass: types for type checkers, and checks that name what is wrong.

A value of the wrong type raises TypeError, one of the right type that makes no sense raises
InvalidArgument, which is a ValueError. Both before anything else is done.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy
from numpy.typing import NDArray

from .._native import lib
from ..errors import error

_UINT64_MAX = (1 << 64) - 1


class SupportsBuffer(Protocol):
    """Has the buffer protocol: bytes, bytearray, mmap, ctypes arrays, Buffer."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class SupportsCudaArray(Protocol):
    """Has the CUDA array interface: arrays of PyTorch, CuPy and Numba."""

    @property
    def __cuda_array_interface__(self) -> Any: ...


class SupportsDLPack(Protocol):
    """Has DLPack: arrays of JAX, PyTorch, CuPy and NumPy."""

    def __dlpack__(self, *arguments: Any, **keywords: Any) -> Any: ...


HostMemory = SupportsBuffer | NDArray[Any]
"""Memory of the host. (NumPy's types speak of the buffer protocol from Python 3.12 on only.)"""

Array = HostMemory | SupportsCudaArray | SupportsDLPack
"""Memory of a device or of the host, with strides or without."""


def integer(name: str, value: object, *, least: int = 0, most: int = _UINT64_MAX) -> int:
    """The value as an int: one of Python's or of NumPy's, within the bounds."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} is an integer, not {type(value).__name__}") from None
    if number < least:
        raise invalid(f"{name} is {number}: at least {least}")
    if number > most:
        raise invalid(f"{name} is {number}: at most {most}")
    return number


def choice(name: str, value: object, choices: Mapping[str, int]) -> int:
    """The number that the C library has for one of the words."""
    if not isinstance(value, str) or value not in choices:
        *words, last = map(repr, choices)
        raise invalid(f"{name} is {', '.join(words)} or {last}, not {value!r}")
    return choices[value]


def sequence_id(value: object) -> int:
    """The id of a sequence. Whether the context has such a sequence is for the C library to say."""
    number = integer("seq", value, least=-_UINT64_MAX)
    if not -(1 << 31) <= number < 1 << 31:
        raise error(lib.KVF_ERR_SEQUENCE_RANGE, f"sequence {number}")
    return number


def check_no_objects(memory: object) -> None:
    """Refuses arrays of Python objects: a reference means nothing without the object's counter."""
    if isinstance(memory, numpy.ndarray):
        objects = memory.dtype.hasobject
    else:
        try:
            text = memoryview(memory).format  # type: ignore[arg-type]
        except (TypeError, BufferError, ValueError):
            return  # not of the buffer protocol, or of a type that can't be described there
        # The names of a record's fields stand between colons.
        objects = "O" in re.sub(":[^:]*:", "", text)
    if objects:
        raise TypeError("an array of Python objects holds references, which can't be moved")


def invalid(detail: str) -> Exception:
    """InvalidArgument, with what is wrong."""
    return error(lib.KVF_ERR_INVALID_ARGUMENT, detail)
