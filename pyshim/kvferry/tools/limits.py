"""The limits of kvferry's speed: memcpy by several threads, and raw pinned copies on CUDA.

This module uses nothing of kvferry.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

_memmove = ctypes.CDLL(None).memmove  # called without the interpreter's lock
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_memmove.restype = None


def memcpy_seconds(target: int, source: int, nbytes: int, threads: int) -> float:
    """Copies between two addresses, each thread an equal share.

    Returns the seconds, which include starting the threads.
    """
    share = -(-nbytes // threads)
    begin = time.monotonic()
    workers = []
    for offset in range(share, nbytes, share):
        size = min(share, nbytes - offset)
        arguments = (target + offset, source + offset, size)
        workers.append(threading.Thread(target=_memmove, args=arguments))
        workers[-1].start()
    _memmove(target, source, min(share, nbytes))
    for worker in workers:
        worker.join()
    return time.monotonic() - begin


class CudaError(Exception):
    """There is no CUDA driver, or one of its calls has failed."""


def cuda_driver() -> str:
    """Returns the name of the driver's library, the same one that kvferry opens."""
    return os.environ.get("KVFERRY_CUDA_DRIVER", "libcuda.so.1")


Direction = Literal["save", "load"]


class Pace(NamedTuple):
    """The size of paced copies in bytes, and how many of them are queued at the same time."""

    nbytes: int
    queued: int


class _Memcpy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of the driver API."""

    @staticmethod
    def _side(name: str) -> list[tuple[str, Any]]:
        return [
            (f"{name}XInBytes", ctypes.c_size_t),
            (f"{name}Y", ctypes.c_size_t),
            (f"{name}MemoryType", ctypes.c_int),
            (f"{name}Host", ctypes.c_void_p),
            (f"{name}Device", ctypes.c_uint64),
            (f"{name}Array", ctypes.c_void_p),
            (f"{name}Pitch", ctypes.c_size_t),
        ]

    _fields_ = (
        *_side("src"),
        *_side("dst"),
        ("WidthInBytes", ctypes.c_size_t),
        ("Height", ctypes.c_size_t),
    )


_ON_HOST, _ON_DEVICE = 1, 2  # CU_MEMORYTYPE_*


class RawCuda:
    """One device's copy engine through the driver's own calls: two streams, pinned host memory."""

    def __init__(self, device: int = 0) -> None:
        """Uses the primary context, as llama.cpp and kvferry do."""
        try:
            self._driver: Any = ctypes.CDLL(cuda_driver())
        except OSError as failure:
            raise CudaError(f"no CUDA driver: {failure}") from None
        self._call("cuInit", 0)
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), device)
        self._context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._enter()
        self._streams = [ctypes.c_void_p() for _ in range(2)]
        for stream in self._streams:
            # Non-blocking, of ordinary priority.
            self._call("cuStreamCreateWithPriority", ctypes.byref(stream), 1, 0)

    def _enter(self) -> None:
        """Makes the context current on this thread. Any thread may call the methods."""
        self._call("cuCtxSetCurrent", self._context)

    def allocate(self, nbytes: int) -> int:
        """Allocates device memory; returns the address."""
        self._enter()
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        return address.value

    def free(self, address: int) -> None:
        self._enter()
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def allocate_host(self, nbytes: int) -> int:
        """Allocates pinned host memory; returns the address."""
        self._enter()
        address = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(nbytes), 0)
        return address.value or 0

    def free_host(self, address: int) -> None:
        self._enter()
        self._call("cuMemFreeHost", ctypes.c_void_p(address))

    def free_bytes(self) -> int:
        """Returns how many bytes of device memory are free."""
        self._enter()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def save_seconds(self, host: int, device: int, nbytes: int) -> float:
        """Copies all bytes at once from device to pinned host memory; returns the seconds."""
        return self._timed(lambda: self._save(host, device, nbytes))

    def load_seconds(self, device: int, host: int, nbytes: int) -> float:
        """Copies all bytes at once from pinned host to device memory; returns the seconds."""
        return self._timed(lambda: self._load(device, host, nbytes))

    def rows_seconds(
        self,
        direction: Direction,
        device: int,
        host: int,
        width: int,
        pitch: int,
        rows: int,
        copies: int,
    ) -> float:
        """Makes ``copies`` copies of ``rows`` rows each; returns the seconds.

        Rows are ``pitch`` bytes apart on the device and packed on the host. All copies are queued
        at once, on two streams in turn.
        """
        on_device, on_host = ("src", "dst") if direction == "save" else ("dst", "src")

        def enqueue() -> None:
            for index in range(copies):
                copy = _Memcpy2D(WidthInBytes=width, Height=rows)
                setattr(copy, f"{on_device}MemoryType", _ON_DEVICE)
                setattr(copy, f"{on_device}Device", device + index * rows * pitch)
                setattr(copy, f"{on_device}Pitch", pitch)
                setattr(copy, f"{on_host}MemoryType", _ON_HOST)
                setattr(copy, f"{on_host}Host", host + index * rows * width)
                setattr(copy, f"{on_host}Pitch", width)
                stream = self._streams[index % 2]
                self._call("cuMemcpy2DAsync_v2", ctypes.byref(copy), stream)

        return self._timed(enqueue)

    def both_seconds(self, into: int, device: int, other: int, source: int, nbytes: int) -> float:
        """Saves and loads ``nbytes`` bytes each at the same time; returns the seconds."""

        def both() -> None:
            self._save(into, device, nbytes)
            self._load(other, source, nbytes)

        return self._timed(both)

    def paced(
        self,
        direction: Direction,
        device: int,
        host: int,
        nbytes: int,
        pace: Pace,
        stop: threading.Event,
    ) -> None:
        """Copies all bytes again and again, in paced pieces, until ``stop`` is set."""
        self._enter()
        driver = self._driver
        copy = driver.cuMemcpyDtoHAsync_v2 if direction == "save" else driver.cuMemcpyHtoDAsync_v2
        pieces = []
        for offset in range(0, nbytes, pace.nbytes):
            size = ctypes.c_size_t(min(pace.nbytes, nbytes - offset))
            pair = (ctypes.c_void_p(host + offset), ctypes.c_uint64(device + offset))
            pieces.append((*(pair if direction == "save" else pair[::-1]), size))
        lanes = []
        for _ in range(pace.queued):
            stream, event = ctypes.c_void_p(), ctypes.c_void_p()
            self._call("cuStreamCreateWithPriority", ctypes.byref(stream), 1, 0)
            self._call("cuEventCreate", ctypes.byref(event), 2)  # without times
            lanes.append((stream, event))
        not_ready = 600  # CUDA_ERROR_NOT_READY
        turns = itertools.cycle(lanes)
        for index, piece in enumerate(itertools.cycle(pieces)):
            stream, event = next(turns)
            # This loop only calls the driver, which leaves the interpreter's lock to decoding.
            while index >= pace.queued and driver.cuEventQuery(event) == not_ready:
                pass
            if stop.is_set():
                break
            copy(*piece, stream)
            driver.cuEventRecord(event, stream)
        for stream, event in lanes:
            self._call("cuStreamSynchronize", stream)
            self._call("cuEventDestroy_v2", event)
            self._call("cuStreamDestroy_v2", stream)

    def _save(self, host: int, device: int, nbytes: int) -> None:
        host_address, size = ctypes.c_void_p(host), ctypes.c_size_t(nbytes)
        device_address = ctypes.c_uint64(device)
        self._call("cuMemcpyDtoHAsync_v2", host_address, device_address, size, self._streams[0])

    def _load(self, device: int, host: int, nbytes: int) -> None:
        host_address, size = ctypes.c_void_p(host), ctypes.c_size_t(nbytes)
        device_address = ctypes.c_uint64(device)
        self._call("cuMemcpyHtoDAsync_v2", device_address, host_address, size, self._streams[1])

    def _timed(self, enqueue: Callable[[], None]) -> float:
        self._enter()
        begin = time.monotonic()
        enqueue()
        for stream in self._streams:
            self._call("cuStreamSynchronize", stream)
        return time.monotonic() - begin

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")

    def close(self) -> None:
        self._enter()
        for stream in self._streams:
            self._call("cuStreamDestroy_v2", stream)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def __enter__(self) -> RawCuda:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
