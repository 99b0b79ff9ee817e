"""Arrays that only have DLPack, with any values that a library may give there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
from kvferry._bridge import dlpack

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_name_of = ctypes.pythonapi.PyCapsule_GetName
_name_of.restype = ctypes.c_char_p
_name_of.argtypes = [ctypes.py_object]
_DeleterType = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

BFLOAT16 = (4, 16, 1)
"""DLDataType: code, bits, lanes."""


class LibraryArray:
    """An array of a library that has DLPack.

    Its memory is at `address`, or is that of `shown` if `address` is None. `shown`, a host array,
    gives shape and strides. `requests` has the keywords of the calls of `__dlpack__`.
    """

    def __init__(
        self,
        shown: npt.NDArray[Any],
        address: int | None = None,
        *,
        device: tuple[int, int] = (dlpack.CPU, 0),
        dtype: tuple[int, int, int] | None = None,
        version: tuple[int, int] | None = (1, 0),
        flags: int = 0,
        byte_offset: int = 0,
        packed: bool = False,
        make_wait: Callable[[int], None] = lambda stream: None,
    ) -> None:
        """Without `version` the library is older than version 1. With `packed` it gives no strides.

        `make_wait` makes a stream wait for the library's own work on the array.
        """
        self._shown = shown
        self._device = device
        self._version = version
        self._make_wait = make_wait
        self.requests: list[dict[str, Any]] = []
        self.given_back = 0
        self.capsule: Any = None

        axes = ctypes.c_int64 * shown.ndim
        self._shape = axes(*shown.shape)
        self._strides = axes(*(step // shown.itemsize for step in shown.strides))
        self._delete = _DeleterType(self._deleted)
        struct = dlpack.ManagedTensor if version is None else dlpack.ManagedTensorVersioned
        self._managed: Any = struct()
        self._managed.deleter = ctypes.cast(self._delete, ctypes.c_void_p)
        if version is not None:
            self._managed.major, self._managed.minor = version
            self._managed.flags = flags
        tensor = self._managed.tensor
        tensor.data = (shown.ctypes.data if address is None else address) - byte_offset
        tensor.byte_offset = byte_offset
        tensor.device_type, tensor.device_id = device
        tensor.ndim = shown.ndim
        tensor.code, tensor.bits, tensor.lanes = dtype or (0, shown.itemsize * 8, 1)
        tensor.shape = self._shape
        tensor.strides = None if packed else self._strides

    def _deleted(self, pointer: int) -> None:
        assert pointer == ctypes.addressof(self._managed)
        self.given_back += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, **request: Any) -> object:
        if self._version is None and request.keys() - {"stream"}:
            raise TypeError(f"unexpected keyword arguments: {request}")
        self.requests.append(request)
        if request.get("stream") is not None:
            self._make_wait(request["stream"])
        name = b"dltensor" if self._version is None else b"dltensor_versioned"
        self.capsule = _new_capsule(ctypes.addressof(self._managed), name, None)
        return self.capsule

    @property
    def capsule_name(self) -> bytes:
        name: bytes = _name_of(self.capsule)
        return name
