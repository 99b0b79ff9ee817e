"""Signal handlers that raise: trio's on Ctrl-C, asyncio's on the second Ctrl-C, the program's own.

CPython runs a handler between two instructions of the main thread: after a call, at the beginning
of a function, at the end of a loop's turn. Wherever that is, every job ends exactly once, tasks
that wait for other transfers get their results, memory is released, and the engine closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import dis
import gc
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import anyio
import kvferry
import numpy as np
import pytest
from kvferry._bridge.worker import Worker
from support.context_threads import has_thread
from support.devices import DEVICES
from support.event_loops import EVENT_LOOPS, anyio_backend  # noqa: F401
from support.like_contexts import MakeContext

if sys.version_info < (3, 11):
    pytest.skip("needs the exception tables of Python 3.11", allow_module_level=True)

pytestmark = [
    pytest.mark.anyio,
    # An exception may come after a coroutine has been made and before its first step.
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]

SLOW = np.zeros(1 << 23, np.uint8)[::2]
"""4 Mi rows of one byte: a copy of it is in flight for a while."""

PACKAGE = Path(kvferry.__file__).parent


class Interrupt(Exception):
    """The exception that the handler raises."""


class InterruptAt:
    """Raises Interrupt in kvferry's code, at the n-th place where CPython may run a handler."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.place = ""
        self._last: dict[FrameType, int] = {}

    def __enter__(self) -> InterruptAt:
        # Python 3.12 looks for a frame that asks for these events when tracing begins.
        sys._getframe().f_trace_opcodes = True
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        self._last.clear()

    def _enter(self, frame: FrameType, event: str, argument: object) -> Any:
        if PACKAGE not in Path(frame.f_code.co_filename).parents:
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode" and not self.place:
            last = self._last.get(frame)
            self._last[frame] = frame.f_lasti
            if last is not None and can_interrupt(frame.f_code, last, frame.f_lasti):
                self.left -= 1
                if self.left == 0:
                    code = frame.f_code
                    self.place = f"{Path(code.co_filename).name}:{frame.f_lineno}, {code.co_name}"
                    raise Interrupt
        elif event == "return":
            self._last.pop(frame, None)
        return self._step


def can_interrupt(code: CodeType, last: int, following: int) -> bool:
    """Whether CPython may run a handler after an instruction, and this test can imitate that.

    CPython raises at that instruction, this test at the following one: the same handler must catch
    both.
    """
    return runs_handlers(*code.co_code[last : last + 2]) and (
        catcher(code, last) == catcher(code, following)
    )


def catcher(code: CodeType, offset: int) -> int | None:
    """Where exceptions of the instruction at this offset are handled."""
    for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]
        if entry.start <= offset < entry.end:
            return int(entry.target)
    return None


def runs_handlers(operation: int, argument: int) -> bool:
    """Whether this is a call, the beginning of a function, or a jump back. (CPython runs handlers
    after only some of these.)"""
    name = dis.opname[operation]
    if name == "RESUME":
        return argument & 3 < 2  # not where a coroutine goes on after an await
    return name.startswith(("CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE")) and "NO_INT" not in name


def loop_name() -> str:
    """The key in EVENT_LOOPS of the loop that runs."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return "trio"
    return "uvloop" if "uvloop" in type(loop).__module__ else "asyncio"


async def interrupt_everywhere(
    scenario: Callable[[InterruptAt], Awaitable[None]], *, stride: int = 1
) -> None:
    """Awaits the scenario once for each place where a handler may run.

    With a ``stride``, only every such place is tried; each event loop begins at another place.
    """
    places: set[str] = set()
    number = 1 + stride * list(EVENT_LOOPS).index(loop_name()) // len(EVENT_LOOPS)
    while True:
        interrupt = InterruptAt(number)
        try:
            with anyio.fail_after(30):
                await scenario(interrupt)
        except BaseException as failure:
            raise AssertionError(f"after an interrupt at {interrupt.place}") from failure
        if not interrupt.place:
            break
        places.add(interrupt.place)
        number += stride
    assert len(places) > 30 / stride


def assert_idle(engine: kvferry.Engine) -> None:
    """Asserts that nothing is in flight and no task waits."""
    completions = engine._core.completions
    assert completions.transfers() == []
    assert completions._reader is None
    assert not completions._followers


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    with contextlib.suppress(Interrupt):
        yield


async def test_copies_are_interrupted_anywhere() -> None:
    source = np.arange(1 << 16, dtype=np.uint8)

    async def scenario(interrupt: InterruptAt) -> None:
        engine = kvferry.Engine("host", copy_threads=1)
        targets = [bytearray(source.size) for _ in range(3)]
        served: list[int] = []
        interrupted: list[int] = []

        async def copy(index: int) -> None:
            try:
                await engine.copy_out(source, targets[index])
            except Interrupt:
                interrupted.append(index)
            else:
                served.append(index)

        with interrupt:
            async with anyio.create_task_group() as tasks:
                for index in range(len(targets)):
                    tasks.start_soon(copy, index)
        assert len(served) + len(interrupted) == 3
        assert len(interrupted) == bool(interrupt.place)
        for index in served:
            assert targets[index] == source.tobytes()
        await engine.copy_out(source, bytearray(source.size))
        assert_idle(engine)
        await engine.aclose()
        for target in targets:
            target.append(0)  # raises BufferError if a job still uses it

    await interrupt_everywhere(scenario, stride=8)


async def test_calls_on_a_thread_are_interrupted_anywhere() -> None:
    async def scenario(interrupt: InterruptAt) -> None:
        engine = kvferry.Engine("host", copy_threads=1)
        served: list[int] = []

        async def allocate(nbytes: int) -> None:
            with interruptible(), anyio.move_on_after(nbytes / 1000):
                buffer = await engine.allocate(nbytes)
                served.append(buffer.nbytes)

        with interrupt:
            async with anyio.create_task_group() as tasks:
                for nbytes in range(10_000, 10_003):
                    tasks.start_soon(allocate, nbytes)
        assert len(served) >= 2
        assert (await engine.allocate(7)).nbytes == 7
        assert_idle(engine)
        await engine.aclose()

    await interrupt_everywhere(scenario, stride=8)


async def test_cancelled_copies_are_interrupted_anywhere() -> None:
    async def scenario(interrupt: InterruptAt) -> None:
        engine = kvferry.Engine("host", copy_threads=1)
        targets = [bytearray(SLOW.size) for _ in range(2)]

        async def copy(target: bytearray) -> None:
            with interruptible():
                await engine.copy_out(SLOW, target)

        with interrupt:
            async with anyio.create_task_group() as tasks:
                for target in targets:
                    tasks.start_soon(copy, target)
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
        await engine.copy_out(b"anything", bytearray(8))
        assert_idle(engine)
        await engine.aclose()
        gc.collect()  # anyio keeps the exceptions of cancelled tasks in cycles
        for target in targets:
            target.append(0)

    await interrupt_everywhere(scenario, stride=8)


async def test_closing_is_interrupted_anywhere() -> None:
    async def scenario(interrupt: InterruptAt) -> None:
        engine = kvferry.Engine("host", copy_threads=1)
        target = bytearray(SLOW.size)
        await engine.start_copy_out(SLOW, target)
        await engine.allocate(1)
        with interrupt, interruptible():
            await engine.aclose(cancel=True)
        await engine.aclose()
        assert engine._core.closed
        assert not engine._core.memory_worker._thread.workers
        gc.collect()  # since Python 3.12 a traced frame is in a cycle with its exception
        target.append(0)

    await interrupt_everywhere(scenario, stride=8)


async def test_making_an_engine_is_interrupted_anywhere() -> None:
    async def scenario(interrupt: InterruptAt) -> None:
        with interrupt, interruptible():
            engine = kvferry.Engine("host")
        if not interrupt.place:
            await engine.aclose()

    await scenario(InterruptAt(10**9))
    before = len(os.listdir("/proc/self/fd"))
    number = 1
    while True:
        interrupt = InterruptAt(number)
        await scenario(interrupt)
        if not interrupt.place:
            break
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before, interrupt.place
        number += 1
    assert number > 10


async def test_sequences_are_interrupted_anywhere(make_context: MakeContext) -> None:
    context = make_context("llama")
    context.decode_in_turn([0, 1], 5)
    state = context.state_get(0)

    async def scenario(interrupt: InterruptAt) -> None:
        engine = kvferry.Engine(DEVICES, copy_threads=1)

        async def use() -> None:
            with interruptible():
                async with engine.attach(context.address) as llama:
                    snapshot = await llama.save(0)
                    assert snapshot.to_bytes() == state
                    await llama.load(snapshot, 2)
                    with contextlib.suppress(kvferry.StateDamaged):
                        await llama.load(state[:-1], 2)
                    await llama.run(context.pos_max, 0)

        with interrupt:
            await use()
        llama = engine.attach(context.address)
        assert (await llama.save(0)).to_bytes() == state
        await llama.load(state, 2)
        assert context.pos_max(2) == 4
        await llama.remove(2)
        assert_idle(engine)
        await engine.aclose()
        assert not has_thread(context)

    await interrupt_everywhere(scenario, stride=8)


async def test_saves_of_each_block_are_interrupted_anywhere(make_context: MakeContext) -> None:
    context = make_context("llama")
    context.decode_in_turn([0, 1], 8)
    states = []
    with kvferry.sync.Engine(DEVICES) as blocking:
        blocks = blocking.attach(context.address).save_blocks(0, tokens=2)
        states = [block.to_bytes() for block in blocks]

    async def scenario(interrupt: InterruptAt) -> None:
        engine = kvferry.Engine(DEVICES, copy_threads=1)
        llama = engine.attach(context.address)
        into = [bytearray(len(state)) for state in states]

        async def use() -> None:
            with interruptible():
                transfer = await llama.start_save_blocks(0, tokens=2, into=into, each_block=True)
                for index, state in enumerate(states):
                    assert (await transfer.block(index)).to_bytes() == state
                assert len(await transfer.wait()) == len(states)

        with interrupt:
            await use()
        again = await llama.start_save_blocks(0, tokens=2, each_block=True)
        assert (await again.block(3)).to_bytes() == states[3]
        assert len(await again.wait()) == len(states)
        assert_idle(engine)
        await engine.aclose()
        gc.collect()
        for memory in into:
            memory.append(0)  # raises BufferError if a job still uses it

    await interrupt_everywhere(scenario, stride=8)


# ---- Chosen places, with real signals ------------------------------------------------------------


class Calling:
    """Stands for the C library. After one of its functions, ``after`` is called."""

    def __init__(self, lib: Any, function: str, after: Callable[[], None]) -> None:
        self._lib = lib
        self._function = function
        self._after = after

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._lib, name)
        if name != self._function:
            return function

        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            self._after()
            return result

        return call


class Once:
    """Raises a signal when it is called for the first time."""

    def __init__(self, number: signal.Signals) -> None:
        self._number = number
        self.called = 0

    def __call__(self) -> None:
        self.called += 1
        if self.called == 1:
            signal.raise_signal(self._number)


@pytest.fixture
def alarm_raises() -> Iterator[None]:
    def handler(number: int, frame: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("alarm_raises")
async def test_a_signal_right_after_the_submitting_call_withdraws_no_running_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = bytearray(SLOW.size)
    async with kvferry.Engine("host", copy_threads=1) as engine:
        once = Once(signal.SIGALRM)
        lib: Any = sys.modules["kvferry.engine"].lib  # type: ignore[attr-defined]
        monkeypatch.setattr("kvferry.engine.lib", Calling(lib, "kvf_regions_save", once))
        with pytest.raises(Interrupt):
            await engine.copy_out(SLOW, target)
        target.append(0)  # the job has ended: raises BufferError if it still uses the memory
        assert once.called == 1
        await engine.copy_out(b"anything", bytearray(8))
        assert_idle(engine)


@pytest.mark.usefixtures("alarm_raises")
async def test_completions_that_were_taken_when_a_signal_came_are_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with kvferry.Engine("host", copy_threads=1) as engine:
        once = Once(signal.SIGALRM)
        lib: Any = sys.modules["kvferry._bridge.completions"].lib  # type: ignore[attr-defined]
        transfers = [await engine.start_copy_out(bytes([index])) for index in range(5)]
        while engine.describe()["jobs_in_flight"]:
            time.sleep(0.001)  # noqa: ASYNC251 nobody reads meanwhile
        monkeypatch.setattr("kvferry._bridge.completions.lib", Calling(lib, "kvf_queue_take", once))
        outcomes: list[str] = []

        async def wait(transfer: kvferry.Transfer[kvferry.Buffer]) -> None:
            try:
                await transfer.wait()
                outcomes.append("served")
            except Interrupt:
                outcomes.append("interrupted")

        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                for transfer in transfers:
                    tasks.start_soon(wait, transfer)
        assert sorted(outcomes) == ["interrupted", "served", "served", "served", "served"]
        assert_idle(engine)


async def test_what_follows_a_failed_load_is_done_once(
    monkeypatch: pytest.MonkeyPatch, make_context: MakeContext
) -> None:
    context = make_context("llama")
    context.decode_in_turn([0, 1], 20)
    settled: list[None] = []
    interrupted: list[None] = []
    ask_for = Worker.ask_for

    def interrupted_once(*arguments: Any, **keywords: Any) -> None:
        ask_for(*arguments, **keywords)
        if not interrupted:
            interrupted.append(None)
            raise Interrupt

    async with kvferry.Engine(DEVICES, copy_threads=1) as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        # The urgent transfer goes before the load, so that the load is cancelled in time.
        slow = np.zeros(1 << 27, np.uint8)[::2]
        ahead = await engine.start_copy_out(slow, priority="urgent")
        load = await llama.start_load(snapshot, 2)
        load.cancel()
        lib: Any = sys.modules["kvferry.sequence_transfer"].lib  # type: ignore[attr-defined]
        settling = Calling(lib, "kvf_llama_settle", lambda: settled.append(None))
        monkeypatch.setattr("kvferry.sequence_transfer.lib", settling)
        monkeypatch.setattr(Worker, "ask_for", interrupted_once)
        with pytest.raises(Interrupt):
            await load.wait()
        assert load.completion is not None
        assert load.completion.status == lib.KVF_ERR_CANCELLED
        ahead.cancel()
        assert len(settled) == 1
        assert context.pos_max(2) == -1


@pytest.mark.parametrize("function", ["kvf_queue_take", "kvf_regions_save"])
def test_ctrl_c_on_trio_ends_the_program_and_its_jobs(
    monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """trio's handler raises in the task that runs."""
    targets = [bytearray(SLOW.size) for _ in range(3)]
    closed: list[bool] = []

    async def main() -> None:
        async with kvferry.Engine("host", copy_threads=1) as engine:
            once = Once(signal.SIGINT)
            module = "engine" if function == "kvf_regions_save" else "_bridge.completions"
            lib: Any = sys.modules[f"kvferry.{module}"].lib  # type: ignore[attr-defined]
            monkeypatch.setattr(f"kvferry.{module}.lib", Calling(lib, function, once))
            async with anyio.create_task_group() as tasks:
                for target in targets:
                    tasks.start_soon(engine.copy_out, SLOW, target)
        closed.append(engine._core.closed)

    failure: Any = None
    try:
        anyio.run(main, backend="trio")
    except BaseException as raised:
        failure = raised
    while hasattr(failure, "exceptions"):
        failure = failure.exceptions[0]
    assert isinstance(failure, KeyboardInterrupt)
    assert closed == []  # the `async with` has raised, after it had closed the engine
    del failure  # its traceback refers to frames that hold memory
    gc.collect()
    for target in targets:
        target.append(0)
