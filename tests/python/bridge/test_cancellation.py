"""Cancelling a task cancels its job, and goes on after the job's completion."""

import asyncio
import random
import threading
import time
from collections import Counter

import anyio
import kvferry
import numpy as np
import pytest
from kvferry._native import ffi, lib
from support.event_loops import anyio_backend  # noqa: F401

pytestmark = pytest.mark.anyio

SLOW = np.zeros(1 << 28, np.uint8)[::2]
"""128 Mi rows of one byte: a copy of it is in flight for a while."""


async def test_a_cancelled_task_sees_only_its_frameworks_cancellation() -> None:
    async with kvferry.Engine("host", copy_threads=1) as engine:
        buffer = await engine.allocate(SLOW.size)
        with anyio.move_on_after(0.01) as scope:
            await engine.copy_out(SLOW, buffer)
        assert scope.cancelled_caught
        # The job has ended, and does not use the memory any more.
        assert buffer.jobs == 0
        buffer.close()


async def test_a_task_that_has_been_cancelled_submits_nothing() -> None:
    async with kvferry.Engine("host", trace=True) as engine:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await engine.copy_out(b"anything", bytearray(8))
        assert scope.cancelled_caught
        with anyio.CancelScope() as scope:
            scope.cancel()
            await engine.copy_in(bytearray(8), b"anything")
        assert scope.cancelled_caught
        with anyio.CancelScope() as scope:
            scope.cancel()
            await engine.allocate(1)
        assert scope.cancelled_caught
        assert engine.trace() == []


async def test_a_transfer_cancelled_by_name_says_so() -> None:
    async with kvferry.Engine("host", copy_threads=1) as engine:
        transfer = await engine.start_copy_out(SLOW)
        transfer.cancel()
        transfer.cancel()
        with pytest.raises(kvferry.TransferCancelled):
            await transfer.wait()
        assert transfer.done
        transfer.cancel()  # too late, and allowed


async def test_cancelling_what_has_ended_changes_nothing() -> None:
    async with kvferry.Engine("host") as engine:
        transfer = await engine.start_copy_out(b"anything")
        await transfer.wait()
        transfer.cancel()
        assert (await transfer.wait()).to_bytes() == b"anything"


async def test_thousands_of_cancelled_tasks_leave_nothing_behind() -> None:
    source = np.ones(1 << 16, np.uint8)
    outcomes: Counter[str] = Counter()
    pace = random.Random(0)
    async with kvferry.Engine("host") as engine:

        async def copy(target: bytearray) -> None:
            outcome = "cancelled"
            with anyio.CancelScope() as scope:
                scope.deadline = anyio.current_time() + pace.random() * 0.2
                await engine.copy_out(source, target)
                outcome = "done"
            outcomes[outcome] += 1
            target.append(0)  # raises BufferError if a job still uses it

        async with anyio.create_task_group() as tasks:
            for _ in range(2000):
                tasks.start_soon(copy, bytearray(source.size))
        assert outcomes.total() == 2000


async def test_a_call_that_has_not_begun_is_cancelled_and_one_that_has_is_awaited() -> None:
    async with kvferry.Engine("host") as engine:
        worker = engine._core.memory_worker
        began, release = threading.Event(), threading.Event()
        calls: list[str] = []

        def begun() -> None:
            began.set()
            release.wait()
            calls.append("begun")

        async def cancelled(function: object, scope: anyio.CancelScope) -> None:
            with scope:
                await worker.call(function)
            calls.append(f"{function.__name__} given up")

        def waiting() -> None:
            calls.append("never")

        scopes = [anyio.CancelScope(), anyio.CancelScope()]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cancelled, begun, scopes[0])
            assert await anyio.to_thread.run_sync(began.wait, 10)
            tasks.start_soon(cancelled, waiting, scopes[1])
            await anyio.wait_all_tasks_blocked()
            for scope in scopes:
                scope.cancel()
            await anyio.sleep(0.01)
            assert calls == ["waiting given up"]
            release.set()
        assert calls == ["waiting given up", "begun", "begun given up"]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_native_cancellation_waits_for_the_completion_however_often_it_comes(times: int) -> None:
    async def main() -> None:
        async with kvferry.Engine("host", copy_threads=1) as engine:
            buffer = await engine.allocate(SLOW.size)
            task = asyncio.create_task(engine.copy_out(SLOW, buffer))
            await asyncio.sleep(0.01)
            for _ in range(times):
                task.cancel()
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await task
            assert task.cancelled()
            assert buffer.jobs == 0

    asyncio.run(main())


def test_a_task_that_waits_for_a_long_call_may_be_cancelled_a_thousand_times() -> None:
    """Cancels in each turn of the loop; each time the wait goes on."""

    async def main() -> None:
        async with kvferry.Engine("host") as engine:
            worker = engine._core.memory_worker
            began, release = threading.Event(), threading.Event()

            def long() -> None:
                began.set()
                release.wait()

            task = asyncio.create_task(worker.call(long))
            await asyncio.to_thread(began.wait)
            for number in range(1500):
                task.cancel(f"number {number}")
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            assert not task.done()
            release.set()
            with pytest.raises(asyncio.CancelledError, match="number 1499"):
                await task

    asyncio.run(main())


def test_a_timeout_of_asyncio_is_its_timeout() -> None:
    async def main() -> None:
        async with kvferry.Engine("host", copy_threads=1) as engine:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(engine.copy_out(SLOW), 0.01)

    asyncio.run(main())


def test_a_cancelled_job_completes_exactly_once_in_100_000_tries() -> None:
    """Uses the C library directly: two threads submit and cancel, and one takes completions."""
    batch, batches = 500, 200
    queue, engine = ffi.new("kvf_queue *"), ffi.new("kvf_engine *")
    assert lib.kvf_queue_create(queue) == lib.KVF_OK
    assert lib.kvf_engine_create(ffi.NULL, engine) == lib.KVF_OK
    source, target = np.ones(1 << 14, np.uint8), np.zeros(1 << 14, np.uint8)
    region = ffi.new(
        "kvf_region *", {"address": source.ctypes.data, "width": source.size, "rows": 1}
    )
    memory = ffi.from_buffer("uint8_t[]", target, require_writable=True)
    options = ffi.new(
        "kvf_submit_options *", {"size": ffi.sizeof("kvf_submit_options"), "queue": queue[0]}
    )
    records = ffi.new("kvf_completion[]", batch)
    seen: Counter[int] = Counter()
    statuses: Counter[int] = Counter()
    pace = random.Random(0)
    for first in range(0, batch * batches, batch):
        jobs = ffi.new("kvf_job[]", batch)

        def cancel(jobs: object = jobs, delay: float = pace.random() * 0.001) -> None:
            time.sleep(delay)
            for index in range(batch):
                assert lib.kvf_job_cancel(jobs[index]) in (lib.KVF_OK, lib.KVF_ERR_INVALID_HANDLE)

        canceller = threading.Thread(target=cancel)
        canceller.start()
        for index in range(batch):
            options.user_data = first + index
            options.priority = index % 2
            status = lib.kvf_regions_save(
                engine[0], region, 1, memory, source.size, options, jobs + index
            )
            assert status == lib.KVF_OK
        canceller.join()
        left = batch
        while left:
            count = lib.kvf_queue_take(
                queue[0], records, ffi.sizeof("kvf_completion"), batch, 10 * 10**9
            )
            assert count > 0, f"{left} completions are missing"
            for index in range(count):
                seen[records[index].user_data] += 1
                statuses[records[index].status] += 1
            left -= count
        for index in range(batch):
            assert lib.kvf_job_release(jobs[index]) == lib.KVF_OK
    assert seen == Counter(range(batch * batches))
    assert set(statuses) == {lib.KVF_OK, lib.KVF_ERR_CANCELLED}
    assert lib.kvf_queue_take(queue[0], records, ffi.sizeof("kvf_completion"), 1, 0) == 0
    assert lib.kvf_engine_destroy(engine[0]) == lib.KVF_OK
    assert lib.kvf_queue_destroy(queue[0]) == lib.KVF_OK
