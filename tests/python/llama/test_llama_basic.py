"""Saving and loading sequences of a real llama.cpp context: the plain case, and errors.

Other tests have the kinds of models and caches that llama.cpp treats differently.
"""

import random
from collections.abc import Callable
from pathlib import Path

import anyio
import kvferry
import numpy as np
import pytest
import support.llama_reference as reference
from support.devices import DEVICES
from support.event_loops import anyio_backend  # noqa: F401
from support.programs import run_python

pytestmark = pytest.mark.anyio

PROMPT_TOKENS = 200
EMPTY_BYTES = 8 if reference.UNFRAMED else 16
"""Size of an empty sequence's state: magic number and sequence (since b9842), an empty stream."""


@pytest.fixture
def llama_model(model: Callable[[str], reference.Model]) -> reference.Model:
    return model("llama")


@pytest.fixture
def context(make_context: Callable[..., reference.Context]) -> reference.Context:
    """A context with a prompt in sequence 0; sequences 1 to 3 are empty."""
    context = make_context("llama", n_ctx=1024)
    context.decode(0, context.model.prompt(PROMPT_TOKENS))
    return context


async def test_a_sequence_saved_beside_decoding_goes_on_as_after_llama_cpps_own_calls(
    llama_model: reference.Model, context: reference.Context
) -> None:
    tokens = llama_model.prompt(50, seed=1)
    with llama_model.context(n_ctx=1024) as like:
        like.decode(0, llama_model.prompt(PROMPT_TOKENS))
        state = like.state_get(0)
        for token in tokens:
            like.decode(1, [token])
        like.state_set(2, state)
        expected_state = like.state_get(2)
        expected_logits = like.decode(2, [7])

    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        assert llama.size(0) == len(state)
        async with anyio.create_task_group() as tasks:

            async def decode() -> None:
                for token in tokens:
                    await llama.run(context.decode, 1, [token])

            tasks.start_soon(decode)
            snapshots = [await llama.save(0) for _ in range(10)]
        assert all(snapshot.to_bytes() == state for snapshot in snapshots)

        await llama.load(snapshots[0], 2)
        assert (await llama.save(2)).to_bytes() == expected_state
        logits = await llama.run(context.decode, 2, [7])
    assert np.array_equal(logits, expected_logits)


async def test_many_tasks_save_at_once(context: reference.Context) -> None:
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        saved: list[bool] = []

        async def save() -> None:
            saved.append((await llama.save(0)).to_bytes() == state)

        async with anyio.create_task_group() as tasks:
            for _ in range(300):
                tasks.start_soon(save)
    assert saved == [True] * 300


async def test_a_save_that_has_been_started_is_awaited_later(context: reference.Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        state = context.state_get(0)
        transfer = await llama.start_save(0, mode="snapshot")
        await llama.run(context.seq_rm, 0)  # the Snapshot stays as it is
        snapshot = await transfer.wait()
        assert snapshot.to_bytes() == state
        assert transfer.done
        assert snapshot.completion is not None
        assert snapshot.completion.mode == 2
        await (await llama.start_load(snapshot, 0)).wait()
        assert (await llama.save(0, priority="urgent", mode="in_place")).to_bytes() == state


async def test_a_state_is_saved_into_the_callers_memory(context: reference.Context) -> None:
    state = context.state_get(0)
    memory = np.zeros(len(state) + 100, np.uint8)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0, into=memory)
        assert snapshot.nbytes == len(state)
        assert snapshot.numpy().ctypes.data == memory.ctypes.data
        snapshot.close()
        with pytest.raises(kvferry.BufferTooSmall, match="bytes are needed"):
            await llama.save(0, into=memory[: len(state) - 1])
    assert memory[: len(state)].tobytes() == state
    assert not memory[len(state) :].any()


async def test_a_file_brings_a_sequence_back(context: reference.Context, tmp_path: Path) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        await (await llama.save(0)).to_file(tmp_path / "state")
        state = context.state_get(0)
        await llama.remove(0)
        snapshot = await kvferry.Snapshot.from_file(tmp_path / "state")
        assert snapshot.fingerprint == llama.fingerprint
        await llama.load(snapshot, 0, verify=True)
    assert context.state_get(0) == state


async def test_size_may_be_asked_on_the_contexts_thread_and_beside_it(
    context: reference.Context,
) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        size = context.state_size(0)
        assert llama.size(0) == size
        assert await llama.size_async(0) == size
        assert await llama.run(llama.size, 0) == size
        assert llama.size(3) == EMPTY_BYTES


async def test_what_the_program_runs_returns_and_raises_as_it_does(
    context: reference.Context,
) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        assert await llama.run(divmod, 7, 2) == (3, 1)
        assert await llama.run(int, "ff", base=16) == 255
        # Keywords that the method could have as parameters of its own.
        assert await llama.run(dict, self=1, function=2, seq=3) == {
            "self": 1,
            "function": 2,
            "seq": 3,
        }
        with pytest.raises(ZeroDivisionError):
            await llama.run(divmod, 1, 0)


async def test_remove_waits_for_transfers_of_the_sequence(context: reference.Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        state = context.state_get(0)
        transfer = await llama.start_save(0, mode="in_place")
        await llama.remove(0)
        assert transfer.done
        assert (await transfer.wait()).to_bytes() == state
        assert llama.size(0) == EMPTY_BYTES
        await llama.remove(0)


async def test_a_state_that_is_refused_leaves_the_sequence_and_others_as_they_were(
    context: reference.Context,
) -> None:
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)

        for bad in (state[:-1], state[:40], b"?" * len(state)):
            await llama.load(snapshot, 1)
            before = context.state_get(1)
            with pytest.raises(kvferry.StateDamaged):
                await llama.load(bad, 1)
            assert context.state_get(1) == before
            assert llama.load_outcome(1) == "unchanged"
        assert context.state_get(0) == state


async def test_a_snapshot_that_is_refused_unread_leaves_the_sequence_as_it_was(
    context: reference.Context,
) -> None:
    state = context.state_get(0)
    changed = bytearray(state)
    sealed = kvferry.Snapshot.from_bytes(changed)
    await sealed.seal()
    changed[-1] ^= 1
    other = kvferry.Snapshot.from_bytes(state, fingerprint="another model")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        for bad, verify, error in [
            (other, False, kvferry.StateMismatch),
            (sealed, True, kvferry.StateDamaged),
        ]:
            with pytest.raises(error):
                await llama.load(bad, 0, verify=verify)
            assert llama.load_outcome(0) == "unchanged"
            assert context.state_get(0) == state


async def test_sequences_that_cannot_be_used_are_refused(context: reference.Context) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        for beyond in (-1, 4):
            with pytest.raises(kvferry.SequenceRange):
                llama.size(beyond)
            with pytest.raises(kvferry.SequenceRange):
                await llama.save(beyond)
            with pytest.raises(kvferry.SequenceRange):
                await llama.load(snapshot, beyond)
        with pytest.raises(kvferry.SequenceEmpty):
            await llama.save(1)
        with pytest.raises(ValueError, match="'auto', 'in_place' or 'snapshot'"):
            await llama.save(0, mode="safe")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="only a Snapshot"):
            await llama.load(snapshot.to_bytes(), 1, verify=True)


async def test_a_cancelled_load_is_whole_or_empty_and_a_cancelled_save_leaves_nothing(
    context: reference.Context,
) -> None:
    state = context.state_get(0)
    pace = random.Random(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        whole = bytearray(state)
        for _ in range(200):
            with anyio.move_on_after(pace.random() * 0.001) as scope:
                await llama.load(snapshot, 1)
            size = llama.size(1)
            assert size in ((EMPTY_BYTES, len(state)) if scope.cancelled_caught else (len(state),))
            with anyio.move_on_after(pace.random() * 0.001):
                await llama.save(0, into=whole)
            whole.append(0)  # raises BufferError if a job still uses it
            whole.pop()
        snapshot.close()
    assert context.state_get(0) == state


async def test_a_detached_context_is_released_and_can_be_attached_again(
    context: reference.Context,
) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        async with engine.attach(context.address) as llama:
            transfer = await llama.start_save(0)
        assert transfer.done
        await llama.detach()
        with pytest.raises(kvferry.EngineClosed, match="detached"):
            await llama.save(0)
        with pytest.raises(kvferry.EngineClosed, match="detached"):
            llama.size(0)
        again = engine.attach(context.address)
        assert (await again.save(0)).to_bytes() == context.state_get(0)


async def test_saves_that_are_being_started_while_the_engine_closes_end_too(
    context: reference.Context,
) -> None:
    outcomes: list[str] = []
    engine = kvferry.Engine(DEVICES)
    llama = engine.attach(context.address)

    async def save() -> None:
        try:
            await llama.save(0)
            outcomes.append("saved")
        except kvferry.EngineClosed:
            outcomes.append("closed")

    async with anyio.create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(save)
        await anyio.wait_all_tasks_blocked()
        await llama.detach()
        await engine.aclose()
    assert len(outcomes) == 50


async def test_several_engines_may_attach_to_one_context(context: reference.Context) -> None:
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as one, kvferry.Engine(DEVICES) as other:
        snapshots = [await each.attach(context.address).save(0) for each in (one, other)]
        assert [snapshot.to_bytes() for snapshot in snapshots] == [state, state]


async def test_a_context_that_has_been_freed_is_noticed(llama_model: reference.Model) -> None:
    async with kvferry.Engine(DEVICES) as engine:
        context = llama_model.context()
        context.decode(0, llama_model.prompt(10))
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        await llama.run(context.close)
        with pytest.raises(kvferry.ContextFreed):
            await llama.save(0)
        with pytest.raises(kvferry.ContextFreed):
            llama.size(0)
        with pytest.raises(kvferry.ContextFreed):
            await llama.load(snapshot, 0)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_interpreter_exits_cleanly_with_a_context_attached(
    model_path: Callable[..., Path], backend: str
) -> None:
    program = f"""
import anyio, kvferry
import support.llama_reference as reference

model = reference.Model({str(model_path("llama"))!r})
context = model.context(n_ctx=8192)
context.decode(0, model.prompt(3000))
engine = kvferry.Engine({DEVICES!r})
llama = engine.attach(context.address)

async def main():
    snapshot = await llama.save(0)
    for sequence in range(10):
        await llama.start_save(0)
    await llama.start_load(snapshot, 1)
    worker = llama._attachment.worker
    worker.ask_for(worker.make(context.decode, 2, [1] * 500))
    print("leaving", flush=True)

anyio.run(main, backend={backend!r})
"""
    done = run_python("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")
