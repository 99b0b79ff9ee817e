"""Arguments that make no sense are refused at once, by an error that names the argument."""

import ctypes
from collections.abc import Callable
from typing import Any

import kvferry
import numpy as np
import pytest
from kvferry._native import lib
from kvferry.errors import error
from support.event_loops import anyio_backend  # noqa: F401

pytestmark = pytest.mark.anyio

# As seen by callers without a type checker. (test_types.py has what mypy refuses.)
Unchecked: Any = kvferry.Engine
Region: Any = kvferry.Region


@pytest.mark.parametrize(
    ("options", "refusal", "complaint"),
    [
        ({"copy_threads": -1}, ValueError, "copy_threads is -1: at least 0"),
        ({"pinned_limit": -5}, ValueError, "pinned_limit is -5: at least 0"),
        ({"staging_bytes": -1}, ValueError, "staging_bytes is -1: at least 0"),
        ({"copy_threads": 1 << 32}, ValueError, "copy_threads is 4294967296: at most 4294967295"),
        ({"pinned_limit": 1 << 64}, ValueError, "pinned_limit is 18446744073709551616: at most"),
        ({"copy_threads": 1.5}, TypeError, "copy_threads is an integer, not float"),
        ({"pinned_limit": None}, TypeError, "pinned_limit is an integer, not NoneType"),
        ({"devices": "gpu"}, ValueError, "devices is 'auto', .*; not 'gpu'"),
        ({"devices": ["host"]}, ValueError, r"devices is 'auto', .*; not \['host'\]"),
    ],
)
def test_an_option_of_an_engine_is_named(
    options: dict[str, object], refusal: type[Exception], complaint: str
) -> None:
    with pytest.raises(refusal, match=complaint):
        Unchecked(**{"devices": "host", **options})


@pytest.mark.parametrize(
    ("nbytes", "refusal", "complaint"),
    [
        (-1, ValueError, "nbytes is -1: at least 0"),
        (1 << 64, ValueError, "nbytes is 18446744073709551616: at most"),
        (1 << 62, MemoryError, "out of memory"),
        (10.0, TypeError, "nbytes is an integer, not float"),
        ("10", TypeError, "nbytes is an integer, not str"),
    ],
)
async def test_a_size_that_no_buffer_can_have_is_refused(
    nbytes: object, refusal: type[Exception], complaint: str
) -> None:
    async with Unchecked("host") as engine:
        with pytest.raises(refusal, match=complaint):
            await engine.allocate(nbytes)
        assert (await engine.allocate(np.int64(10))).nbytes == 10
        assert (await engine.allocate(0)).nbytes == 0


@pytest.mark.parametrize(
    ("arguments", "refusal", "complaint"),
    [
        ((0, 10), ValueError, "address is 0"),
        ((-8, 10), ValueError, "address is -8"),
        ((4096, 0), ValueError, "width is 0: at least 1"),
        ((4096, -1), ValueError, "width is -1: at least 1"),
        ((4096, 8, 0), ValueError, "rows is 0: at least 1"),
        ((4096, 8, 2, 7, 0, 8), ValueError, "pitch is 7: at least 8"),
        ((4096, 8, 2, 8, 0, 7), ValueError, "buffer_pitch is 7: at least 8"),
        ((4096, 8, 1, 0, -1), ValueError, "offset is -1: at least 0"),
        ((1 << 64, 8), ValueError, "address is 18446744073709551616: at most"),
        ((4096.0, 8), TypeError, "address is an integer, not float"),
        ((4096, None), TypeError, "width is an integer, not NoneType"),
    ],
)
def test_a_region_that_cannot_be_is_refused(
    arguments: tuple[object, ...], refusal: type[Exception], complaint: str
) -> None:
    with pytest.raises(refusal, match=complaint):
        Region(*arguments)


def test_pitches_of_a_single_row_do_not_matter() -> None:
    region = kvferry.Region(4096, 8)
    assert (region.rows, region.pitch, region.buffer_pitch) == (1, 0, 0)


OBJECTS = [
    np.array([object(), None]),
    np.zeros(3, [("number", "i4"), ("thing", "O")]),
    (ctypes.py_object * 2)(1, 2),
]


@pytest.mark.parametrize("objects", OBJECTS, ids=["array", "record", "ctypes"])
async def test_references_to_objects_are_not_memory_to_move(objects: object) -> None:
    nbytes = memoryview(objects).nbytes  # type: ignore[arg-type]
    async with Unchecked("host") as engine:
        for refused in (
            lambda: engine.copy_out(objects),
            lambda: engine.copy_in(objects, bytes(nbytes)),
            lambda: engine.copy_out(bytes(nbytes), into=objects),
            lambda: engine.copy_in(bytearray(nbytes), objects),
        ):
            with pytest.raises(TypeError, match="Python objects"):
                await refused()


async def test_more_data_than_the_target_takes_is_refused() -> None:
    target = bytearray(10)
    async with kvferry.Engine("host") as engine:
        with pytest.raises(ValueError, match="the target takes 10 bytes, 11 were given"):
            await engine.copy_in(target, b"0123456789x")
        with pytest.raises(ValueError, match="the target takes 10 bytes, 11 were given"):
            await engine.copy_in([target[:4], np.zeros(6, np.uint8)], b"0123456789x")
        assert target == bytes(10)
        await engine.copy_in(target, b"0123456789")
    assert target == b"0123456789"


async def test_regions_may_use_a_part_of_a_buffer() -> None:
    target = np.zeros(4, np.uint8)
    region = kvferry.Region(target.ctypes.data, 4, offset=2)
    async with kvferry.Engine("host") as engine:
        await engine.copy_in(region, b"0123456789")
    assert target.tobytes() == b"2345"


async def test_what_is_no_memory_is_named() -> None:
    async with Unchecked("host") as engine:
        with pytest.raises(TypeError, match="into is contiguous memory, not int"):
            await engine.copy_out(b"anything", into=5)
        with pytest.raises(TypeError, match="data is contiguous memory, not str"):
            await engine.copy_in(bytearray(8), "anything")
        with pytest.raises(TypeError, match="data is contiguous memory, not NoneType"):
            await engine.copy_in(bytearray(8), None)
        with pytest.raises(ValueError, match="into is read-only"):
            await engine.copy_out(b"anything", into=b"12345678")
        with pytest.raises(ValueError, match="into is not contiguous"):
            await engine.copy_out(b"anything", into=np.zeros(16, np.uint8)[::2])


@pytest.mark.parametrize(
    ("stream", "refusal", "complaint"),
    [
        (-1, ValueError, "after_stream is -1: at least 0"),
        ("0", TypeError, "after_stream is an integer, not str"),
    ],
)
async def test_a_stream_that_is_none_is_refused(
    stream: object, refusal: type[Exception], complaint: str
) -> None:
    async with Unchecked("host") as engine:
        with pytest.raises(refusal, match=complaint):
            await engine.copy_out(b"anything", after_stream=stream)
        with pytest.raises(refusal, match=complaint):
            await engine.copy_in(bytearray(8), b"anything", after_stream=stream)


@pytest.mark.parametrize(
    ("value", "refusal"), [("high", ValueError), (["urgent"], ValueError), (None, ValueError)]
)
async def test_a_priority_that_is_none_is_refused(value: object, refusal: type[Exception]) -> None:
    async with Unchecked("host") as engine:
        with pytest.raises(refusal, match="'background' or 'urgent', not"):
            await engine.copy_out(b"anything", priority=value)


# ---- llama.cpp -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seq", [None, "0", 0.0])
async def test_a_sequence_is_an_integer(make_context: Callable[..., Any], seq: object) -> None:
    context = make_context("llama")
    context.decode(0, [5, 6, 7])
    async with Unchecked("host") as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        complaint = f"seq is an integer, not {type(seq).__name__}"
        for refused in (
            lambda: llama.size_async(seq),
            lambda: llama.save(seq),
            lambda: llama.load(snapshot, seq),
            lambda: llama.remove(seq),
        ):
            with pytest.raises(TypeError, match=complaint):
                await refused()
        with pytest.raises(TypeError, match=complaint):
            llama.size(seq)


@pytest.mark.parametrize("seq", [-1, 4, 1 << 31, -(1 << 40)])
async def test_a_sequence_out_of_range_is_refused(
    make_context: Callable[..., Any], seq: int
) -> None:
    context = make_context("llama", n_seq_max=4)
    context.decode(0, [5, 6, 7])
    async with Unchecked("host") as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        for refused in (
            lambda: llama.size_async(seq),
            lambda: llama.save(seq),
            lambda: llama.load(snapshot, seq),
            lambda: llama.remove(seq),
        ):
            with pytest.raises(kvferry.SequenceRange):
                await refused()


async def test_what_a_sequence_cannot_be_saved_into_is_named(
    make_context: Callable[..., Any],
) -> None:
    context = make_context("llama")
    context.decode(0, [5, 6, 7])
    async with Unchecked("host") as engine:
        llama = engine.attach(context.address)
        with pytest.raises(TypeError, match="into is contiguous memory, not int"):
            await llama.save(0, into=5)
        with pytest.raises(ValueError, match="into is read-only"):
            await llama.save(0, into=bytes(llama.size(0)))
        with pytest.raises(ValueError, match="'auto', 'in_place' or 'snapshot', not"):
            await llama.save(0, mode=["auto"])


async def test_what_is_no_state_costs_no_sequence_its_cells(
    make_context: Callable[..., Any],
) -> None:
    context = make_context("llama")
    context.decode(0, [5, 6, 7])
    async with Unchecked("host") as engine:
        llama = engine.attach(context.address)
        before = (await llama.save(0)).to_bytes()
        for state in (None, 5, "text", np.array([object()])):
            with pytest.raises(TypeError, match="state is contiguous memory"):
                await llama.load(state, 0)
        with pytest.raises(ValueError, match="'auto', 'in_place' or 'ahead', not"):
            await llama.load(before, 0, mode="soon")
        with pytest.raises(ValueError, match="'background' or 'urgent', not"):
            await llama.load(before, 0, priority="high")
        assert (await llama.save(0)).to_bytes() == before


# ---- Python's own bases --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "base"),
    [
        (lib.KVF_ERR_INVALID_ARGUMENT, ValueError),
        (lib.KVF_ERR_BUFFER_TOO_SMALL, ValueError),
        (lib.KVF_ERR_SEQUENCE_RANGE, ValueError),
        (lib.KVF_ERR_SEQUENCE_EMPTY, ValueError),
        (lib.KVF_ERR_STATE_DAMAGED, ValueError),
        (lib.KVF_ERR_STATE_MISMATCH, ValueError),
        (lib.KVF_ERR_OUT_OF_MEMORY, MemoryError),
        (lib.KVF_ERR_PINNED_LIMIT, MemoryError),
        (lib.KVF_ERR_TIMEOUT, TimeoutError),
    ],
)
def test_an_error_is_also_what_python_calls_it(status: int, base: type[Exception]) -> None:
    with pytest.raises(base) as caught:
        raise error(status, "the detail")
    assert isinstance(caught.value, kvferry.KvferryError)
    assert (caught.value.status, caught.value.detail) == (status, "the detail")
