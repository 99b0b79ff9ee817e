"""The order in which the context's thread runs calls of the program and begins transfers."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import kvferry
import pytest
from support.devices import DEVICES
from support.event_loops import anyio_backend  # noqa: F401
from support.llama_reference import Context

pytestmark = pytest.mark.anyio


class Turns:
    """Keeps the context's thread busy while calls queue up; notes when each of them begins."""

    def __init__(self, llama: kvferry.Llama, tasks: anyio.abc.TaskGroup) -> None:
        self._llama, self._tasks = llama, tasks
        self._held = threading.Event()
        self.began_ns: dict[str, int] = {}

    async def queue(self, name: str) -> None:
        """Asks for a call, which waits in the queue."""
        self._tasks.start_soon(self._llama.run, self._note, name)
        await anyio.wait_all_tasks_blocked()

    def _note(self, name: str) -> None:
        self.began_ns[name] = time.monotonic_ns()

    def release(self) -> None:
        self._held.set()


@asynccontextmanager
async def held(llama: kvferry.Llama) -> AsyncIterator[tuple[Turns, anyio.abc.TaskGroup]]:
    async with anyio.create_task_group() as tasks:
        turns = Turns(llama, tasks)
        tasks.start_soon(llama.run, turns._held.wait)
        await anyio.wait_all_tasks_blocked()
        try:
            yield turns, tasks
        finally:
            turns.release()


@pytest.fixture
def context(make_context: Callable[..., Context]) -> Context:
    context = make_context("llama")
    context.decode(0, context.model.prompt(100))
    return context


def began_ns(snapshot: kvferry.Snapshot) -> int:
    assert snapshot.completion is not None
    return snapshot.completion.submitted_ns


def next_allocation(engine: kvferry.Engine, monkeypatch: pytest.MonkeyPatch) -> anyio.Event:
    """Returns an event that is set when the engine has allocated a buffer: the call that needs the
    buffer comes next."""
    allocated = anyio.Event()
    on_memory_thread = engine._core.on_memory_thread

    async def noted(*call: Any) -> Any:
        buffer = await on_memory_thread(*call)
        allocated.set()
        return buffer

    monkeypatch.setattr(engine._core, "on_memory_thread", noted)
    return allocated


async def test_an_urgent_save_passes_what_waits_for_its_turn(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        await llama.save(0)
        saved: list[kvferry.Snapshot] = []
        allocated = next_allocation(engine, monkeypatch)

        async def save() -> None:
            saved.append(await llama.save(0, priority="urgent"))

        async with held(llama) as (turns, tasks):
            await turns.queue("before")
            tasks.start_soon(save)
            await allocated.wait()
            await anyio.wait_all_tasks_blocked()
        assert began_ns(saved[0]) < turns.began_ns["before"]


async def test_urgent_ones_go_in_the_order_in_which_they_were_asked_for(context: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        loads: dict[int, kvferry.Transfer[None]] = {}

        async def load(seq: int) -> None:
            loads[seq] = await llama.start_load(snapshot, seq, priority="urgent")

        async with held(llama) as (turns, tasks):
            await turns.queue("before")
            for seq in (1, 2, 3):
                tasks.start_soon(load, seq)
                await anyio.wait_all_tasks_blocked()
        for each in loads.values():
            await each.wait()
        times = [each.completion.submitted_ns for _, each in sorted(loads.items())]
        assert times == sorted(times)
        assert times[-1] < turns.began_ns["before"]


async def test_a_background_save_waits_for_its_turn_and_needs_only_one(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        await llama.save(0)
        saved: list[kvferry.Snapshot] = []

        async def save() -> None:
            saved.append(await llama.save(0))

        allocated = next_allocation(engine, monkeypatch)
        async with held(llama) as (turns, tasks):
            await turns.queue("before")
            tasks.start_soon(save)
            await allocated.wait()
            await anyio.wait_all_tasks_blocked()
            await turns.queue("after")
        assert turns.began_ns["before"] < began_ns(saved[0]) < turns.began_ns["after"]


async def test_a_sequence_that_was_never_saved_does_not_queue_twice(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save waits for its turn once, to measure the sequence, and not a second time."""
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        saved: list[kvferry.Snapshot] = []

        async def save() -> None:
            saved.append(await llama.save(0))

        allocated, busy = next_allocation(engine, monkeypatch), threading.Event()
        async with held(llama) as (turns, tasks):
            tasks.start_soon(save)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(llama.run, busy.wait)
            await anyio.wait_all_tasks_blocked()
            await turns.queue("after")
            turns.release()
            await allocated.wait()
            await anyio.wait_all_tasks_blocked()
            busy.set()
        assert began_ns(saved[0]) < turns.began_ns["after"]


async def test_a_sequence_that_has_grown_is_saved_whole(context: Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        await llama.save(0)
        await llama.run(context.decode, 0, context.model.prompt(300))
        assert (await llama.save(0)).to_bytes() == context.state_get(0)


async def test_a_sequence_that_has_shrunk_takes_no_more_memory_than_it_needs(
    context: Context,
) -> None:
    context.decode(0, context.model.prompt(400))
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        large = (await llama.save(0)).nbytes
        await llama.remove(0)
        await llama.run(context.decode, 0, context.model.prompt(1))
        await engine.trim()
        snapshot = await llama.save(0)
        assert snapshot.to_bytes() == context.state_get(0)
        await engine.trim()
        assert engine.describe()["pool"]["mapped"] < large
