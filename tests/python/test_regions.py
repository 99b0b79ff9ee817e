"""copy_out and copy_in: every kind of memory that they take, and what they refuse."""

import array
import ctypes
import mmap
from collections.abc import Callable

import kvferry
import numpy as np
import pytest
from event_loops import anyio_backend  # noqa: F401
from kvferry.regions import region_list
from numpy.typing import NDArray

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
    """What PyTorch and CuPy show of an array, here in host memory."""

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


class DLPackArray:
    """An array that has no other protocol than DLPack."""

    def __init__(self, array: NDArray[np.int16]) -> None:
        self._array = array

    def __dlpack__(self, **options: object) -> object:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


async def test_dlpack_is_understood() -> None:
    async with kvferry.Engine("host") as engine:
        out = await engine.copy_out(DLPackArray(numbers()[:, 1:3]))
    assert out.to_bytes() == numbers()[:, 1:3].tobytes()


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
        with pytest.raises(BufferError):
            await engine.copy_out(b"source", b"read-only")
        assert engine.describe()["jobs_in_flight"] == 0
