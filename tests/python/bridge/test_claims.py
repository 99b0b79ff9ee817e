"""Memory that a transfer writes, or that a Snapshot holds, is refused to other writers."""

import gc
import threading
import time

import anyio
import kvferry
import numpy as np
import pytest
from support.devices import DEVICES
from support.event_loops import anyio_backend  # noqa: F401
from support.like_contexts import MakeContext

pytestmark = pytest.mark.anyio

SLOW = np.zeros(1 << 28, np.uint8)[::2]
"""128 Mi rows of one byte: a copy of it is in flight for a while."""


async def test_two_transfers_into_the_same_memory_are_refused() -> None:
    memory = np.zeros(SLOW.size + 100, np.uint8)
    async with kvferry.Engine("host", copy_threads=1) as engine:
        transfer = await engine.start_copy_out(SLOW, memory)
        await engine.copy_out(b"elsewhere", np.zeros(10, np.uint8))
        for part in (memory, memory[10:20], memory[SLOW.size - 1 :]):
            with pytest.raises(kvferry.Busy, match="a transfer in flight writes this memory"):
                await engine.copy_out(b"x", part)
        transfer.cancel()
        with pytest.raises(kvferry.TransferCancelled):
            await transfer.wait()
        await engine.copy_out(b"x", memory)


async def test_what_is_being_read_may_be_read_by_others_and_not_written() -> None:
    async with kvferry.Engine("host", copy_threads=1) as engine:
        data = await engine.allocate(SLOW.size)
        targets = [np.zeros_like(SLOW.base)[::2] for _ in range(2)]
        transfers = [await engine.start_copy_in(target, data) for target in targets]
        with pytest.raises(kvferry.Busy, match="a transfer in flight reads this memory"):
            await engine.copy_out(b"x", data)
        for transfer in transfers:
            transfer.cancel()


async def test_what_is_being_written_is_not_read() -> None:
    async with kvferry.Engine("host", copy_threads=1) as engine:
        buffer = await engine.allocate(SLOW.size)
        transfer = await engine.start_copy_out(SLOW, buffer)
        with pytest.raises(kvferry.Busy):
            await engine.copy_in(np.zeros(SLOW.size, np.uint8), buffer)
        transfer.cancel()


async def test_several_engines_know_of_each_others_transfers() -> None:
    memory = np.zeros(SLOW.size, np.uint8)
    async with (
        kvferry.Engine("host", copy_threads=1) as one,
        kvferry.Engine("host", copy_threads=1) as two,
    ):
        transfer = await one.start_copy_out(SLOW, memory)
        with pytest.raises(kvferry.Busy):
            await two.copy_out(b"x", memory)
        transfer.cancel()


async def test_a_forgotten_transfer_that_has_ended_is_in_nobodys_way() -> None:
    memory = bytearray(8)
    async with kvferry.Engine("host") as engine:
        for _ in range(3):
            await engine.start_copy_out(b"anything", memory)
            while engine.describe()["jobs_in_flight"]:
                time.sleep(0.001)  # noqa: ASYNC251 nobody reads meanwhile


async def test_a_refused_transfer_leaves_no_claim() -> None:
    memory = bytearray(10)
    async with kvferry.Engine("host") as engine:
        for _ in range(2):
            with pytest.raises(kvferry.BufferTooSmall):
                await engine.copy_out(bytes(11), memory)
        await engine.copy_out(bytes(10), memory)


@pytest.mark.parametrize("release", ["close", "drop"])
async def test_the_memory_of_a_living_snapshot_is_not_overwritten(
    make_context: MakeContext, release: str
) -> None:
    context = make_context("llama")
    context.decode_in_turn([0, 1], 20)
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        buffer = await engine.allocate(len(state) + 1000)
        snapshot = await llama.save(0, into=buffer)
        with pytest.raises(kvferry.Busy, match=r"a Snapshot .* has this memory"):
            await llama.save(1, into=buffer)
        with pytest.raises(kvferry.Busy):
            await engine.copy_out(b"x", buffer.numpy()[len(state) - 1 :])
        await engine.copy_out(b"x", buffer.numpy()[len(state) :])
        assert snapshot.to_bytes() == state
        await llama.load(snapshot, 2)
        if release == "close":
            snapshot.close()
        else:
            del snapshot
        assert (await llama.save(1, into=buffer)).to_bytes() == context.state_get(1)


async def test_two_saves_into_one_buffer_are_refused(make_context: MakeContext) -> None:
    context = make_context("llama")
    context.decode_in_turn([0, 1], 20)
    memory = bytearray(context.state_size(0))
    refused: list[int] = []
    saved: list[bytes] = []
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)

        async def save(seq: int) -> None:
            try:
                snapshot = await llama.save(seq, into=memory)
            except kvferry.Busy:
                refused.append(seq)
            else:
                saved.append(snapshot.to_bytes())
                snapshot.close()

        async with anyio.create_task_group() as tasks:
            for seq in (0, 1):
                tasks.start_soon(save, seq)
    assert len(refused) == 1
    assert saved == [context.state_get(1 - refused[0])]


def test_claims_of_many_threads_are_all_counted_and_all_forgotten() -> None:
    from kvferry._bridge import claims
    from kvferry._native import ffi

    def claim(number: int) -> None:
        for turn in range(300):
            memory = ffi.cast("uint8_t *", (number << 32) + (turn << 8) + 1)
            held = claims.claim_for_transfer(memory, 256, writing=True)
            with pytest.raises(kvferry.Busy):
                claims.claim_for_transfer(memory + 255, 1, writing=False)
            del held

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    claims.claim_for_transfer(ffi.cast("uint8_t *", 1 << 40), 1, writing=True)
    assert not [entry for entry in claims._table._entries if entry[0] < 1 << 35]
