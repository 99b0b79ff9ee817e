"""Arrays in device memory, as tests pass them to kvferry."""

from __future__ import annotations

from typing import Any

import kvferry
import numpy as np
from numpy.typing import NDArray

from support.simulated_cuda import DeviceArray


class View:
    """A part of a device array, described by the same part of a host array."""

    def __init__(self, array: DeviceArray, host: NDArray[Any], part: NDArray[Any]) -> None:
        self._array = array
        offset = part.ctypes.data - host.ctypes.data
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": part.shape,
            "typestr": part.dtype.str,
            "data": (array.address + offset, False),
            "strides": None if part.flags.c_contiguous else part.strides,
        }


def numbers(shape: tuple[int, ...] = (6, 8, 10)) -> NDArray[np.int16]:
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def on_stream(array: DeviceArray, stream: int | None) -> View:
    """Returns the array as a library describes it that has queued work on that stream."""
    shown = View(array, *[np.empty(array.shape, array.dtype)] * 2)
    shown.__cuda_array_interface__["stream"] = stream
    return shown


async def pass_by(engine: kvferry.Engine, array: DeviceArray) -> bytes:
    """Returns what a transfer without a stream reads from the array; it overtakes others."""
    return (await engine.copy_out(array, priority="urgent")).to_bytes()
