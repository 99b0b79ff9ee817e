"""All attachments to a context share one thread, and code on that thread must not wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import kvferry
import pytest
from support.context_threads import has_thread
from support.devices import DEVICES, ON_GPU
from support.event_loops import anyio_backend  # noqa: F401
from support.like_contexts import MakeContext
from support.llama_reference import Context
from support.programs import run_python

pytestmark = pytest.mark.anyio


@pytest.fixture
def context(make_context: MakeContext) -> Context:
    context = make_context("llama")
    context.decode_in_turn([0, 1], 20)
    return context


# ---- Shared --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engines", [1, 2])
async def test_attachments_to_one_context_share_its_thread(context: Context, engines: int) -> None:
    inside = 0
    most = 0
    threads: set[int] = set()

    def use() -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threads.add(threading.get_ident())
        time.sleep(0.002)
        inside -= 1

    async with contextlib.AsyncExitStack() as stack:
        made = [await stack.enter_async_context(kvferry.Engine(DEVICES)) for _ in range(engines)]
        llamas = [made[index % engines].attach(context.address) for index in range(2)]
        async with anyio.create_task_group() as tasks:
            for index in range(40):
                tasks.start_soon(llamas[index % 2].run, use)
    assert most == 1
    assert len(threads) == 1


async def test_contexts_of_their_own_have_threads_of_their_own(make_context: MakeContext) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llamas = [engine.attach(make_context("llama").address) for _ in range(2)]
        assert len({await llama.run(threading.get_ident) for llama in llamas}) == 2


async def test_attaching_and_measuring_wait_for_what_another_attachment_runs(
    context: Context,
) -> None:
    ended: list[float] = []
    began = threading.Event()

    def use() -> None:
        began.set()
        time.sleep(0.2)
        ended.append(time.monotonic())

    async with kvferry.Engine(DEVICES) as one, kvferry.Engine(DEVICES) as two:
        llama = one.attach(context.address)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(llama.run, use)
            await anyio.to_thread.run_sync(began.wait)
            other = two.attach(context.address)
            assert ended
            assert time.monotonic() >= ended[0]
        assert other.size(0) == context.state_size(0)


async def test_one_attachment_goes_on_after_another_has_gone(context: Context) -> None:
    state = context.state_get(0)
    one, two = kvferry.Engine(DEVICES), kvferry.Engine(DEVICES)
    llamas = [one.attach(context.address), one.attach(context.address), two.attach(context.address)]
    thread = await llamas[0].run(threading.get_ident)
    await llamas[0].detach()
    assert (await llamas[1].save(0)).to_bytes() == state
    await one.aclose()
    assert (await llamas[2].save(0)).to_bytes() == state
    assert await llamas[2].run(threading.get_ident) == thread
    await two.aclose()
    assert not has_thread(context)


async def test_a_thread_ends_with_the_last_attachment(context: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        for _ in range(3):
            llama = engine.attach(context.address)
            thread = await llama.run(threading.current_thread)
            await llama.detach()
            await anyio.to_thread.run_sync(thread.join, 10)
            assert not thread.is_alive()
        engine.attach(context.address)  # never used
    assert not has_thread(context)


async def test_an_engine_that_is_forgotten_waits_for_the_thread_it_shares(
    context: Context,
) -> None:
    """Detaching empties sequences, and must not run during another attachment's call."""
    began = threading.Event()
    spans: list[float] = []

    def use() -> None:
        began.set()
        time.sleep(0.3)
        spans.append(time.monotonic())

    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        forgotten = kvferry.Engine(DEVICES)
        forgotten.attach(context.address)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(llama.run, use)
            await anyio.to_thread.run_sync(began.wait)
            with pytest.warns(ResourceWarning, match="unclosed"):
                del forgotten
            assert spans
            assert time.monotonic() >= spans[0]
        assert (await llama.save(0)).nbytes == context.state_size(0)


# ---- From inside ---------------------------------------------------------------------------------


def calls_from_inside(
    engine: kvferry.Engine, llama: kvferry.Llama, address: int
) -> dict[str, Callable[[], Awaitable[Any]]]:
    async def size() -> int:
        return llama.size(0)

    async def attach() -> None:
        engine.attach(address)

    return {
        "run": lambda: llama.run(int),
        "save": lambda: llama.save(0),
        "save into memory": lambda: llama.save(0, into=bytearray(1 << 20)),
        "load": lambda: llama.load(b"anything", 2),
        "remove": lambda: llama.remove(2),
        "size_async": lambda: llama.size_async(0),
        "size": size,
        "attach": attach,
        "detach": llama.detach,
        "aclose": engine.aclose,
    }


async def test_awaiting_from_inside_of_run_raises(context: Context) -> None:
    """Starts a task on the event loop, as a callback of the decoding function would do."""
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        token = anyio.lowlevel.current_token()
        for call in calls_from_inside(engine, llama, context.address).values():

            def inside(call: Callable[[], Awaitable[Any]] = call) -> None:
                anyio.from_thread.run(call, token=token)

            with anyio.fail_after(10), pytest.raises(RuntimeError, match="called from inside"):
                await llama.run(inside)
        assert (await llama.save(0)).to_bytes() == state


async def test_a_loop_of_its_own_inside_of_run_does_not_help(context: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        with anyio.fail_after(10), pytest.raises(RuntimeError):
            await llama.run(asyncio.run, llama.save(0))
        assert (await llama.save(0)).nbytes == context.state_size(0)


async def test_two_threads_that_would_wait_for_each_other_are_found(
    make_context: MakeContext,
) -> None:
    contexts = [make_context("llama") for _ in range(2)]
    async with kvferry.Engine(DEVICES) as engine:
        one, two = (engine.attach(each.address) for each in contexts)
        token = anyio.lowlevel.current_token()

        def back_to_one() -> None:
            anyio.from_thread.run(one.run, int, token=token)

        def on_to_two(function: Callable[[], Any]) -> Any:
            return anyio.from_thread.run(two.run, function, token=token)

        with anyio.fail_after(10):
            assert await one.run(on_to_two, lambda: 7) == 7
            with pytest.raises(RuntimeError, match="called from inside"):
                await one.run(on_to_two, back_to_one)


async def test_a_task_started_inside_may_go_on_after_the_call(context: Context) -> None:
    saved: list[int] = []
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        ended = anyio.Event()
        token = anyio.lowlevel.current_token()
        async with anyio.create_task_group() as tasks:

            async def save_afterwards() -> None:
                await ended.wait()
                saved.append((await llama.save(0)).nbytes)

            def inside() -> None:
                anyio.from_thread.run_sync(tasks.start_soon, save_afterwards, token=token)

            await llama.run(inside)
            ended.set()
    assert saved == [context.state_size(0)]


# ---- In other processes --------------------------------------------------------------------------


@pytest.mark.skipif(ON_GPU, reason="the CUDA driver does not survive a fork, nor does libllama")
def test_a_forked_child_attaches_with_a_thread_of_its_own(
    model_path: Callable[..., Path],
) -> None:
    program = f"""
import os, warnings
import anyio, kvferry
import support.llama_reference as reference
warnings.simplefilter("ignore", DeprecationWarning)

model = reference.Model({str(model_path("llama"))!r})
context = model.context()
context.decode(0, [1, 2, 3])

async def main():
    async with kvferry.Engine("host") as engine:
        llama = engine.attach(context.address)
        size = (await llama.save(0)).nbytes
        child = os.fork()
        if child == 0:
            return size
        _, status = os.waitpid(child, 0)
        print("child", os.waitstatus_to_exitcode(status))

async def in_child(size):
    async with kvferry.Engine("host") as engine:
        with anyio.fail_after(10):
            assert (await engine.attach(context.address).save(0)).nbytes == size
    os._exit(0)

size = anyio.run(main)
if size is not None:
    anyio.run(in_child, size)
"""
    done = run_python("-c", program)
    assert (done.returncode, done.stdout) == (0, "child 0\n"), done.stderr
