"""Transfers of device memory: on the simulated CUDA driver, or on a GPU with KVFERRY_TEST_GPU=1."""

from __future__ import annotations

import concurrent.futures as cf
import contextlib
import ctypes
import gc
import importlib.util
import json
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import kvferry
import numpy as np
import pytest
from kvferry._bridge import dlpack
from numpy.typing import NDArray
from support import c_interface
from support.cuda_driver import NEEDS_CUDA
from support.devices import ON_GPU
from support.dlpack_arrays import LibraryArray
from support.event_loops import anyio_backend  # noqa: F401
from support.simulated_cuda import DeviceArray, Error, SimulatedCuda

pytestmark = [
    pytest.mark.anyio,
    NEEDS_CUDA,
]


@pytest.fixture
def two_devices(simulated: SimulatedCuda) -> Iterator[SimulatedCuda]:
    simulated.set(devices=2)
    yield simulated
    release_second_device(simulated)


def release_second_device(driver: SimulatedCuda) -> None:
    if driver._retained.pop(1, None):
        driver.call("cuDevicePrimaryCtxRelease_v2", 1)


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


PARTS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "whole": lambda a: a,
    "some planes": lambda a: a[2:5],
    "some rows": lambda a: a[:, 3:7],
    "some columns": lambda a: a[:, :, 5:9],
    "every other row": lambda a: a[:, ::2],
    "every third column": lambda a: a[..., ::3],
    "transposed": lambda a: a.T,
    "axes moved": lambda a: np.moveaxis(a, 1, 0),
    "one element": lambda a: a[1:2, 2:3, 3:4],
    "nothing": lambda a: a[:, 4:4],
}


async def test_the_engine_knows_the_device(cuda: SimulatedCuda) -> None:
    async with kvferry.Engine("cuda") as engine:
        description = engine.describe()
    assert [d["kind"] for d in description["devices"]][:2] == ["host", "cuda"]
    assert not description["devices"][1]["broken"]
    assert description["pool"]["pinned"]


@pytest.mark.parametrize(
    ("devices", "ordinals"),
    [("cuda:1", [1]), ([0, 2], [0, 2]), ((2,), [2]), (range(3), [0, 1, 2]), ("auto", [0, 1, 2])],
)
async def test_only_the_devices_that_are_named_are_opened(
    simulated: SimulatedCuda, devices: kvferry.Devices, ordinals: list[int]
) -> None:
    simulated.set(devices=3)
    contexts = simulated.count("live_contexts")
    async with kvferry.Engine(devices) as engine:
        assert simulated.count("live_contexts") == contexts + len(ordinals)
        described = engine.describe()["devices"]
    assert [each["ordinal"] for each in described if each["kind"] == "cuda"] == ordinals
    assert simulated.count("live_contexts") == contexts


async def test_a_named_device_that_cannot_be_used_is_an_error(simulated: SimulatedCuda) -> None:
    with pytest.raises(kvferry.NoDevice, match="device 7: the CUDA driver shows 1"):
        kvferry.Engine([0, 7])


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("priority", ["background", "urgent"])
async def test_any_strides_go_out_and_come_back(
    cuda: SimulatedCuda, part: Callable[[NDArray[Any]], NDArray[Any]], priority: Any
) -> None:
    host = numbers()
    with cuda.array(host) as source, cuda.array(-host) as target:
        async with kvferry.Engine("cuda") as engine:
            shown = View(source, host, part(host))
            out = await engine.copy_out(shown, priority=priority)
            assert out.to_bytes() == part(host).tobytes()
            await engine.copy_in(View(target, host, part(host)), out, priority=priority)
            out.close()
        expected = -host
        part(expected)[...] = part(host)
        assert np.array_equal(target.download(), expected)


@pytest.mark.parametrize("pinned", [True, False])
async def test_a_large_array_moves_through_every_kind_of_buffer(
    cuda: SimulatedCuda, pinned: bool
) -> None:
    host = np.random.default_rng(1).integers(0, 2**16, (300, 7000), np.uint16)
    every_other = host[:, ::2]
    with cuda.array(host) as source, cuda.array(np.zeros_like(host)) as target:
        async with kvferry.Engine("cuda") as engine:
            into = await engine.allocate(host.nbytes) if pinned else bytearray(host.nbytes)
            await engine.copy_out(source, into)
            assert bytes(memoryview(np.asarray(into))) == host.tobytes()
            await engine.copy_in(target, into)
            assert np.array_equal(target.download(), host)
            out = await engine.copy_out(View(source, host, every_other))
            assert out.to_bytes() == every_other.tobytes()
            del into, out


async def test_arrays_of_the_device_and_of_the_host_travel_together(cuda: SimulatedCuda) -> None:
    host = numbers()
    with cuda.array(host) as first, cuda.array(host[0] * 3) as second:
        async with kvferry.Engine("cuda") as engine:
            packed = await engine.copy_out([first, b"between", second])
            assert packed.to_bytes() == host.tobytes() + b"between" + (host[0] * 3).tobytes()
            between = bytearray(7)
            first.upload(0)
            second.upload(0)
            await engine.copy_in([first, between, second], packed)
            packed.close()
        assert between == b"between"
        assert np.array_equal(first.download(), host)
        assert np.array_equal(second.download(), host[0] * 3)


@pytest.mark.parametrize("columns", [slice(None), slice(4096, 8192), slice(100, 300)])
async def test_arrays_of_many_allocations_travel_together(
    cuda: SimulatedCuda, columns: slice
) -> None:
    """Equal parts of neighbours look like rows of one array, but no copy may span two arrays."""
    if not ON_GPU:
        cuda.set(guard_pages=0)
    hosts = np.random.default_rng(3).integers(0, 256, (16, 2 << 20), np.uint8)
    with contextlib.ExitStack() as closing:
        arrays = [closing.enter_context(cuda.array(host)) for host in hosts]
        in_order = sorted(zip(arrays, hosts, strict=True), key=lambda one: one[0].address)
        shown = [View(array, host, host[columns]) for array, host in in_order]
        async with kvferry.Engine("cuda") as engine:
            out = await engine.copy_out(shown)
            assert out.to_bytes() == b"".join(host[columns].tobytes() for _, host in in_order)
            for array in arrays:
                array.upload(0)
            await engine.copy_in(shown, out)
            out.close()
        for array, host in in_order:
            expected = np.zeros_like(host)
            expected[columns] = host[columns]
            assert np.array_equal(array.download(), expected)


async def test_many_transfers_at_once(cuda: SimulatedCuda) -> None:
    host = np.random.default_rng(2).integers(0, 256, (24, 50_000), np.uint8)
    with cuda.array(host) as source, cuda.array(np.zeros_like(host)) as target:
        async with kvferry.Engine("cuda") as engine:

            async def through(row: int) -> None:
                out = await engine.copy_out(View(source, host, host[row]))
                await engine.copy_in(View(target, host, host[row]), out)

            async with anyio.create_task_group() as tasks:
                for row in range(len(host)):
                    tasks.start_soon(through, row)
        assert np.array_equal(target.download(), host)


async def test_what_is_wrong_is_said(cuda: SimulatedCuda) -> None:
    host = numbers()
    with cuda.array(host) as array:
        async with kvferry.Engine("cuda") as engine:
            with pytest.raises(kvferry.BufferTooSmall):
                await engine.copy_out(array, bytearray(host.nbytes - 1))
            with pytest.raises(kvferry.BufferTooSmall):
                await engine.copy_in(array, bytes(host.nbytes - 1))
            beyond = kvferry.Region(address=array.address, width=1 << 40)
            with pytest.raises((kvferry.Unreachable, kvferry.BufferTooSmall)):
                await engine.copy_out(beyond, bytearray(8))
            read_only = View(array, host, host)
            read_only.__cuda_array_interface__["data"] = (array.address, True)
            with pytest.raises(kvferry.InvalidArgument, match="read-only"):
                await engine.copy_in(read_only, bytes(host.nbytes))
            assert engine.describe()["jobs_in_flight"] == 0


# ---- Streams -------------------------------------------------------------------------------------


def on_stream(array: DeviceArray, stream: int | None) -> View:
    """Returns the array as a library describes it that has queued work on that stream."""
    shown = View(array, *[np.empty(array.shape, array.dtype)] * 2)
    shown.__cuda_array_interface__["stream"] = stream
    return shown


async def pass_by(engine: kvferry.Engine, array: DeviceArray) -> bytes:
    """Returns what a transfer without a stream reads from the array; it overtakes others."""
    return (await engine.copy_out(array, priority="urgent")).to_bytes()


async def assert_a_save_follows_the_stream(
    cuda: SimulatedCuda, default: int | None, device: int = 0
) -> None:
    """The stream, a new one or a default one, holds a copy into the array that is saved."""
    before, after = numbers(), -numbers()
    with cuda.array(before, device) as array, cuda.array(after, device) as computed:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream(default, device) as stream:
                stream.hold()
                stream.copy(array, computed)
                transfer = await engine.start_copy_out(on_stream(array, stream.handle))
                assert await pass_by(engine, array) == before.tobytes()
                stream.release()
                assert (await transfer.wait()).to_bytes() == after.tobytes()


@pytest.mark.parametrize("default", [None, 1, 2], ids=["a stream", "legacy", "per thread"])
async def test_a_save_follows_the_stream_that_the_array_names(
    cuda: SimulatedCuda, default: int | None
) -> None:
    await assert_a_save_follows_the_stream(cuda, default)


async def test_a_load_follows_the_stream_that_the_array_names(cuda: SimulatedCuda) -> None:
    before, after = numbers(), -numbers()
    with cuda.array(before) as array, cuda.array(np.zeros_like(before)) as reader:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream() as stream:
                stream.hold()
                stream.copy(reader, array)
                transfer = await engine.start_copy_in(on_stream(array, stream.handle), after)
                assert await pass_by(engine, array) == before.tobytes()
                stream.release()
                await transfer.wait()
            assert np.array_equal(reader.download(), before)
            assert np.array_equal(array.download(), after)


async def test_the_callers_stream_is_followed_and_not_the_one_that_is_named(
    cuda: SimulatedCuda,
) -> None:
    before, after = numbers(), -numbers()
    with cuda.array(before) as array, cuda.array(after) as computed:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream() as named, cuda.stream() as callers, anyio.fail_after(10):
                named.hold()
                callers.hold()
                callers.copy(array, computed)
                transfer = await engine.start_copy_out(
                    on_stream(array, named.handle), after_stream=callers.handle
                )
                assert await pass_by(engine, array) == before.tobytes()
                callers.release()
                assert (await transfer.wait()).to_bytes() == after.tobytes()
                named.release()  # a real driver frees nothing while a stream waits


async def test_arrays_that_name_no_stream_are_moved_at_once(cuda: SimulatedCuda) -> None:
    with cuda.array(numbers()) as array:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream(1) as legacy, anyio.fail_after(10):
                legacy.hold()
                moved = await engine.copy_out(on_stream(array, None))
                assert moved.to_bytes() == numbers().tobytes()


async def test_arrays_of_several_streams_need_one_stream(cuda: SimulatedCuda) -> None:
    host = numbers()
    with cuda.array(host) as first, cuda.array(host) as second:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream() as one, cuda.stream() as other:
                both = [on_stream(first, one.handle), on_stream(second, other.handle)]
                with pytest.raises(kvferry.InvalidArgument, match="pass it as after_stream"):
                    await engine.copy_out(both)
                packed = await engine.copy_out(both, after_stream=one.handle)
                assert packed.to_bytes() == host.tobytes() * 2
            # Arrays without a stream, or with the same one, do not name several streams.
            same = [on_stream(first, 1), on_stream(second, None), on_stream(second, 1)]
            assert (await engine.copy_out(same)).nbytes == 3 * host.nbytes


async def test_a_stream_that_cannot_be_followed_is_refused(simulated: SimulatedCuda) -> None:
    with simulated.array(numbers()) as array:
        async with kvferry.Engine("cuda") as engine:
            with pytest.raises(kvferry.InvalidArgument, match="stream 0"):
                await engine.copy_out(on_stream(array, 0))
            with pytest.raises(kvferry.InvalidArgument, match="knows this stream"):
                await engine.copy_out(array, after_stream=0xDEAD0)
            transfer = await engine.start_copy_out(array)
            with pytest.raises(kvferry.InvalidArgument):
                transfer.stream_wait(0xDEAD0)
            await transfer.wait()
        async with kvferry.Engine("host") as engine:
            with pytest.raises(kvferry.KvferryError, match="no CUDA device"):
                await engine.copy_out(b"host memory", after_stream=1)


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_stream_waits_for_a_transfer(cuda: SimulatedCuda, cancelled: bool) -> None:
    before, after = numbers(), -numbers()
    with cuda.array(before) as array, cuda.array(np.zeros_like(before)) as reader:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream() as held, cuda.stream() as waiting:
                held.hold()
                transfer = await engine.start_copy_in(array, after, after_stream=held.handle)
                transfer.stream_wait(waiting.handle)
                waiting.copy(reader, array)
                await anyio.sleep(0.02)
                assert not reader.download().any()
                if cancelled:
                    transfer.cancel()
                    with pytest.raises(kvferry.TransferCancelled):
                        await transfer.wait()
                else:
                    held.release()
                    await transfer.wait()
                waiting.synchronize()
                assert np.array_equal(reader.download(), before if cancelled else after)
                # The stream does not wait for a transfer that has ended.
                transfer.stream_wait(waiting.handle)
                waiting.synchronize()


@pytest.mark.parametrize("default", [1, 2], ids=["legacy", "per thread"])
async def test_a_default_stream_is_followed_on_whichever_device_it_holds_work(
    two_devices: SimulatedCuda, default: int
) -> None:
    await assert_a_save_follows_the_stream(two_devices, default, device=1)


# ---- Sequences: a cache on the host, beside a device --------------------------------------------


@pytest.fixture
def sequences(
    simulated: SimulatedCuda, make_context: Callable[..., Any]
) -> Iterator[tuple[c_interface.Attachment, Any]]:
    """An attachment and its context, whose sequence 0 has cells."""
    context = make_context("llama")
    context.decode(0, context.model.prompt(100))
    library = c_interface.Library(c_interface.LIBRARY)
    with library.engine() as engine, engine.attach(context.address) as attachment:
        yield attachment, context


def room_for(attachment: c_interface.Attachment, sequence: int) -> Any:
    return ctypes.create_string_buffer(attachment.size(sequence))


def passed_calls(attachment: c_interface.Attachment) -> int:
    """Returns how many calls of libllama were not recorded."""
    passed: int = json.loads(attachment.describe())["passed_calls"]
    return passed


async def test_a_snapshot_is_taken_after_the_streams_work(
    simulated: SimulatedCuda, sequences: tuple[c_interface.Attachment, Any]
) -> None:
    attachment, context = sequences
    buffer = room_for(attachment, 0)
    state = context.state_get(0)
    with simulated.stream() as stream, cf.ThreadPoolExecutor(1) as pool:
        stream.hold()
        save = pool.submit(
            attachment.save,
            0,
            buffer,
            stream=stream.handle,
            mode=c_interface.SaveMode.SNAPSHOT,
        )
        await anyio.sleep(0.05)
        assert not save.done()
        assert buffer.raw[-1000:] == bytes(1000)
        stream.release()
        assert save.result(20).wait() == "KVF_OK"
    assert buffer.raw == state


async def test_a_stream_that_nobody_knows_costs_a_sequence_nothing(
    sequences: tuple[c_interface.Attachment, Any],
) -> None:
    attachment, context = sequences
    state = context.state_get(0)
    for submit in (attachment.load, attachment.save):
        with pytest.raises(c_interface.Failure, match=r"KVF_ERR_INVALID_ARGUMENT.*this stream"):
            submit(0, ctypes.create_string_buffer(state, len(state)), stream=0xDEAD0)
        assert context.state_get(0) == state


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
async def test_on_a_lost_device_libllama_copies_nothing_itself(
    simulated: SimulatedCuda, sequences: tuple[c_interface.Attachment, Any], nth: int
) -> None:
    attachment, context = sequences
    state = context.state_get(0)
    passed = passed_calls(attachment)
    buffer = room_for(attachment, 0)

    # Asking the driver where a tensor is reports that the device is lost.
    simulated.fail("cuPointerGetAttributes", nth, Error.ECC_UNCORRECTABLE, forever=True)
    with pytest.raises(c_interface.Failure, match="KVF_ERR_DEVICE_LOST"):
        attachment.save(0, buffer)
    simulated.reset()
    simulated.fail("cuPointerGetAttributes", nth, Error.ECC_UNCORRECTABLE, forever=True)
    with pytest.raises(c_interface.Failure, match="KVF_ERR_DEVICE_LOST"):
        attachment.load(0, ctypes.create_string_buffer(state, len(state)))
    simulated.reset()
    assert passed_calls(attachment) == passed
    known_before_the_call = nth == 1
    assert context.pos_max(0) == (99 if known_before_the_call else -1)


async def test_nothing_is_attached_to_an_engine_with_a_lost_device(
    simulated: SimulatedCuda, make_context: Callable[..., Any]
) -> None:
    context = make_context("llama")
    context.decode(0, context.model.prompt(10))
    library = c_interface.Library(c_interface.LIBRARY)
    for call in ("cuStreamQuery", "cuPointerGetAttributes"):
        with library.engine() as engine:
            simulated.fail(call, error=Error.ECC_UNCORRECTABLE)
            with pytest.raises(c_interface.Failure, match="KVF_ERR_DEVICE_LOST"):
                engine.attach(context.address)


@pytest.mark.parametrize("engines", [1, 2])
async def test_attachments_to_one_context_know_of_each_others_transfers(
    simulated: SimulatedCuda, make_context: Callable[..., Any], engines: int
) -> None:
    context = make_context("llama")
    context.decode(0, context.model.prompt(100))
    state = ctypes.create_string_buffer(data := context.state_get(0), len(data))
    library = c_interface.Library(c_interface.LIBRARY)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(simulated.stream())
        opened = [stack.enter_context(library.engine()) for _ in range(engines)]
        one = stack.enter_context(opened[0].attach(context.address))
        other = stack.enter_context(opened[-1].attach(context.address))

        stream.hold()
        load = one.load(1, state, stream=stream.handle)
        for attempt in (
            lambda: other.save(1, room_for(other, 0)),
            lambda: other.load(1, state),
            lambda: other.remove(1),
        ):
            with pytest.raises(c_interface.Failure, match="KVF_ERR_BUSY"):
                attempt()
        load.cancel()
        assert load.wait() == "KVF_ERR_CANCELLED"
        # Its cells do not have their bytes: no save may read them.
        with pytest.raises(c_interface.Failure, match="KVF_ERR_SEQUENCE_EMPTY"):
            other.save(1, room_for(other, 0))
        assert one.settle() == 0

        save = other.save(0, room_for(other, 0), stream=stream.handle)
        with pytest.raises(c_interface.Failure, match="KVF_ERR_BUSY"):
            one.remove(0)
        stream.release()
        assert save.wait() == "KVF_OK"
        one.remove(0)


async def test_a_context_rests_while_blocking_calls_use_it(
    simulated: SimulatedCuda, make_context: Callable[..., Any]
) -> None:
    context = make_context("llama")
    context.decode(0, context.model.prompt(100))
    data = context.state_get(0)
    state = ctypes.create_string_buffer(data, len(data))
    library = c_interface.Library(c_interface.LIBRARY)
    with (
        library.engine() as engine,
        simulated.stream() as stream,
        engine.attach(context.address, c_interface.FORCE_BLOCKING) as blocking,
        engine.attach(context.address) as other,
    ):
        buffer = room_for(blocking, 0)
        stream.hold()
        cancelled = other.load(1, state, stream=stream.handle)
        job = blocking.save(0, buffer, stream=stream.handle)
        for attachment in (blocking, other):
            for attempt in (
                lambda on: on.size(0),
                lambda on: on.save(0, buffer),
                lambda on: on.load(2, state),
                lambda on: on.remove(2),
            ):
                with pytest.raises(c_interface.Failure, match="KVF_ERR_BUSY"):
                    attempt(attachment)
            assert attachment.settle() == 0
        cancelled.cancel()
        assert cancelled.wait() == "KVF_ERR_CANCELLED"
        with pytest.raises(c_interface.Failure, match="KVF_ERR_BUSY"):
            other.settle()
        with pytest.raises(c_interface.Failure, match="KVF_ERR_BUSY"):
            engine.attach(context.address)
        stream.release()
        assert job.wait() == "KVF_OK"
        assert buffer.raw == data
        assert blocking.settle() == 1
        assert context.pos_max(1) == -1
        assert other.size(0) == len(data)


async def test_blocking_calls_follow_a_stream(
    simulated: SimulatedCuda, make_context: Callable[..., Any]
) -> None:
    context = make_context("llama")
    context.decode(0, context.model.prompt(100))
    state = context.state_get(0)
    library = c_interface.Library(c_interface.LIBRARY)
    with (
        library.engine() as engine,
        simulated.stream() as stream,
        engine.attach(context.address, c_interface.FORCE_BLOCKING) as attachment,
    ):
        for cancelled in (False, True):
            buffer = room_for(attachment, 0)
            stream.hold()
            job = attachment.save(0, buffer, stream=stream.handle)
            await anyio.sleep(0.02)
            assert not job.done
            if cancelled:
                job.cancel()
                assert job.wait() == "KVF_ERR_CANCELLED"
            stream.release()
            if not cancelled:
                assert job.wait() == "KVF_OK"
                assert buffer.raw == state


# ---- DLPack --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(1, 0), None], ids=["version 1", "older"])
@pytest.mark.parametrize("kind", [dlpack.CUDA, dlpack.CUDA_MANAGED])
async def test_a_dlpack_array_is_saved_after_its_librarys_work(
    cuda: SimulatedCuda, kind: int, version: tuple[int, int] | None
) -> None:
    before, after = numbers(), -numbers()
    with cuda.array(before) as array, cuda.array(after) as computed:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream() as librarys:
                shown = LibraryArray(
                    before,
                    array.address,
                    device=(kind, 0),
                    version=version,
                    make_wait=librarys.make_wait,
                )
                librarys.hold()
                librarys.copy(array, computed)
                transfer = await engine.start_copy_out(shown)
                assert [request["stream"] for request in shown.requests] == [1]
                assert await pass_by(engine, array) == before.tobytes()
                assert shown.given_back == 0
                librarys.release()
                assert (await transfer.wait()).to_bytes() == after.tobytes()
                assert shown.given_back == 1


async def test_an_interface_that_names_no_stream_is_asked_for_one_by_dlpack(
    cuda: SimulatedCuda,
) -> None:
    """An array with both protocols, and version 2 of the interface, as PyTorch's tensors have."""
    before, after = numbers(), -numbers()
    with cuda.array(before) as array, cuda.array(after) as computed:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream() as librarys:
                shown = LibraryArray(
                    before, array.address, device=(dlpack.CUDA, 0), make_wait=librarys.make_wait
                )
                interface = dict(array.__cuda_array_interface__)
                interface.pop("stream", None)
                shown.__cuda_array_interface__ = interface
                librarys.hold()
                librarys.copy(array, computed)
                transfer = await engine.start_copy_out(shown)
                librarys.release()
                assert (await transfer.wait()).to_bytes() == after.tobytes()
                assert [request["stream"] for request in shown.requests] == [1]
                await engine.copy_in(shown, before.tobytes())
                assert np.array_equal(array.download(), before)


async def test_dlpack_arrays_join_the_stream_that_is_followed(cuda: SimulatedCuda) -> None:
    host = numbers()
    with cuda.array(host) as array:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream() as stream:
                for expected, named, callers in [
                    (stream.handle, stream.handle, None),
                    (stream.handle, 1, stream.handle),
                    (2, None, 2),
                    (1, None, 0),  # CUDA also calls the legacy stream 0, DLPack does not
                ]:
                    shown = LibraryArray(host, array.address, device=(dlpack.CUDA, 0))
                    both = [shown, on_stream(array, named)]
                    out = await engine.copy_out(both, after_stream=callers)
                    assert out.to_bytes() == host.tobytes() * 2
                    assert [request["stream"] for request in shown.requests] == [expected]


async def test_a_load_into_a_dlpack_array(cuda: SimulatedCuda) -> None:
    host = numbers()
    part = host[:, ::2]
    with cuda.array(np.zeros_like(host)) as array:
        async with kvferry.Engine("cuda") as engine:
            shown = LibraryArray(part, array.address, device=(dlpack.CUDA, 0))
            await engine.copy_in(shown, part.tobytes())
            assert shown.requests[0]["copy"] is False
            assert shown.given_back == 1
        expected = np.zeros_like(host)
        expected[:, ::2] = part
        assert np.array_equal(array.download(), expected)


async def test_a_dlpack_array_is_released_once_however_its_transfer_ends(
    simulated: SimulatedCuda,
) -> None:
    host = numbers()
    with simulated.array(host) as array:
        async with kvferry.Engine("cuda") as engine:
            shown = LibraryArray(host, array.address, device=(dlpack.CUDA, 0))
            with pytest.raises(kvferry.BufferTooSmall):
                await engine.copy_out(shown, bytearray(1))
            gc.collect()
            assert shown.given_back == 1

            simulated.hold()
            transfer = await engine.start_copy_out(shown)
            await anyio.to_thread.run_sync(simulated.wait_held)
            transfer.cancel()
            gc.collect()
            assert shown.given_back == 1  # the device still reads it
            simulated.release()
            with contextlib.suppress(kvferry.TransferCancelled):
                await transfer.wait()
            del transfer
            gc.collect()
            assert shown.given_back == 2


# ---- Faults --------------------------------------------------------------------------------------


async def test_a_failed_copy_is_told_and_the_engine_goes_on(simulated: SimulatedCuda) -> None:
    host = numbers()
    with simulated.array(host) as array:
        async with kvferry.Engine("cuda") as engine:
            simulated.fail("cuMemcpyDtoHAsync", error=Error.INVALID_VALUE)
            with pytest.raises(kvferry.KvferryError, match="cuMemcpyDtoHAsync") as failure:
                await engine.copy_out(array)
            assert failure.value.name == "KVF_ERR_DEVICE"
            assert (await engine.copy_out(array)).to_bytes() == host.tobytes()


async def test_no_memory_to_pin(simulated: SimulatedCuda) -> None:
    host = numbers()
    with simulated.array(host) as array:
        async with kvferry.Engine("cuda") as engine:
            simulated.set(pinned_limit=simulated.count("pinned_bytes"))
            with pytest.raises((MemoryError, kvferry.KvferryError)):
                await engine.copy_out(array)
            simulated.set(pinned_limit=2**64 - 1)
            assert (await engine.copy_out(array)).to_bytes() == host.tobytes()


async def test_a_cancelled_task_waits_for_the_copy_under_way(simulated: SimulatedCuda) -> None:
    host = numbers()
    with simulated.array(host) as array:
        async with kvferry.Engine("cuda") as engine:
            buffer = await engine.allocate(host.nbytes)
            simulated.hold()

            async def release_later() -> None:
                await anyio.to_thread.run_sync(simulated.wait_held)
                scope.cancel()
                await anyio.sleep(0.02)
                assert buffer.jobs == 1  # the device still writes into it
                simulated.release()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(release_later)
                with anyio.CancelScope() as scope:
                    await engine.copy_out(array, buffer)
            assert scope.cancelled_caught
            assert buffer.jobs == 0
            buffer.close()


async def test_a_lost_device_is_an_exception_of_its_own(simulated: SimulatedCuda) -> None:
    simulated.set(devices=2)
    host = numbers()
    with simulated.array(host, device=1) as array, simulated.array(host) as other:
        async with kvferry.Engine("cuda") as engine:
            simulated.hold()
            transfer = await engine.start_copy_out(array)
            await anyio.to_thread.run_sync(simulated.wait_held)
            simulated.lose_device(1)
            with pytest.raises(kvferry.DeviceLost, match="CUDA_ERROR_ECC_UNCORRECTABLE"):
                await transfer.wait()
            simulated.release()
            with pytest.raises(kvferry.DeviceLost):
                await engine.copy_out(array)
            assert [d.get("broken") for d in engine.describe()["devices"]] == [None, False, True]
            assert (await engine.copy_out(other)).to_bytes() == host.tobytes()
        # The test's own context of the device is lost too.
        with pytest.raises(Exception, match="214"):
            array.close()
    release_second_device(simulated)


# ---- With PyTorch and transformers ---------------------------------------------------------------


def missing_for_transformers() -> str:
    """Returns why the test below cannot run here, or ""."""
    for module in ("torch", "transformers"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    import torch

    return "" if ON_GPU and torch.cuda.is_available() else "PyTorch finds no GPU"


def cache_tensors(cache: Any) -> list[Any]:
    """Returns the keys and values of a DynamicCache, whose names depend on the version."""
    if hasattr(cache, "layers"):
        return [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return [*cache.key_cache, *cache.value_cache]


@pytest.mark.skipif(bool(missing_for_transformers()), reason=missing_for_transformers())
async def test_a_transformers_cache_is_saved_beside_decoding_and_loaded_back() -> None:
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config).to("cuda", torch.float16).eval()
    stop = False

    @torch.no_grad()
    def step(cache: DynamicCache, tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1]
        torch.cuda.current_stream().synchronize()
        return logits

    def decode_another() -> int:
        """Decodes another request until told to stop; returns the number of tokens."""
        cache, tokens = DynamicCache(), torch.randint(1000, (1, 64), device="cuda")
        count = 0
        while not stop:
            tokens = step(cache, tokens).argmax(-1, keepdim=True)
            count += 1
        return count

    cache, prompt = DynamicCache(), torch.randint(1000, (1, 2000), device="cuda")
    token = step(cache, prompt).argmax(-1, keepdim=True)
    tensors = cache_tensors(cache)
    before = [tensor.clone() for tensor in tensors]
    decoded = 0

    async def decode() -> None:
        nonlocal decoded
        decoded = await anyio.to_thread.run_sync(decode_another)

    async with kvferry.Engine("cuda") as engine, anyio.create_task_group() as tasks:
        tasks.start_soon(decode)
        try:
            saved = await engine.copy_out(tensors)
            for tensor in tensors:
                tensor.zero_()
            torch.cuda.synchronize()
            await engine.copy_in(tensors, saved)
        finally:
            stop = True
    assert decoded > 0
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))

    # The next token is the one that the request would have got.
    untouched = DynamicCache()
    step(untouched, prompt)
    assert torch.equal(step(cache, token), step(untouched, token))
