"""kvferry.sync: transfers without an event loop, and from the context's own thread."""

from __future__ import annotations

import _thread
import gc
import threading
import warnings
from pathlib import Path

import kvferry
import numpy as np
import pytest
from kvferry import sync
from support.devices import DEVICES, ON_GPU
from support.event_loops import anyio_backend  # noqa: F401
from support.like_contexts import ENVELOPE, MakeContext
from support.llama_reference import Context

SLOW = np.zeros(1 << 28, np.uint8)[::2]  # one thread copies it in about a second


def make_prompted(make_context: MakeContext, kind: str = "llama") -> Context:
    context = make_context(kind)
    context.decode_in_turn([0, 1], 40)
    return context


def as_loaded(make_context: MakeContext, kind: str, state: bytes, seq: int) -> bytes:
    """Returns the state after llama.cpp's own load: it has the id of the target sequence."""
    like = make_context(kind)
    like.state_set(seq, state)
    return like.state_get(seq)


# ---- Regions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("priority", ["background", "urgent"])
def test_memory_is_copied_out_and_in(priority: kvferry.Priority) -> None:
    source = np.random.default_rng(0).integers(0, 256, (1000, 64), np.uint8)
    target = np.zeros_like(source)
    with sync.Engine("host") as engine:
        buffer = engine.copy_out(source[:, ::2], priority=priority)
        assert buffer.to_bytes() == source[:, ::2].tobytes()
        engine.copy_in(target[:, ::2], buffer, priority=priority)
        into = engine.allocate(source.size)
        assert engine.copy_out(source, into) is into
    assert np.array_equal(target[:, ::2], source[:, ::2])
    assert into.to_bytes() == source.tobytes()  # it outlives the engine


def test_memory_is_registered_and_trimmed() -> None:
    memory = bytearray(1 << 16)
    with sync.Engine("host") as engine:
        with engine.register(memory) as registered:
            engine.copy_out(b"\1" * 8, registered)
        engine.allocate(1 << 20).close()
        engine.trim()
        assert engine.describe()["pool"]["mapped"] == 0
    assert memory[:9] == b"\1" * 8 + b"\0"


def test_bad_arguments_are_refused_as_by_the_asynchronous_engine() -> None:
    with sync.Engine("host") as engine:
        with pytest.raises(ValueError, match="the target takes 4 bytes, 5 were given"):
            engine.copy_in(bytearray(4), b"12345")
        with pytest.raises(TypeError, match="into is contiguous memory, not int"):
            engine.copy_out(b"1234", into=5)  # type: ignore[arg-type]
        with pytest.raises(kvferry.BufferTooSmall):
            engine.copy_out(b"1234", into=bytearray(3))
        assert engine.describe()["jobs_in_flight"] == 0


def test_what_is_not_done_in_time_is_cancelled() -> None:
    with sync.Engine("host", copy_threads=1, pinned_limit=SLOW.size + 65536) as engine:
        into = engine.allocate(SLOW.size)
        with pytest.raises(TimeoutError, match=r"timed out: 0\.01 seconds"):
            engine.copy_out(SLOW, into, timeout=0.01)
        into.close()  # the C library would refuse the memory of a job in flight
        engine.allocate(SLOW.size).close()
        assert engine.copy_out(b"anything", timeout=60).to_bytes() == b"anything"


def test_ctrl_c_cancels_the_transfer_that_is_waited_for() -> None:
    with sync.Engine("host", copy_threads=1, pinned_limit=SLOW.size + 65536) as engine:
        into = engine.allocate(SLOW.size)

        def copy_until_interrupted() -> None:
            while True:
                engine.copy_out(SLOW, into)

        timer = threading.Timer(0.1, _thread.interrupt_main)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            copy_until_interrupted()
        timer.join()
        into.close()
        engine.allocate(SLOW.size).close()


def test_a_closed_engine_is_refused() -> None:
    engine = sync.Engine("host")
    engine.close()
    engine.close()
    with pytest.raises(kvferry.EngineClosed):
        engine.copy_out(b"anything")
    with pytest.raises(kvferry.EngineClosed):
        engine.allocate(1)
    assert "closed" in repr(engine)


def test_an_engine_that_is_forgotten_says_so() -> None:
    engine = sync.Engine("host")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del engine
        gc.collect()
    assert ["unclosed" in str(each.message) for each in caught] == [True]


# ---- Sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba", "hybrid"])
def test_a_sequence_is_saved_removed_and_loaded(make_context: MakeContext, kind: str) -> None:
    context = make_prompted(make_context, kind)
    state = context.state_get(0)
    into = bytearray(len(state))
    with sync.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        assert llama.size(0) == len(state)
        snapshot = llama.save(0)
        assert snapshot.to_bytes() == state
        assert snapshot.fingerprint == llama.fingerprint
        llama.save(0, into=into)
        llama.remove(0)
        assert context.pos_max(0) == -1
        llama.load(snapshot, 0)
        assert context.state_get(0) == state
        llama.load(into, 2)
        assert context.state_get(2) == as_loaded(make_context, kind, state, 2)
    assert into == state


def test_a_snapshot_of_another_model_leaves_the_sequence(make_context: MakeContext) -> None:
    context = make_prompted(make_context)
    before = context.state_get(1)
    with sync.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        stranger = kvferry.Snapshot.from_bytes(llama.save(0).to_bytes(), fingerprint="another")
        with pytest.raises(kvferry.StateMismatch, match="another"):
            llama.load(stranger, 1)
    assert context.state_get(1) == before


def test_what_cannot_be_done_is_refused_as_by_the_asynchronous_attachment(
    make_context: MakeContext,
) -> None:
    context = make_prompted(make_context)
    with sync.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        state = llama.save(0)
        with pytest.raises(kvferry.StateDamaged):
            llama.load(state.view[:-1], 1)
        llama.load(state, 1)
        with pytest.raises(kvferry.SequenceRange):
            llama.load(state, 99)
        with pytest.raises(kvferry.SequenceEmpty):
            llama.save(3)


def test_a_state_that_cannot_be_checked_is_loaded_only_if_it_is_trusted(
    make_context: MakeContext,
) -> None:
    context = make_prompted(make_context, "deepseek4")
    with sync.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        assert llama.describe()["format"] == "opaque"
        state = llama.save(0).to_bytes()[:-ENVELOPE]
        before = context.state_get(1)
        with pytest.raises(kvferry.StateDamaged):
            llama.load(state, 1)
        assert context.state_get(1) == before
        llama.load(state, 1, trust=True)
        assert context.state_get(1) == as_loaded(make_context, "deepseek4", state, 1)


def test_a_damaged_snapshot_is_found_before_it_is_loaded(make_context: MakeContext) -> None:
    context = make_prompted(make_context)
    memory = bytearray(context.state_size(0))
    with sync.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        with llama.save(0, into=memory) as snapshot:
            assert snapshot.seal_sync() == snapshot.checksum()
            llama.load(snapshot, 1, verify=True)
            memory[-1] ^= 1
            with pytest.raises(kvferry.StateDamaged, match="checksum"):
                llama.load(snapshot, 1, verify=True)


def test_a_snapshot_goes_to_a_file_and_back(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_prompted(make_context)
    state = context.state_get(0)
    with sync.Engine(DEVICES) as engine, engine.attach(context.address) as llama:
        llama.save(0).to_file_sync(tmp_path / "state")
        llama.load(kvferry.Snapshot.from_file_sync(tmp_path / "state"), 2, verify=True)
    assert context.state_get(2) == as_loaded(make_context, "llama", state, 2)


def test_detaching_leaves_the_context_alone(make_context: MakeContext) -> None:
    context = make_prompted(make_context)
    state = context.state_get(0)
    with sync.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        llama.detach()
        llama.detach()
        with pytest.raises(kvferry.EngineClosed):
            llama.save(0)
        assert "detached" in repr(llama)
    assert context.state_get(0) == state


# ---- Beside an event loop ------------------------------------------------------------------------


@pytest.mark.anyio
async def test_code_on_the_contexts_thread_saves_and_loads(make_context: MakeContext) -> None:
    context = make_prompted(make_context)
    state = context.state_get(0)

    def work() -> kvferry.Snapshot:
        snapshot = llama.sync.save(0)
        context.decode(0, [1, 2, 3])
        llama.sync.load(snapshot, 0)
        llama.sync.load(snapshot, 2)
        return snapshot

    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.run(work)
        assert snapshot.to_bytes() == state
        await llama.load(snapshot, 1)
    assert context.state_get(0) == state
    for seq in (1, 2):
        assert context.state_get(seq) == as_loaded(make_context, "llama", state, seq)


@pytest.mark.skipif(ON_GPU, reason="an engine of the host moves a GPU's cache during the call")
@pytest.mark.anyio
async def test_detaching_under_an_awaited_transfer_is_refused(make_context: MakeContext) -> None:
    context = make_prompted(make_context)
    async with kvferry.Engine("host", copy_threads=1) as engine:
        llama = engine.attach(context.address)
        # Background transfers wait for urgent ones.
        urgent = await engine.start_copy_out(SLOW, priority="urgent")
        transfer = await llama.start_save(0)
        with pytest.raises(kvferry.Busy):
            llama.sync.detach()
        await transfer.wait()
        await urgent.wait()
