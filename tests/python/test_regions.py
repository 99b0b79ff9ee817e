"""copy_out and copy_in: all kinds of memory that they take, and what they refuse."""

import array
import ctypes
import gc
import mmap
import sys
from collections.abc import Callable
from typing import Any

import kvferry
import numpy as np
import pytest
from kvferry._bridge import dlpack
from kvferry.regions import region_list
from numpy.typing import NDArray
from support.dlpack_arrays import BFLOAT16, LibraryArray
from support.event_loops import anyio_backend  # noqa: F401

pytestmark = pytest.mark.anyio

Shape = Callable[[NDArray[np.int16]], NDArray[np.int16]]

SHAPES: dict[str, Shape] = {
    "whole": lambda a: a,
    "some planes": lambda a: a[2:5],
    "some rows": lambda a: a[:, 3:7],
    "some columns": lambda a: a[:, :, 5:9],
    "rows and columns": lambda a: a[1:, 2:6, 3:4],
    "every other row": lambda a: a[:, ::2],
    "every third column": lambda a: a[..., ::3],
    "backwards": lambda a: a[::-1, :, ::-1],
    "transposed": lambda a: a.T,
    "axes moved": lambda a: np.moveaxis(a, 1, 0),
    "repeated": lambda a: np.broadcast_to(a[0, 0], (4, a.shape[2])),
    "one element": lambda a: a[1:2, 2:3, 3:4],
    "a scalar": lambda a: a[1, 2, 3, ...],
    "nothing": lambda a: a[:, 4:4],
    "Fortran order": lambda a: np.asfortranarray(a),
}


def numbers() -> NDArray[np.int16]:
    return np.arange(6 * 8 * 10, dtype=np.int16).reshape(6, 8, 10)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
async def test_an_array_is_packed_in_c_order_whatever_its_strides(shape: Shape) -> None:
    source = shape(numbers())
    async with kvferry.Engine("host") as engine:
        assert (await engine.copy_out(source)).to_bytes() == source.tobytes()


@pytest.mark.parametrize("shape", [s for name, s in SHAPES.items() if name != "repeated"])
async def test_copy_in_is_the_way_back_and_touches_nothing_else(shape: Shape) -> None:
    source, expected, actual = numbers(), -numbers(), -numbers()
    shape(expected)[...] = shape(source)
    async with kvferry.Engine("host") as engine:
        await engine.copy_in(shape(actual), await engine.copy_out(shape(source)))
    if shape is not SHAPES["Fortran order"]:  # which copies
        assert np.array_equal(actual, expected)


@pytest.mark.parametrize(
    ("shape", "regions"),
    [
        ("whole", 1),
        ("some planes", 1),
        ("some rows", 1),
        ("every other row", 1),
        ("transposed", 80),
    ],
)
def test_regions_are_as_few_as_the_strides_allow(shape: str, regions: int) -> None:
    assert region_list(SHAPES[shape](numbers()), writable=False).count == regions


async def test_anything_with_the_buffer_protocol_will_do() -> None:
    text = b"0123456789abcdef"
    mapped = mmap.mmap(-1, len(text))
    mapped[:] = text
    sources = [
        text,
        bytearray(text),
        memoryview(text),
        memoryview(text)[::-1],
        array.array("H", text),
        mapped,
        (ctypes.c_uint8 * len(text)).from_buffer_copy(text),
        np.frombuffer(text, np.float32),
    ]
    async with kvferry.Engine("host") as engine:
        for source in sources:
            assert (await engine.copy_out(source)).to_bytes() == memoryview(source).tobytes()
            if not memoryview(source).readonly:
                await engine.copy_in(source, b"fedcba9876543210")
                assert memoryview(source).tobytes() == b"fedcba9876543210"


class CudaArray:
    """An array with the interface of PyTorch's and CuPy's arrays, but in host memory."""

    def __init__(self, array: NDArray[np.int16]) -> None:
        self._array = array
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, not array.flags.writeable),
            "strides": None if array.flags.c_contiguous else array.strides,
        }


@pytest.mark.parametrize("name", ["whole", "some columns"])
async def test_the_cuda_array_interface_is_understood(name: str) -> None:
    source, target = numbers(), np.zeros_like(numbers())
    async with kvferry.Engine("host") as engine:
        out = await engine.copy_out(CudaArray(SHAPES[name](source)))
        assert out.to_bytes() == SHAPES[name](source).tobytes()
        await engine.copy_in(CudaArray(SHAPES[name](target)), out)
    assert np.array_equal(SHAPES[name](target), SHAPES[name](source))


class OnlyDLPack:
    """An array of NumPy that has no other protocol than DLPack."""

    def __init__(self, array: NDArray[np.int16], *, old: bool) -> None:
        self._array = array
        self._old = old

    def __dlpack__(self, **request: object) -> object:
        if self._old and request:
            raise TypeError
        return self._array.__dlpack__(**request)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
async def test_dlpack_is_understood_as_numpy_speaks_it(shape: Shape, old: bool) -> None:
    source = shape(numbers())
    if old and not source.flags.writeable:
        pytest.skip("old DLPack has no read-only arrays")
    references = sys.getrefcount(source)
    async with kvferry.Engine("host") as engine:
        out = await engine.copy_out(OnlyDLPack(source, old=old))
    assert out.to_bytes() == source.tobytes()
    assert sys.getrefcount(source) == references


async def test_dlpack_arrays_are_written_into() -> None:
    target = np.zeros_like(numbers())
    async with kvferry.Engine("host") as engine:
        await engine.copy_in(OnlyDLPack(target[:, 1:3], old=False), numbers()[:, 1:3].tobytes())
    assert np.array_equal(target[:, 1:3], numbers()[:, 1:3])
    assert not target[:, 3:].any()


@pytest.mark.parametrize("version", [(1, 0), (1, 99), None])
@pytest.mark.parametrize("device", [dlpack.CPU, dlpack.CUDA_HOST])
async def test_a_dlpack_array_may_be_of_any_type_that_fills_bytes(
    device: int, version: tuple[int, int] | None
) -> None:
    host = numbers()
    async with kvferry.Engine("host") as engine:
        for array in [
            LibraryArray(host, device=(device, 0), version=version, dtype=BFLOAT16),
            LibraryArray(host, device=(device, 0), version=version, dtype=(0, 4, 4)),
            LibraryArray(host, device=(device, 0), version=version, packed=True),
            LibraryArray(host, device=(device, 0), version=version, byte_offset=10),
        ]:
            assert (await engine.copy_out(array)).to_bytes() == host.tobytes()
            assert "stream" not in array.requests[0]  # there is none on the host
            assert array.capsule_name.startswith(b"used_dltensor")
            assert array.given_back == 1


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"flags": dlpack.READ_ONLY}, "the target is read-only"),
        ({"flags": dlpack.IS_COPIED}, "only a copy"),
        ({"version": None}, "before version 1"),
    ],
)
async def test_a_dlpack_array_that_may_not_be_written_is_no_target(
    said: dict[str, Any], reason: str
) -> None:
    array = LibraryArray(numbers(), **said)
    async with kvferry.Engine("host") as engine:
        with pytest.raises(kvferry.InvalidArgument, match=reason):
            await engine.copy_in(array, bytes(960))
        assert (await engine.copy_out(array)).to_bytes() == numbers().tobytes()
    gc.collect()
    assert array.given_back == 2


@pytest.mark.parametrize(
    ("said", "refusal", "reason"),
    [
        ({"dtype": (1, 4, 1)}, kvferry.InvalidArgument, "elements of 4 bits"),
        ({"version": (2, 0)}, BufferError, "DLPack 2.0"),
        ({"device": (10, 3)}, kvferry.Unreachable, r"\(10, 3\)"),
    ],
)
async def test_a_dlpack_array_that_is_not_understood_is_refused(
    said: dict[str, Any], refusal: type[Exception], reason: str
) -> None:
    array = LibraryArray(numbers(), **said)
    async with kvferry.Engine("host") as engine:
        with pytest.raises(refusal, match=reason):
            await engine.copy_out(array)
    gc.collect()
    assert array.given_back == len(array.requests)


async def test_a_dlpack_capsule_is_used_once() -> None:
    class Forgetful(LibraryArray):
        """An array that returns the same capsule again."""

        def __dlpack__(self, **request: Any) -> object:
            return self.capsule or super().__dlpack__(**request)

    array = Forgetful(numbers())
    async with kvferry.Engine("host") as engine:
        await engine.copy_out(array)
        with pytest.raises(TypeError, match="already used"):
            await engine.copy_out(array)
    assert array.given_back == 1


async def test_an_array_that_refuses_the_buffer_protocol_is_asked_for_dlpack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(source: object) -> memoryview:
        """JAX does so for bfloat16. (Before Python 3.12, Python code cannot have the protocol.)"""
        raise BufferError("no such type in the buffer protocol")

    monkeypatch.setattr("kvferry.regions.memoryview", refuse, raising=False)
    array = LibraryArray(numbers(), dtype=BFLOAT16)
    async with kvferry.Engine("host") as engine:
        assert (await engine.copy_out(array)).to_bytes() == numbers().tobytes()
        with pytest.raises(BufferError, match="no such type"):
            await engine.copy_out(b"which has no DLPack")


async def test_a_list_of_arrays_is_packed_one_after_the_other() -> None:
    arrays = [numbers()[:, ::2], b"odd", np.float64(1.5).reshape(1)]
    async with kvferry.Engine("host") as engine:
        packed = await engine.copy_out(arrays)
        assert packed.to_bytes() == b"".join(bytes(memoryview(a).tobytes()) for a in arrays)
        targets = [np.zeros_like(arrays[0]), bytearray(3), np.zeros(1)]
        await engine.copy_in(targets, packed)
    assert np.array_equal(targets[0], arrays[0])
    assert targets[1:] == [b"odd", np.array([1.5])]


async def test_regions_say_where_their_rows_go() -> None:
    source = numbers()
    into = bytearray(b"." * 12)
    two_rows = kvferry.Region(
        address=source.ctypes.data, width=2, rows=2, pitch=20, offset=1, buffer_pitch=4
    )
    last = kvferry.Region(address=source.ctypes.data + 18, width=2, offset=9)
    async with kvferry.Engine("host") as engine:
        await engine.copy_out([two_rows, last], into)
    assert into == b".\0\0..\x0a\0..\x09\0."


async def test_the_callers_memory_is_used_as_it_is() -> None:
    into = np.zeros(2000, np.uint8)
    async with kvferry.Engine("host") as engine:
        buffer = await engine.copy_out(numbers(), into)
        assert buffer.numpy().ctypes.data == into.ctypes.data
    assert into[:960].tobytes() == numbers().tobytes()
    assert not into[960:].any()


async def test_what_cannot_be_copied_is_refused_with_the_reason() -> None:
    read_only = numbers()
    read_only.flags.writeable = False
    async with kvferry.Engine("host") as engine:
        with pytest.raises(kvferry.BufferTooSmall, match="the buffer is too small"):
            await engine.copy_out(bytes(10), bytearray(9))
        with pytest.raises(kvferry.BufferTooSmall):
            await engine.copy_in(bytearray(10), bytes(9))
        with pytest.raises(kvferry.InvalidArgument, match="read-only"):
            await engine.copy_in(read_only, bytes(960))
        with pytest.raises(kvferry.InvalidArgument, match="share memory"):
            await engine.copy_in(np.lib.stride_tricks.as_strided(numbers(), (9,), (0,)), bytes(99))
        with pytest.raises(kvferry.InvalidArgument):
            await engine.copy_out(kvferry.Region(address=0x1000, width=0))
        with pytest.raises(kvferry.Unreachable):
            await engine.copy_out(kvferry.Region(address=0x1000, width=8))
        with pytest.raises(TypeError, match="buffer protocol"):
            await engine.copy_out("text")
        with pytest.raises(TypeError, match="offsets"):
            await engine.copy_out([kvferry.Region(address=1, width=1), b"array"])
        with pytest.raises(kvferry.InvalidArgument, match="into is read-only"):
            await engine.copy_out(b"source", b"read-only")
        assert engine.describe()["jobs_in_flight"] == 0
