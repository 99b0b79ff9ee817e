"""The bridge between the C library's queue and the event loop: who waits, reads, is woken."""

import asyncio
import gc
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import anyio
import kvferry
import numpy as np
import pytest
import uvloop
from kvferry._native import ffi, lib
from support.event_loops import anyio_backend  # noqa: F401

pytestmark = pytest.mark.anyio


def _block_until_idle(engine: kvferry.Engine) -> None:
    """Blocks the event loop, so that no task reads, until every job has ended."""
    while engine.describe()["jobs_in_flight"]:
        time.sleep(0.001)


async def test_each_of_many_tasks_gets_its_own_bytes() -> None:
    sources = np.random.default_rng(0).integers(0, 256, (3000, 512), np.uint8)
    seen: dict[int, bytes] = {}

    async with kvferry.Engine("host") as engine:

        async def copy(index: int) -> None:
            seen[index] = (await engine.copy_out(sources[index])).to_bytes()

        async with anyio.create_task_group() as tasks:
            for index in range(len(sources)):
                tasks.start_soon(copy, index)
    assert seen == {index: source.tobytes() for index, source in enumerate(sources)}


async def test_waiting_takes_no_threads() -> None:
    sources = np.ones((500, 4096), np.uint8)
    async with kvferry.Engine("host") as engine:
        await engine.copy_out(sources[0])  # starts the thread that allocates
        before = threading.active_count()
        transfers = [await engine.start_copy_out(source) for source in sources]
        async with anyio.create_task_group() as tasks:
            for transfer in transfers:
                tasks.start_soon(transfer.wait)
            await anyio.lowlevel.checkpoint()
            assert threading.active_count() <= before


async def test_several_tasks_may_wait_for_one_transfer() -> None:
    async with kvferry.Engine("host") as engine:
        transfer = await engine.start_copy_out(np.ones(1 << 22, np.uint8))
        results: list[kvferry.Buffer] = []

        async def wait() -> None:
            results.append(await transfer.wait())

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(wait)
        assert len(results) == 5
        assert all(result is results[0] for result in results)
        assert await transfer.wait() is results[0]


@pytest.mark.parametrize("leaving", [0, 1, 2])
async def test_others_are_served_when_a_waiting_task_leaves(leaving: int) -> None:
    """Cancels any of the tasks, also the one that reads for all."""
    slow = np.zeros(1 << 26, np.uint8)[::2]  # rows of one byte
    async with kvferry.Engine("host", copy_threads=1) as engine:
        gates = [anyio.CancelScope() for _ in range(3)]
        served: list[int] = []

        async def wait(index: int, transfer: kvferry.Transfer[kvferry.Buffer]) -> None:
            with gates[index]:
                await transfer.wait()
                served.append(index)

        transfers = [await engine.start_copy_out(slow) for _ in gates]
        async with anyio.create_task_group() as tasks:
            for index, transfer in enumerate(transfers):
                tasks.start_soon(wait, index, transfer)
            await anyio.wait_all_tasks_blocked()
            gates[leaving].cancel()
        assert {0, 1, 2} - {leaving} <= set(served)


async def test_a_transfer_that_nobody_waits_for_releases_its_memory() -> None:
    async with kvferry.Engine("host") as engine:
        target = bytearray(4096)
        await engine.start_copy_out(np.ones(4096, np.uint8), target)
        gc.collect()
        with pytest.raises(BufferError):
            target.append(0)  # still borrowed, whether or not all bytes have been copied
        _block_until_idle(engine)
        await engine.copy_out(b"anything")  # takes the other completion too
        target.append(0)
        assert target[:-1] == b"\1" * 4096


async def test_completions_wait_for_a_slow_loop() -> None:
    async with kvferry.Engine("host") as engine:
        sources = np.arange(1000, dtype=np.uint64)
        transfers = [await engine.start_copy_out(sources[i : i + 1]) for i in range(1000)]
        _block_until_idle(engine)
        values = [int((await each.wait()).numpy().view(np.uint64)[0]) for each in transfers]
        assert values == list(range(1000))


async def test_a_second_event_loop_at_the_same_time_is_refused() -> None:
    slow = np.zeros(1 << 28, np.uint8)[::2]
    async with kvferry.Engine("host", copy_threads=1) as engine:
        transfers = [await engine.start_copy_out(slow) for _ in range(8)]

        async def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="one event loop at a time"):
                await engine.copy_out(b"anything")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(transfers[-1].wait)
            await anyio.wait_all_tasks_blocked()
            with ThreadPoolExecutor(1) as pool:
                pool.submit(anyio.run, elsewhere).result()
            for transfer in transfers:
                transfer.cancel()
            tasks.cancel_scope.cancel()


def test_one_engine_may_serve_one_loop_after_another() -> None:
    engine = kvferry.Engine("host")

    async def copy() -> bytes:
        return (await engine.copy_out(b"anything")).to_bytes()

    assert anyio.run(copy, backend="asyncio") == b"anything"
    assert anyio.run(copy, backend="trio") == b"anything"
    anyio.run(engine.aclose)


def waiting_on_a_closed_loop(
    engine: kvferry.Engine, loop: asyncio.AbstractEventLoop
) -> list[asyncio.Task[kvferry.Buffer]]:
    """Tasks that wait for transfers, and whose loop has been closed meanwhile."""
    slow = np.zeros(1 << 26, np.uint8)[::2]
    tasks = []

    async def start() -> None:
        for _ in range(3):
            tasks.append(asyncio.create_task(engine.copy_out(slow, bytearray(slow.size))))
        await anyio.wait_all_tasks_blocked()

    loop.run_until_complete(start())
    loop.close()
    return tasks


@pytest.mark.parametrize("use_uvloop", [False, True])
@pytest.mark.parametrize("afterwards", ["use", "close"])
def test_a_loop_that_was_closed_under_waiting_tasks_is_forgotten(
    use_uvloop: bool, afterwards: str
) -> None:
    engine = kvferry.Engine("host", copy_threads=1)

    async def use() -> None:
        assert (await engine.copy_out(b"anything")).to_bytes() == b"anything"

    tasks = waiting_on_a_closed_loop(
        engine, uvloop.new_event_loop() if use_uvloop else asyncio.new_event_loop()
    )
    if afterwards == "use":
        anyio.run(use, backend="trio")
        anyio.run(use, backend="asyncio")
    anyio.run(engine.aclose, backend="trio")
    for task in tasks:
        task._log_destroy_pending = False
    tasks.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", pytest.PytestUnraisableExceptionWarning)
        gc.collect()


def test_tasks_of_a_closed_loop_that_are_collected_first_disturb_nobody() -> None:
    engine = kvferry.Engine("host", copy_threads=1)
    tasks = waiting_on_a_closed_loop(engine, asyncio.new_event_loop())
    for task in tasks:
        task._log_destroy_pending = False
    del task
    tasks.clear()
    gc.collect()
    anyio.run(engine.aclose)


async def test_a_loop_that_still_runs_keeps_the_engine() -> None:
    """Closing the engine from another loop is refused, and changes nothing."""
    slow = np.zeros(1 << 28, np.uint8)[::2]
    async with kvferry.Engine("host", copy_threads=1) as engine:
        transfer = await engine.start_copy_out(slow)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(transfer.wait)
            await anyio.wait_all_tasks_blocked()
            with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="one event loop"):
                pool.submit(anyio.run, engine.aclose).result()
            tasks.cancel_scope.cancel()
        await engine.copy_out(b"anything")


def test_a_queue_keeps_completions_that_nobody_takes() -> None:
    """Nothing blocks and nothing is lost, also after the engine has been destroyed."""
    queue, handle = ffi.new("kvf_queue *"), ffi.new("kvf_engine *")
    assert lib.kvf_queue_create(queue) == lib.KVF_OK
    assert lib.kvf_engine_create(ffi.NULL, handle) == lib.KVF_OK
    memory = ffi.new("uint8_t[]", 64)
    region = ffi.new(
        "kvf_region *", {"address": int(ffi.cast("uintptr_t", memory)), "width": 16, "rows": 1}
    )
    options = ffi.new(
        "kvf_submit_options *", {"size": ffi.sizeof("kvf_submit_options"), "queue": queue[0]}
    )
    target = ffi.new("uint8_t[]", 16)
    for number in range(20_000):
        options.user_data = number
        assert (
            lib.kvf_regions_save(handle[0], region, 1, target, 16, options, ffi.NULL) == lib.KVF_OK
        )
    assert lib.kvf_engine_destroy(handle[0]) == lib.KVF_OK
    records = ffi.new("kvf_completion[]", 1000)
    numbers = []
    while count := lib.kvf_queue_take(queue[0], records, ffi.sizeof("kvf_completion"), 1000, 0):
        numbers += [records[index].user_data for index in range(count)]
    assert sorted(numbers) == list(range(20_000))
    assert lib.kvf_queue_destroy(queue[0]) == lib.KVF_OK
