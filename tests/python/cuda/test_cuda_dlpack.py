"""Arrays of devices that libraries lend through DLPack."""

from __future__ import annotations

import contextlib
import gc

import anyio
import kvferry
import numpy as np
import pytest
from kvferry._bridge import dlpack
from support.cuda_arrays import numbers, on_stream, pass_by
from support.cuda_driver import NEEDS_CUDA
from support.dlpack_arrays import LibraryArray
from support.event_loops import anyio_backend  # noqa: F401
from support.simulated_cuda import SimulatedCuda

pytestmark = [pytest.mark.anyio, NEEDS_CUDA]


@pytest.mark.parametrize("version", [(1, 0), None], ids=["version 1", "older"])
@pytest.mark.parametrize("kind", [dlpack.CUDA, dlpack.CUDA_MANAGED])
async def test_a_dlpack_array_is_saved_after_its_librarys_work(
    cuda: SimulatedCuda, kind: int, version: tuple[int, int] | None
) -> None:
    before, after = numbers(), -numbers()
    with cuda.array(before) as array, cuda.array(after) as computed:
        async with kvferry.Engine("cuda") as engine:
            # What the process does for the first time in a CUDA context may synchronise the
            # context. While the library's stream is held, that would wait for the stream: so the
            # same copy is made once before.
            assert await pass_by(engine, array) == before.tobytes()
            with cuda.stream() as librarys:
                shown = LibraryArray(
                    before,
                    array.address,
                    device=(kind, 0),
                    version=version,
                    make_wait=librarys.make_wait,
                )
                librarys.hold()
                librarys.copy(array, computed)
                transfer = await engine.start_copy_out(shown)
                assert [request["stream"] for request in shown.requests] == [1]
                assert await pass_by(engine, array) == before.tobytes()
                assert shown.given_back == 0
                librarys.release()
                assert (await transfer.wait()).to_bytes() == after.tobytes()
                assert shown.given_back == 1


async def test_an_interface_that_names_no_stream_is_asked_for_one_by_dlpack(
    cuda: SimulatedCuda,
) -> None:
    """An array with both protocols, and version 2 of the interface, as PyTorch's tensors have."""
    before, after = numbers(), -numbers()
    with cuda.array(before) as array, cuda.array(after) as computed:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream() as librarys:
                shown = LibraryArray(
                    before, array.address, device=(dlpack.CUDA, 0), make_wait=librarys.make_wait
                )
                interface = dict(array.__cuda_array_interface__)
                interface.pop("stream", None)
                shown.__cuda_array_interface__ = interface
                librarys.hold()
                librarys.copy(array, computed)
                transfer = await engine.start_copy_out(shown)
                librarys.release()
                assert (await transfer.wait()).to_bytes() == after.tobytes()
                assert [request["stream"] for request in shown.requests] == [1]
                await engine.copy_in(shown, before.tobytes())
                assert np.array_equal(array.download(), before)


async def test_dlpack_arrays_join_the_stream_that_is_followed(cuda: SimulatedCuda) -> None:
    host = numbers()
    with cuda.array(host) as array:
        async with kvferry.Engine("cuda") as engine:
            with cuda.stream() as stream:
                for expected, named, callers in [
                    (stream.handle, stream.handle, None),
                    (stream.handle, 1, stream.handle),
                    (2, None, 2),
                    (1, None, 0),  # CUDA also calls the legacy stream 0, DLPack does not
                ]:
                    shown = LibraryArray(host, array.address, device=(dlpack.CUDA, 0))
                    both = [shown, on_stream(array, named)]
                    out = await engine.copy_out(both, after_stream=callers)
                    assert out.to_bytes() == host.tobytes() * 2
                    assert [request["stream"] for request in shown.requests] == [expected]


async def test_a_load_into_a_dlpack_array(cuda: SimulatedCuda) -> None:
    host = numbers()
    part = host[:, ::2]
    with cuda.array(np.zeros_like(host)) as array:
        async with kvferry.Engine("cuda") as engine:
            shown = LibraryArray(part, array.address, device=(dlpack.CUDA, 0))
            await engine.copy_in(shown, part.tobytes())
            assert shown.requests[0]["copy"] is False
            assert shown.given_back == 1
        expected = np.zeros_like(host)
        expected[:, ::2] = part
        assert np.array_equal(array.download(), expected)


async def test_a_dlpack_array_is_released_once_however_its_transfer_ends(
    simulated: SimulatedCuda,
) -> None:
    host = numbers()
    with simulated.array(host) as array:
        async with kvferry.Engine("cuda") as engine:
            shown = LibraryArray(host, array.address, device=(dlpack.CUDA, 0))
            with pytest.raises(kvferry.BufferTooSmall):
                await engine.copy_out(shown, bytearray(1))
            gc.collect()
            assert shown.given_back == 1

            simulated.hold()
            transfer = await engine.start_copy_out(shown)
            await anyio.to_thread.run_sync(simulated.wait_held)
            transfer.cancel()
            gc.collect()
            assert shown.given_back == 1  # the device still reads it
            simulated.release()
            with contextlib.suppress(kvferry.TransferCancelled):
                await transfer.wait()
            del transfer
            gc.collect()
            assert shown.given_back == 2
