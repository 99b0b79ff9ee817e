"""Arrays that other libraries lend through DLPack: reads the capsules that ``__dlpack__`` returns.

Structs and numbers are those of dlpack.h (https://dmlc.github.io/dlpack/latest/c_api.html):
version 1, and the structs without a version that came before.
https://dmlc.github.io/dlpack/latest/python_spec.html says how to ask for a capsule and who calls
its deleter.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

from .._native import lib
from ..errors import error

# DLDeviceType
CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
# DLManagedTensorVersioned.flags
READ_ONLY, IS_COPIED = 1 << 0, 1 << 1
# The newest version that this module reads. Minor versions only add to it, for instance flags.
VERSION = (1, 1)


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; NULL: packed, in C order
        ("byte_offset", ctypes.c_uint64),
    )


class ManagedTensor(ctypes.Structure):
    """DLManagedTensor, of a capsule named ``dltensor``."""

    _fields_ = (
        ("tensor", Tensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),  # may be NULL
    )


class ManagedTensorVersioned(ctypes.Structure):
    """DLManagedTensorVersioned, of a capsule named ``dltensor_versioned``.

    The members before ``flags`` are the same in every major version.
    """

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


_Struct = type[ManagedTensor] | type[ManagedTensorVersioned]

# By the capsule's name: the struct, and the name for a capsule that a consumer has taken. Python
# does not copy that name, so it must live as long as the module.
_STRUCTS: dict[bytes, tuple[_Struct, bytes]] = {
    b"dltensor_versioned": (ManagedTensorVersioned, b"used_dltensor_versioned"),
    b"dltensor": (ManagedTensor, b"used_dltensor"),
}

# Called with the interpreter's lock, as the destructor of an unused capsule calls it.
_Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)

_is_capsule = ctypes.pythonapi.PyCapsule_IsValid
_is_capsule.argtypes = [ctypes.py_object, ctypes.c_char_p]
_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_get_pointer.restype = ctypes.c_void_p
_set_name = ctypes.pythonapi.PyCapsule_SetName
_set_name.argtypes = [ctypes.py_object, ctypes.c_char_p]


class LentArray:
    """Memory that another library lends until this object is collected."""

    address: int
    """Of the first element."""
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    """In bytes; None: packed, in C order."""
    item: int
    """Bytes of an element."""
    unwritable: str
    """Why it must not be written into, or ""."""

    def __init__(self, capsule: object) -> None:
        """Takes the capsule, and with it the duty to call its deleter."""
        name = next((name for name in _STRUCTS if _is_capsule(capsule, name)), None)
        if name is None:
            raise TypeError(f"__dlpack__ gave {capsule!r}, which is no tensor, or one already used")
        struct, used = _STRUCTS[name]
        self._pointer = _get_pointer(capsule, name)
        managed: Any = struct.from_address(self._pointer)
        _set_name(capsule, used)
        self._delete = _Deleter(managed.deleter) if managed.deleter else None

        if not isinstance(managed, ManagedTensorVersioned):
            # Among these are JAX's arrays, which are immutable.
            self.unwritable = "DLPack before version 1 doesn't say whether the target is read-only"
        elif managed.major > VERSION[0]:
            raise BufferError(f"DLPack {managed.major}.{managed.minor}, {VERSION[0]} is known")
        elif managed.flags & READ_ONLY:
            self.unwritable = "the target is read-only"
        elif managed.flags & IS_COPIED:
            self.unwritable = "the target lends only a copy of itself"
        else:
            self.unwritable = ""
        tensor = managed.tensor
        bits = tensor.bits * tensor.lanes
        if bits % 8:
            raise error(lib.KVF_ERR_INVALID_ARGUMENT, f"elements of {bits} bits")
        self.item = bits // 8
        self.address = (tensor.data or 0) + tensor.byte_offset
        self.shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
        self.strides = None
        if tensor.strides:
            self.strides = tuple(tensor.strides[axis] * self.item for axis in range(tensor.ndim))

    def __del__(self) -> None:
        delete = getattr(self, "_delete", None)
        if delete is not None:
            delete(self._pointer)


def is_on_stream(source: Any) -> bool:
    """Returns True if work on the array is queued on CUDA streams, False for host memory.

    Raises Unreachable for a device that is neither the host nor CUDA.
    """
    device, ordinal = source.__dlpack_device__()
    if device not in (CPU, CUDA, CUDA_HOST, CUDA_MANAGED):
        raise error(lib.KVF_ERR_UNREACHABLE, f"DLPack device ({int(device)}, {ordinal})")
    return device in (CUDA, CUDA_MANAGED)


def lent(source: Any, stream: int | None, *, writable: bool) -> LentArray:
    """Borrows the memory of an array, with ``writable`` to write into it.

    ``stream`` is a CUDA stream (1 and 2 are the default streams) for an array that
    ``is_on_stream``, else None. The array's library makes that stream wait for its own work on the
    array. Raises InvalidArgument where the memory cannot be written.
    """
    array = LentArray(_capsule(source, stream, writable))
    if writable and array.unwritable:
        raise error(lib.KVF_ERR_INVALID_ARGUMENT, array.unwritable)
    return array


def _capsule(source: Any, stream: int | None, writable: bool) -> object:
    # Older libraries know fewer keywords: one that is refused is left out.
    versioned: dict[str, Any] = {"max_version": VERSION}
    attempts: list[dict[str, Any]] = [versioned, {}]
    if writable:
        attempts.insert(0, {**versioned, "copy": False})
    if stream is not None:
        attempts = [{**keywords, "stream": stream} for keywords in attempts]
    *newer, oldest = attempts
    for keywords in newer:
        with contextlib.suppress(TypeError):
            return source.__dlpack__(**keywords)
    return source.__dlpack__(**oldest)
