"""The engine's options, its description, its memory, and the texts of its errors."""

import gc
from typing import Any

import anyio
import kvferry
import numpy as np
import pytest
from kvferry._native import ffi, lib
from support.event_loops import anyio_backend  # noqa: F401

pytestmark = pytest.mark.anyio


def test_the_version_is_the_librarys() -> None:
    assert kvferry.__version__ == ffi.string(lib.kvf_version()).decode()


async def test_an_engine_describes_itself() -> None:
    async with kvferry.Engine("host", copy_threads=3, pinned_limit=1 << 20) as engine:
        description = engine.describe()
    assert description["version"] == kvferry.__version__
    assert description["pool"]["limit"] == 1 << 20
    assert description["devices"][0]["kind"] == "host"
    assert description["devices"][0]["copy_threads"] == 3


@pytest.mark.parametrize(
    "devices",
    ["gpu", "", "cuda:", "cuda:-1", "cuda:0x", "cuda:64", [], [-1], [64], ["0"], [0.0], 0, None],
)
async def test_devices_that_cannot_be_meant_are_refused(devices: Any) -> None:
    with pytest.raises(
        ValueError, match="'auto', 'host', 'cuda', one CUDA device such as 'cuda:0'"
    ):
        kvferry.Engine(devices)


async def test_unknown_options_are_refused() -> None:
    async with kvferry.Engine("host") as engine:
        with pytest.raises(ValueError, match="'background' or 'urgent'"):
            await engine.copy_out(b"anything", priority="high")  # type: ignore[arg-type]
        assert (await engine.copy_out(b"anything")).to_bytes() == b"anything"


@pytest.mark.parametrize("priority", ["background", "urgent"])
async def test_both_priorities_move_the_bytes(priority: kvferry.Priority) -> None:
    source = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    target = np.zeros_like(source)
    async with kvferry.Engine("host") as engine:
        buffer = await engine.copy_out(source, priority=priority)
        await engine.copy_in(target, buffer, priority=priority)
    assert np.array_equal(source, target)


async def test_a_completion_tells_how_the_transfer_went() -> None:
    async with kvferry.Engine("host") as engine:
        transfer = await engine.start_copy_out(np.zeros((100, 64), np.uint8)[:, :32])
        assert transfer.completion is None or transfer.done
        await transfer.wait()
    completion = transfer.completion
    assert completion is not None
    assert (completion.status, completion.bytes, completion.detail) == (0, 3200, "")
    assert completion.fragments == 100
    assert completion.segments == 1
    assert completion.submitted_ns <= completion.started_ns <= completion.finished_ns


async def test_the_trace_accounts_for_every_byte() -> None:
    async with kvferry.Engine("host", trace=True) as engine:
        source = np.zeros(5_000_000, np.uint8)
        buffer = await engine.copy_out(source)
        await engine.copy_in(source, buffer)
        events = engine.trace()
        assert engine.trace() == []
    for direction in ("save", "load"):
        assert sum(e.bytes for e in events if e.direction == direction) == source.size
    assert all(event.begin_ns <= event.end_ns for event in events)
    assert {event.device for event in events} == {0}


async def test_without_tracing_there_is_no_trace() -> None:
    async with kvferry.Engine("host") as engine:
        with pytest.raises(kvferry.KvferryError, match="not supported here"):
            engine.trace()


async def test_the_limit_of_pinned_memory_holds_and_closing_a_buffer_makes_room() -> None:
    async with kvferry.Engine("host", pinned_limit=1 << 20) as engine:
        buffer = await engine.allocate(1 << 20)
        with pytest.raises(
            kvferry.PinnedLimit, match="reached: 1 MiB of 1 MiB taken, 512 KiB wanted"
        ):
            await engine.allocate(512 << 10)
        buffer.close()
        again = await engine.allocate(1 << 20)
        assert again.nbytes == 1 << 20


async def test_a_view_keeps_pool_memory_from_being_used_again() -> None:
    async with kvferry.Engine("host", pinned_limit=1 << 20) as engine:
        buffer = await engine.allocate(1 << 20)
        view = buffer.numpy()[100:]
        del buffer
        gc.collect()
        view[:] = 7
        with pytest.raises(kvferry.PinnedLimit):
            await engine.allocate(1 << 20)
        assert np.all(view == 7)
        del view
        await engine.allocate(1 << 20)


async def test_a_buffer_in_use_cannot_be_closed() -> None:
    async with kvferry.Engine("host", copy_threads=1) as engine:
        slow = np.zeros(1 << 28, np.uint8)[::2]
        buffer = await engine.allocate(slow.size)
        transfer = await engine.start_copy_out(slow, buffer)
        with pytest.raises(kvferry.Busy):
            buffer.close()
        transfer.cancel()
        with pytest.raises(kvferry.TransferCancelled):
            await transfer.wait()
        buffer.close()
        buffer.close()
        with pytest.raises(kvferry.KvferryError, match="closed"):
            _ = buffer.view


async def test_attaching_to_what_is_no_context_is_refused() -> None:
    async with kvferry.Engine("host") as engine:
        with pytest.raises(TypeError, match=r"llama_cpp\.Llama"):
            engine.attach("text")
        with pytest.raises(kvferry.ContextFreed):
            engine.attach(0)


@pytest.mark.parametrize(
    "status", [number for name, number in vars(lib).items() if name.startswith("KVF_ERR_")]
)
def test_each_status_has_an_exception_with_the_librarys_text(status: int) -> None:
    error = kvferry.errors.error(status, "the detail")
    assert error.status == status
    assert error.name == ffi.string(lib.kvf_status_name(status)).decode()
    assert str(error) == ffi.string(lib.kvf_strerror(status)).decode() + ": the detail"


async def test_memory_comes_back_without_the_help_of_the_collector() -> None:
    """No reference cycle keeps a buffer after success, errors or cancellation."""
    source = np.zeros(1 << 20, np.uint8)
    async with kvferry.Engine("host", pinned_limit=4 << 20) as engine:
        gc.collect()
        gc.disable()
        try:
            for _ in range(100):
                await engine.copy_out(source)
                with anyio.move_on_after(0):
                    await engine.copy_out(source)
                with pytest.raises(kvferry.BufferTooSmall):
                    await engine.copy_in(source, await engine.allocate(1 << 19))
        finally:
            gc.enable()


# ---- Memory of the engine's and of the caller's --------------------------------------------------


async def test_trimming_gives_idle_memory_back() -> None:
    async with kvferry.Engine("host") as engine:
        (await engine.allocate(1 << 20)).close()
        kept = await engine.allocate(1 << 22)
        mapped = engine.describe()["pool"]["mapped"]
        await engine.trim()
        assert engine.describe()["pool"]["mapped"] == mapped - (1 << 20)
        kept.numpy()[:] = 1


async def test_trimming_a_closed_engine_is_refused() -> None:
    async with kvferry.Engine("host") as engine:
        pass
    with pytest.raises(kvferry.EngineClosed):
        await engine.trim()


async def test_memory_of_the_callers_is_registered_until_it_is_closed() -> None:
    memory = bytearray(1 << 16)
    async with kvferry.Engine("host") as engine:
        registered = await engine.register(memory)
        with pytest.raises(kvferry.Busy):
            await engine.register(memory)
        with pytest.raises(BufferError):
            memory.append(0)  # it must stay where it is
        await engine.copy_out(b"\1" * 100, into=registered)
        assert memory[:101] == b"\1" * 100 + b"\0"
        registered.close()
        memory.append(0)
        (await engine.register(memory)).close()


async def test_registered_memory_that_is_dropped_is_registered_no_more() -> None:
    memory = np.zeros(1 << 16, np.uint8)
    async with kvferry.Engine("host") as engine:
        view = (await engine.register(memory)).view
        gc.collect()
        with pytest.raises(kvferry.Busy):
            await engine.register(memory)
        del view
        gc.collect()
        (await engine.register(memory)).close()


async def test_registered_memory_outlives_its_engine() -> None:
    memory = np.zeros(1 << 16, np.uint8)
    async with kvferry.Engine("host") as engine:
        registered = await engine.register(memory)
    registered.numpy()[:] = 3
    registered.close()
    assert np.all(memory == 3)
    async with kvferry.Engine("host") as engine:
        (await engine.register(memory)).close()


async def test_what_cannot_be_written_cannot_be_registered() -> None:
    async with kvferry.Engine("host") as engine:
        with pytest.raises(ValueError, match="memory is read-only"):
            await engine.register(bytes(4096))


# ---- What objects say of themselves --------------------------------------------------------------


async def test_each_object_says_what_it_is() -> None:
    async with kvferry.Engine("host", copy_threads=1) as engine:
        assert repr(engine) == "<Engine 'host', no transfer in flight>"
        slow = np.zeros(1 << 28, np.uint8)[::2]
        buffer = await engine.allocate(slow.size)
        assert repr(buffer) == f"<Buffer of {slow.size} bytes>"
        transfer = await engine.start_copy_out(slow, buffer)
        assert repr(engine) == "<Engine 'host', 1 transfer in flight>"
        assert repr(buffer) == f"<Buffer of {slow.size} bytes, in use>"
        assert repr(transfer) == f"<Transfer of {slow.size} bytes, in flight>"
        transfer.cancel()
        assert repr(transfer) == f"<Transfer of {slow.size} bytes, in flight, to be cancelled>"
        with pytest.raises(kvferry.TransferCancelled):
            await transfer.wait()
        assert repr(transfer) == f"<Transfer of {slow.size} bytes: the job was cancelled>"
        done = await engine.start_copy_out(b"anything")
        await done.wait()
        assert repr(done) == "<Transfer of 8 bytes, done>"
    assert repr(engine) == "<Engine 'host', closed>"
    buffer.close()
    assert repr(buffer) == f"<Buffer of {slow.size} bytes, closed>"


def test_a_region_says_its_address_as_debuggers_do() -> None:
    region = kvferry.Region(0x7F00_0000_1000, 64, rows=2, pitch=128, buffer_pitch=64)
    assert repr(region) == (
        "Region(address=0x7f0000001000, width=64, rows=2, pitch=128, offset=0, buffer_pitch=64)"
    )
    assert eval(repr(region), {"Region": kvferry.Region}) == region
