"""The simulated CUDA driver (tests/simulated_cuda), for Python tests.

    driver = SimulatedCuda.open()               # None where KVFERRY_SIMULATED_CUDA is not set
    driver.reset()
    array = driver.array(numpy.arange(1000))    # "device" memory, with __cuda_array_interface__
    driver.fail("cuMemAlloc", nth=2, error=Error.OUT_OF_MEMORY)
    ...
    assert driver.count("live") == 0

KVFERRY_SIMULATED_CUDA is the path of libcuda_simulated.so. Set KVFERRY_CUDA_DRIVER to the same path
before kvferry opens its first engine: then both use the same driver. The settings, faults and
counters are in tests/simulated_cuda/simulated_cuda.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import os
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt


class Error(enum.IntEnum):
    """Numbers of CUresult."""

    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    ECC_UNCORRECTABLE = 214
    UNKNOWN = 999


class CudaError(Exception):
    """A call of the driver has failed; `error` is the number."""

    def __init__(self, call: str, error: int) -> None:
        super().__init__(f"{call}: CUDA error {error}")
        self.error = error


class DeviceArray:
    """Memory of a device. Freed by close(), or at the end of a `with`."""

    def __init__(
        self, driver: SimulatedCuda, shape: tuple[int, ...], dtype: Any, device: int
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        self.device = device
        self._driver = driver
        address = ctypes.c_uint64()
        with driver.context(device):
            driver.call(
                "cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(self.nbytes, 1))
            )
        self.address = address.value

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }

    def upload(self, values: npt.ArrayLike) -> None:
        """Fills it at once, without waiting for streams."""
        source = np.ascontiguousarray(np.broadcast_to(values, self.shape), dtype=self.dtype)
        self._driver.write(self.address, source)

    def download(self) -> npt.NDArray[Any]:
        """Returns a copy of what it holds now, without waiting for streams."""
        values = np.empty(self.shape, self.dtype)
        self._driver.read(values, self.address)
        return values

    def close(self) -> None:
        if self.address:
            address, self.address = self.address, 0
            with self._driver.context(self.device):
                self._driver.call("cuMemFree_v2", ctypes.c_uint64(address))

    def __enter__(self) -> DeviceArray:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream:
    """A stream of a device, or its default stream. Ended by close(), or at the end of a `with`.

    It can be held, as a long kernel of another program would hold it.
    """

    def __init__(self, driver: SimulatedCuda, default: int | None, device: int) -> None:
        self._driver = driver
        self._device = device
        self._default = default
        handle = ctypes.c_void_p(default)
        self._word = ctypes.c_void_p()
        device_word = ctypes.c_uint64()
        with driver.context(device):
            if default is None:
                non_blocking = 1
                driver.call("cuStreamCreateWithPriority", ctypes.byref(handle), non_blocking, 0)
            portable_and_mapped = 3
            driver.call(
                "cuMemHostAlloc",
                ctypes.byref(self._word),
                ctypes.c_size_t(4),
                portable_and_mapped,
            )
            driver.call("cuMemHostGetDevicePointer_v2", ctypes.byref(device_word), self._word, 0)
        self.handle = handle.value or 0
        self._device_word = device_word.value
        self.release()

    def hold(self) -> None:
        """Makes work that it is given from now on wait for release()."""
        self._set(0)
        with self._driver.context(self._device):
            equal = 1
            self._driver.call(
                "cuStreamWaitValue32_v2",
                ctypes.c_void_p(self.handle),
                ctypes.c_uint64(self._device_word),
                1,
                equal,
            )

    def release(self) -> None:
        self._set(1)

    def _set(self, value: int) -> None:
        ctypes.c_uint32.from_address(self._word.value or 0).value = value

    def copy(self, to: DeviceArray, source: DeviceArray) -> None:
        with self._driver.context(self._device):
            self._driver.call(
                "cuMemcpyDtoDAsync_v2",
                ctypes.c_uint64(to.address),
                ctypes.c_uint64(source.address),
                ctypes.c_size_t(source.nbytes),
                ctypes.c_void_p(self.handle),
            )

    def make_wait(self, other: int) -> None:
        """Makes another stream wait for the work that this one holds."""
        event = ctypes.c_void_p()
        with self._driver.context(self._device):
            self._driver.call("cuEventCreate", ctypes.byref(event), 0)
            self._driver.call("cuEventRecord", event, ctypes.c_void_p(self.handle))
            self._driver.call("cuStreamWaitEvent", ctypes.c_void_p(other), event, 0)
            self._driver.call("cuEventDestroy_v2", event)

    def synchronize(self) -> None:
        with self._driver.context(self._device):
            self._driver.call("cuStreamSynchronize", ctypes.c_void_p(self.handle))

    def close(self) -> None:
        self.release()
        self.synchronize()
        with self._driver.context(self._device):
            if self._default is None:
                self._driver.call("cuStreamDestroy_v2", ctypes.c_void_p(self.handle))
        self._driver.free_word(self._word, self._device)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SimulatedCuda:
    """The controls of the driver. Any thread may call any method."""

    def __init__(self, path: str) -> None:
        self.path = path
        # During a call of a CDLL other threads of Python run.
        self._library = library = ctypes.CDLL(path)
        text, number = ctypes.c_char_p, ctypes.c_uint64
        for name, result, parameters in (
            ("kvfsim_set", ctypes.c_int, (text, number)),
            ("kvfsim_reset", None, ()),
            ("kvfsim_fail", ctypes.c_int, (text, number, ctypes.c_int, ctypes.c_int)),
            ("kvfsim_hold", ctypes.c_int, (text, number, ctypes.c_int)),
            ("kvfsim_release", None, ()),
            ("kvfsim_wait_held", ctypes.c_int, (number, ctypes.c_uint32)),
            ("kvfsim_lose_device", ctypes.c_int, (ctypes.c_int, ctypes.c_int, ctypes.c_int)),
            ("kvfsim_count", number, (text,)),
            ("kvfsim_calls", number, (text,)),
            ("kvfsim_write", ctypes.c_int, (number, ctypes.c_void_p, number)),
            ("kvfsim_read", ctypes.c_int, (ctypes.c_void_p, number, number)),
        ):
            function = getattr(library, name)
            function.restype = result
            function.argtypes = parameters

    @classmethod
    def open(cls) -> SimulatedCuda | None:
        """Returns the driver that KVFERRY_SIMULATED_CUDA names, or None."""
        path = os.environ.get("KVFERRY_SIMULATED_CUDA")
        return cls(path) if path else None

    # ---- Controls

    def set(self, **settings: int) -> None:
        """Changes settings: `set(devices=2, bytes_per_second=10**9)`."""
        for name, value in settings.items():
            self._known(self._library.kvfsim_set(name.encode(), value), name)

    def reset(self) -> None:
        """Restores the settings from the environment, removes faults and holds, and zeroes the
        counters. Live objects stay."""
        self._library.kvfsim_reset()

    def fail(
        self, what: str, nth: int = 1, error: int = Error.UNKNOWN, forever: bool = False
    ) -> None:
        """Makes the nth call of an entry point, or the nth "copy" or "kernel", fail."""
        self._known(self._library.kvfsim_fail(what.encode(), nth, error, forever), what)

    def hold(self, what: str = "copy", nth: int = 1, forever: bool = False) -> None:
        """Makes the nth "copy" or "kernel" wait for release()."""
        self._known(self._library.kvfsim_hold(what.encode(), nth, forever), what)

    def release(self) -> None:
        self._library.kvfsim_release()

    def wait_held(self, count: int = 1, timeout: float = 10) -> None:
        """Waits until `count` operations are held. Raises TimeoutError after `timeout` seconds."""
        if not self._library.kvfsim_wait_held(count, int(timeout * 1000)):
            raise TimeoutError(f"{self.count('held')} operations are held, not {count}")

    def lose_device(
        self, device: int = 0, error: int = Error.ECC_UNCORRECTABLE, permanent: bool = False
    ) -> None:
        self._known(self._library.kvfsim_lose_device(device, error, permanent), f"device {device}")

    # ---- Counters

    def count(self, counter: str) -> int:
        return self._counter(self._library.kvfsim_count(counter.encode()), counter)

    def calls(self, entry_point: str) -> int:
        return self._counter(self._library.kvfsim_calls(entry_point.encode()), entry_point)

    # ---- Memory of devices

    def array(self, values: npt.ArrayLike, device: int = 0) -> DeviceArray:
        """Returns device memory that holds `values`."""
        source = np.asarray(values)
        array = self.empty(source.shape, source.dtype, device)
        array.upload(source)
        return array

    def empty(self, shape: tuple[int, ...], dtype: Any = np.uint8, device: int = 0) -> DeviceArray:
        return DeviceArray(self, shape, dtype, device)

    def stream(self, default: int | None = None, device: int = 0) -> Stream:
        """Returns a new stream, or a default stream: 1 is the legacy one, 2 this thread's."""
        return Stream(self, default, device)

    def write(self, address: int, values: npt.NDArray[Any]) -> None:
        """Writes contiguous values to device memory, without waiting for streams."""
        if self._library.kvfsim_write(address, values.ctypes.data, values.nbytes):
            raise ValueError(f"{values.nbytes} bytes at {address:#x} are in no allocation")

    def read(self, values: npt.NDArray[Any], address: int) -> None:
        """Reads contiguous values from device memory, without waiting for streams."""
        if self._library.kvfsim_read(values.ctypes.data, address, values.nbytes):
            raise ValueError(f"{values.nbytes} bytes at {address:#x} are in no allocation")

    # ---- The driver itself

    def call(self, entry_point: str, *arguments: Any) -> None:
        """Calls an entry point by its symbol. Raises CudaError."""
        error = getattr(self._library, entry_point)(*arguments)
        if error:
            raise CudaError(entry_point, error)

    def free_word(self, word: ctypes.c_void_p, device: int) -> None:
        """Frees the memory that a stream has watched."""
        with self.context(device):
            self.call("cuMemFreeHost", word)

    @contextlib.contextmanager
    def context(self, device: int = 0) -> Iterator[int]:
        """Makes a device's primary context current on this thread; gives its address.

        The context stays retained after its first use, as in a program that also uses PyTorch:
        arrays would be freed with it.
        """
        self.call("cuInit", 0)
        retained = self._retained.get(device)
        if retained is None:
            handle = ctypes.c_void_p()
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(handle), device)
            retained = self._retained[device] = handle.value or 0
        self.call("cuCtxPushCurrent_v2", ctypes.c_void_p(retained))
        try:
            yield retained
        finally:
            self.call("cuCtxPopCurrent_v2", None)

    # By device. For all objects of the class, because a process has one driver.
    _retained: ClassVar[dict[int, int]] = {}

    @staticmethod
    def _known(status: int, name: str) -> None:
        if status:
            raise ValueError(f"the simulated driver knows no {name}")

    @staticmethod
    def _counter(value: int, name: str) -> int:
        if value == 2**64 - 1:
            raise ValueError(f"the simulated driver counts no {name}")
        return value
