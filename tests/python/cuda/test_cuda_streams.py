"""Transfers that follow CUDA streams, and streams that wait for transfers."""

from __future__ import annotations

import anyio
import kvferry
import numpy as np
import pytest
from support.cuda_arrays import numbers, on_stream, pass_by
from support.cuda_driver import NEEDS_CUDA
from support.event_loops import anyio_backend  # noqa: F401
from support.simulated_cuda import SimulatedCuda

pytestmark = [pytest.mark.anyio, NEEDS_CUDA]


async def assert_a_save_follows_the_stream(
    cuda: SimulatedCuda, default: int | None, device: int = 0
) -> None:
    """The stream, a new one or a default one, holds a copy into the array that is saved."""
    before, after = numbers(), -numbers()
    with cuda.array(before, device) as array, cuda.array(after, device) as computed:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream(default, device) as stream:
                stream.hold()
                stream.copy(array, computed)
                transfer = await engine.start_copy_out(on_stream(array, stream.handle))
                assert await pass_by(engine, array) == before.tobytes()
                stream.release()
                assert (await transfer.wait()).to_bytes() == after.tobytes()


@pytest.mark.parametrize("default", [None, 1, 2], ids=["a stream", "legacy", "per thread"])
async def test_a_save_follows_the_stream_that_the_array_names(
    cuda: SimulatedCuda, default: int | None
) -> None:
    await assert_a_save_follows_the_stream(cuda, default)


async def test_a_load_follows_the_stream_that_the_array_names(cuda: SimulatedCuda) -> None:
    before, after = numbers(), -numbers()
    with cuda.array(before) as array, cuda.array(np.zeros_like(before)) as reader:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream() as stream:
                stream.hold()
                stream.copy(reader, array)
                transfer = await engine.start_copy_in(on_stream(array, stream.handle), after)
                assert await pass_by(engine, array) == before.tobytes()
                stream.release()
                await transfer.wait()
            assert np.array_equal(reader.download(), before)
            assert np.array_equal(array.download(), after)


async def test_the_callers_stream_is_followed_and_not_the_one_that_is_named(
    cuda: SimulatedCuda,
) -> None:
    before, after = numbers(), -numbers()
    with cuda.array(before) as array, cuda.array(after) as computed:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream() as named, cuda.stream() as callers, anyio.fail_after(10):
                named.hold()
                callers.hold()
                callers.copy(array, computed)
                transfer = await engine.start_copy_out(
                    on_stream(array, named.handle), after_stream=callers.handle
                )
                assert await pass_by(engine, array) == before.tobytes()
                callers.release()
                assert (await transfer.wait()).to_bytes() == after.tobytes()
                named.release()  # a real driver frees nothing while a stream waits


async def test_arrays_that_name_no_stream_are_moved_at_once(cuda: SimulatedCuda) -> None:
    with cuda.array(numbers()) as array:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream(1) as legacy, anyio.fail_after(10):
                legacy.hold()
                moved = await engine.copy_out(on_stream(array, None))
                assert moved.to_bytes() == numbers().tobytes()


async def test_arrays_of_several_streams_need_one_stream(cuda: SimulatedCuda) -> None:
    host = numbers()
    with cuda.array(host) as first, cuda.array(host) as second:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream() as one, cuda.stream() as other:
                both = [on_stream(first, one.handle), on_stream(second, other.handle)]
                with pytest.raises(kvferry.InvalidArgument, match="pass it as after_stream"):
                    await engine.copy_out(both)
                packed = await engine.copy_out(both, after_stream=one.handle)
                assert packed.to_bytes() == host.tobytes() * 2
            # Arrays without a stream, or with the same one, do not name several streams.
            same = [on_stream(first, 1), on_stream(second, None), on_stream(second, 1)]
            assert (await engine.copy_out(same)).nbytes == 3 * host.nbytes


async def test_a_stream_that_cannot_be_followed_is_refused(simulated: SimulatedCuda) -> None:
    with simulated.array(numbers()) as array:
        async with kvferry.Engine("cuda") as engine:
            with pytest.raises(kvferry.InvalidArgument, match="stream 0"):
                await engine.copy_out(on_stream(array, 0))
            with pytest.raises(kvferry.InvalidArgument, match="knows this stream"):
                await engine.copy_out(array, after_stream=0xDEAD0)
            transfer = await engine.start_copy_out(array)
            with pytest.raises(kvferry.InvalidArgument):
                transfer.stream_wait(0xDEAD0)
            await transfer.wait()
        async with kvferry.Engine("host") as engine:
            with pytest.raises(kvferry.KvferryError, match="no CUDA device"):
                await engine.copy_out(b"host memory", after_stream=1)


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_stream_waits_for_a_transfer(cuda: SimulatedCuda, cancelled: bool) -> None:
    before, after = numbers(), -numbers()
    with cuda.array(before) as array, cuda.array(np.zeros_like(before)) as reader:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream() as held, cuda.stream() as waiting:
                held.hold()
                transfer = await engine.start_copy_in(array, after, after_stream=held.handle)
                transfer.stream_wait(waiting.handle)
                waiting.copy(reader, array)
                await anyio.sleep(0.02)
                assert not reader.download().any()
                if cancelled:
                    transfer.cancel()
                    with pytest.raises(kvferry.TransferCancelled):
                        await transfer.wait()
                else:
                    held.release()
                    await transfer.wait()
                waiting.synchronize()
                assert np.array_equal(reader.download(), before if cancelled else after)
                # The stream does not wait for a transfer that has ended.
                transfer.stream_wait(waiting.handle)
                waiting.synchronize()


@pytest.mark.parametrize("default", [1, 2], ids=["legacy", "per thread"])
async def test_a_default_stream_is_followed_on_whichever_device_it_holds_work(
    two_devices: SimulatedCuda, default: int
) -> None:
    await assert_a_save_follows_the_stream(two_devices, default, device=1)
