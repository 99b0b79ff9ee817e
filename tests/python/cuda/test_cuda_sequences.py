"""Sequences of llama.cpp while their cache is in host memory, on an engine with a CUDA device."""

from __future__ import annotations

import concurrent.futures as cf
import contextlib
import ctypes
import json
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import kvferry
import pytest
from support import c_interface
from support.cuda_driver import NEEDS_CUDA
from support.event_loops import anyio_backend  # noqa: F401
from support.simulated_cuda import Error, SimulatedCuda

pytestmark = [pytest.mark.anyio, NEEDS_CUDA]


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


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
async def test_blocks_and_checkpoints_follow_a_stream(
    simulated: SimulatedCuda, make_context: Callable[..., Any], kind: str
) -> None:
    context = make_context(kind)
    context.decode(0, context.model.prompt(100))
    state = context.state_get(0)
    ended: list[Any] = []

    async def follow(transfer: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Begins a transfer while the stream holds work; checks that it ends after that work."""
        ended.clear()

        async def run() -> None:
            ended.append(await transfer(*arguments, after_stream=stream.handle, **options))

        with simulated.stream() as stream:
            stream.hold()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
                await anyio.sleep(0.05)
                assert not ended
                stream.release()
        return ended[0]

    async with kvferry.Engine("cuda") as engine:
        llama = engine.attach(context.address)
        blocks = await follow(llama.save_blocks, 0, tokens=64)
        allowed, _ = await llama.blocks_allowed_async()
        checkpoint = await follow(llama.save_checkpoint, 0) if allowed.checkpoints else None
        await llama.remove(0)
        await follow(llama.load_blocks, blocks, 0, checkpoint=checkpoint)
        with pytest.raises(kvferry.InvalidArgument, match="this stream"):
            await llama.save_blocks(0, after_stream=0xDEAD0)
        with pytest.raises(kvferry.InvalidArgument, match="this stream"):
            llama.sync.save_blocks(0, after_stream=0xDEAD0)
    assert context.state_get(0) == state


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
