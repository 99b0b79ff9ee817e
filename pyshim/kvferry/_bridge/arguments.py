"""The types of arguments, and checks whose messages name the argument.

A value of the wrong type raises TypeError. A value of the right type that makes no sense raises
InvalidArgument, which is a ValueError. Each check comes before anything else is done.
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
    """An object with the buffer protocol: bytes, bytearray, mmap, ctypes arrays, Buffer."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class SupportsCudaArray(Protocol):
    """An object with the CUDA array interface: arrays of PyTorch, CuPy and Numba."""

    @property
    def __cuda_array_interface__(self) -> Any: ...


class SupportsDLPack(Protocol):
    """An object with DLPack: arrays of JAX, PyTorch, CuPy and NumPy."""

    def __dlpack__(self, *arguments: Any, **keywords: Any) -> Any: ...


HostMemory = SupportsBuffer | NDArray[Any]
"""Host memory. (NumPy's types declare the buffer protocol only from Python 3.12 on.)"""

Array = HostMemory | SupportsCudaArray | SupportsDLPack
"""Device or host memory, with strides or without."""


def integer(name: str, value: object, *, least: int = 0, most: int = _UINT64_MAX) -> int:
    """Returns an integer of Python or NumPy as an int.

    Raises TypeError for any other type, InvalidArgument for a value outside of the bounds.
    """
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
    """Returns the C library's number for a word. Raises InvalidArgument for an unknown word."""
    if not isinstance(value, str) or value not in choices:
        *words, last = map(repr, choices)
        raise invalid(f"{name} is {', '.join(words)} or {last}, not {value!r}")
    return choices[value]


def sequence_id(value: object) -> int:
    """Returns the id of a sequence as an int.

    Raises TypeError, or SequenceRange for an id that no context has. The C library checks whether
    this context has the sequence.
    """
    number = integer("seq", value, least=-_UINT64_MAX)
    if not -(1 << 31) <= number < 1 << 31:
        raise error(lib.KVF_ERR_SEQUENCE_RANGE, f"sequence {number}")
    return number


def check_no_objects(memory: object) -> None:
    """Raises TypeError for an array of Python objects: nobody counts a reference that is copied."""
    if isinstance(memory, numpy.ndarray):
        objects = memory.dtype.hasobject
    else:
        try:
            text = memoryview(memory).format  # type: ignore[arg-type]
        except (TypeError, BufferError, ValueError):
            return  # without the buffer protocol, or of a type that it cannot describe
        # The names of a record's fields stand between colons.
        objects = "O" in re.sub(":[^:]*:", "", text)
    if objects:
        raise TypeError("an array of Python objects holds references, which cannot be moved")


def invalid(detail: str) -> Exception:
    """Returns an InvalidArgument to raise."""
    return error(lib.KVF_ERR_INVALID_ARGUMENT, detail)
