"""Closing, collecting, exiting and forking while transfers are in flight."""

import gc
import os
import subprocess
import textwrap
import threading
import warnings

import anyio
import kvferry
import numpy as np
import pytest
from support.event_loops import anyio_backend  # noqa: F401
from support.programs import run_python

SLOW = np.zeros(1 << 28, np.uint8)[::2]
"""128 Mi rows of one byte: a copy of it is in flight for a while."""


@pytest.mark.anyio
async def test_leaving_the_block_lets_transfers_end() -> None:
    async with kvferry.Engine("host") as engine:
        transfers = [await engine.start_copy_out(np.full(1 << 20, i, np.uint8)) for i in range(50)]
    for value, transfer in enumerate(transfers):
        buffer = await transfer.wait()
        assert np.all(buffer.numpy() == value)


@pytest.mark.anyio
async def test_a_body_that_raises_cancels_transfers() -> None:
    transfers: list[kvferry.Transfer[kvferry.Buffer]] = []

    async def body() -> None:
        async with kvferry.Engine("host", copy_threads=1) as engine:
            transfers.extend([await engine.start_copy_out(SLOW) for _ in range(4)])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body()
    for transfer in transfers:
        assert transfer.done
    with pytest.raises(kvferry.EngineClosed):
        await transfers[-1].wait()


@pytest.mark.anyio
async def test_tasks_that_wait_while_the_engine_closes_learn_the_outcome() -> None:
    outcomes: list[str] = []
    engine = kvferry.Engine("host", copy_threads=1)

    async def copy(source: object) -> None:
        try:
            await engine.copy_out(source)
            outcomes.append("done")
        except kvferry.EngineClosed:
            outcomes.append("closed")

    async with anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(copy, SLOW)
            tasks.start_soon(copy, b"anything")
        await anyio.sleep(0.02)
        await engine.aclose(cancel=True)
    assert len(outcomes) == 40
    assert "closed" in outcomes


@pytest.mark.anyio
async def test_cancelling_the_closing_task_cancels_transfers_and_closes() -> None:
    engine = kvferry.Engine("host", copy_threads=1)
    transfers = [await engine.start_copy_out(SLOW) for _ in range(4)]
    with anyio.move_on_after(0.01) as scope:
        await engine.aclose()
    assert scope.cancelled_caught
    assert all(transfer.done for transfer in transfers)
    with pytest.raises(kvferry.EngineClosed):
        engine.describe()


@pytest.mark.anyio
async def test_closing_twice_and_at_the_same_time_is_allowed() -> None:
    engine = kvferry.Engine("host")
    await engine.start_copy_out(np.zeros(1 << 22, np.uint8))
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(engine.aclose)
    await engine.aclose()


@pytest.mark.anyio
async def test_a_closed_engine_refuses_everything() -> None:
    async with kvferry.Engine("host") as engine:
        pass
    with pytest.raises(kvferry.EngineClosed, match="the engine is closing"):
        await engine.copy_out(b"anything")
    with pytest.raises(kvferry.EngineClosed):
        await engine.copy_in(bytearray(1), b"a")
    with pytest.raises(kvferry.EngineClosed):
        await engine.allocate(1)
    with pytest.raises(kvferry.EngineClosed):
        engine.attach(1)
    with pytest.raises(kvferry.EngineClosed):
        engine.describe()
    with pytest.raises(kvferry.EngineClosed):
        engine.trace()


@pytest.mark.anyio
async def test_buffers_outlive_their_engine() -> None:
    async with kvferry.Engine("host") as engine:
        buffer = await engine.copy_out(b"anything")
    view = buffer.view
    buffer.close()
    assert view.tobytes() == b"anything"


@pytest.mark.anyio
async def test_many_engines_work_side_by_side() -> None:
    before = threading.active_count()
    engines = [kvferry.Engine("host") for _ in range(40)]
    results: list[bytes] = []

    async def use(index: int, engine: kvferry.Engine) -> None:
        async with engine:
            for _ in range(5):
                results.append((await engine.copy_out(bytes([index]) * 1000)).to_bytes())

    async with anyio.create_task_group() as tasks:
        for index, engine in enumerate(engines):
            tasks.start_soon(use, index, engine)
    assert sorted(results) == sorted([bytes([index]) * 1000 for index in range(40)] * 5)
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("kvferry"):
            thread.join(timeout=5)
    assert threading.active_count() <= before


def test_an_unclosed_engine_warns_and_cleans_up_when_collected() -> None:
    async def leave_behind() -> bytearray:
        engine = kvferry.Engine("host")
        target = bytearray(SLOW.size)
        await engine.start_copy_out(SLOW, target)
        del engine
        gc.collect()
        return target

    with pytest.warns(ResourceWarning, match="unclosed"):
        target = anyio.run(leave_behind)
    target.append(0)  # raises BufferError if a job still uses it


def test_a_closed_engine_is_collected_without_a_warning() -> None:
    async def close() -> None:
        async with kvferry.Engine("host") as engine:
            await engine.copy_out(b"anything")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anyio.run(close)
        gc.collect()


def run_program(text: str) -> subprocess.CompletedProcess[str]:
    return run_python("-X", "dev", "-c", PREAMBLE + textwrap.dedent(text))


PREAMBLE = """
import anyio, asyncio, os, sys, threading, numpy as np, kvferry
slow = np.zeros(1 << 28, np.uint8)[::2]
"""


@pytest.mark.parametrize("leave", ["pass", "sys.exit(0)", "1 / 0", "os._exit(0)"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_interpreter_exits_cleanly_with_jobs_in_flight(leave: str, backend: str) -> None:
    done = run_program(f"""
        engine = kvferry.Engine("host", copy_threads=1)
        targets = [bytearray(slow.size) for _ in range(4)]

        async def main():
            for target in targets:
                await engine.start_copy_out(slow, target)
            print("in flight", flush=True)
            {leave}

        anyio.run(main, backend="{backend}")
    """)
    assert done.stdout == "in flight\n"
    assert done.returncode == (1 if leave == "1 / 0" else 0), done.stderr
    if leave == "1 / 0":
        assert "ZeroDivisionError" in done.stderr
    else:
        assert not done.stderr


def test_the_interpreter_exits_cleanly_while_a_worker_is_at_work() -> None:
    done = run_program("""
        import time

        async def main():
            worker = engine._core.memory_worker
            worker.ask_for(worker.make(time.sleep, 0.3))
            worker.ask_for(worker.make(time.sleep, 100))

        engine = kvferry.Engine("host")
        asyncio.run(main())
        print("leaving", flush=True)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


def test_a_forked_child_can_exit_and_make_an_engine_of_its_own() -> None:
    done = run_program("""
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: that's the point

        async def copy(engine):
            return (await engine.copy_out(b"anything")).to_bytes()

        async def main():
            async with kvferry.Engine("host", copy_threads=1) as engine:
                kept = await engine.copy_out(b"kept")
                transfer = await engine.start_copy_out(slow)
                child = os.fork()
                if child == 0:
                    sys.exit(check_child(engine, transfer, kept))
                await transfer.wait()
                _, status = os.waitpid(child, 0)
                print("child", os.waitstatus_to_exitcode(status), flush=True)
                assert await copy(engine) == b"anything"
                print("parent goes on", flush=True)

        def check_child(engine, transfer, kept):
            result = []
            def run():
                async def go():
                    await engine.aclose()  # nothing of the child's to close
                    for refused in (lambda: engine.copy_out(b"x"), transfer.wait):
                        try:
                            await refused()
                        except kvferry.Forked:
                            result.append("refused")
                    async with kvferry.Engine("host") as own:
                        result.append(await copy(own))
                asyncio.run(go())
            # In the child the parent's loop counts as running on this thread.
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            result.append(kept.to_bytes())
            return 0 if result == ["refused"] * 2 + [b"anything", b"kept"] else 1

        asyncio.run(main())
    """)
    assert done.stdout == "child 0\nparent goes on\n", done.stderr
    assert done.returncode == 0, done.stderr


def test_a_forked_child_may_leave_its_parents_engine_to_the_collector() -> None:
    engine = kvferry.Engine("host")

    async def start() -> kvferry.Transfer[kvferry.Buffer]:
        return await engine.start_copy_out(SLOW)

    transfer = anyio.run(start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads is tested here
        child = os.fork()
    if child == 0:
        del transfer, engine
        gc.collect()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    anyio.run(transfer.wait)
    anyio.run(engine.aclose)
