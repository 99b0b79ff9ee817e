"""The CUDA driver under test: the simulated one, or with KVFERRY_TEST_GPU=1 the driver of a GPU.

Test modules that use the fixtures `driver`, `cuda` or `simulated` (conftest.py) have the mark
`NEEDS_CUDA`. They share a process, because kvferry opens the driver once.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import kvferry
import pytest
from numpy.typing import NDArray

from support.devices import ON_GPU
from support.simulated_cuda import SimulatedCuda

NEEDS_CUDA = pytest.mark.skipif(
    not ON_GPU and "KVFERRY_SIMULATED_CUDA" not in os.environ,
    reason="needs KVFERRY_SIMULATED_CUDA, or a GPU and KVFERRY_TEST_GPU=1",
)


class RealCuda(SimulatedCuda):
    """The real driver, with those methods of the simulated one that it can have."""

    def __init__(self) -> None:
        self.path = "libcuda.so.1"
        self._library = ctypes.CDLL(self.path)

    def free_word(self, word: ctypes.c_void_p, device: int) -> None:
        """Does nothing: a real driver frees pinned memory only when no stream waits any more."""

    def write(self, address: int, values: NDArray[Any]) -> None:
        with self.context():
            self.call(
                "cuMemcpyHtoD_v2",
                ctypes.c_uint64(address),
                ctypes.c_void_p(values.ctypes.data),
                ctypes.c_size_t(values.nbytes),
            )

    def read(self, values: NDArray[Any], address: int) -> None:
        with self.context():
            self.call(
                "cuMemcpyDtoH_v2",
                ctypes.c_void_p(values.ctypes.data),
                ctypes.c_uint64(address),
                ctypes.c_size_t(values.nbytes),
            )


def driver_under_test() -> SimulatedCuda:
    return RealCuda() if ON_GPU else SimulatedCuda(os.environ["KVFERRY_SIMULATED_CUDA"])


async def open_driver() -> None:
    """Makes kvferry open the driver."""
    async with kvferry.Engine("cuda"):
        pass


def release_second_device(driver: SimulatedCuda) -> None:
    """Releases the context that the simulated driver's second device has got."""
    if driver._retained.pop(1, None):
        driver.call("cuDevicePrimaryCtxRelease_v2", 1)
