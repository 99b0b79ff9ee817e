"""Failing calls of the driver, and lost devices."""

from __future__ import annotations

import anyio
import kvferry
import pytest
from support.cuda_arrays import numbers
from support.cuda_driver import NEEDS_CUDA, release_second_device
from support.event_loops import anyio_backend  # noqa: F401
from support.simulated_cuda import Error, SimulatedCuda

pytestmark = [pytest.mark.anyio, NEEDS_CUDA]


async def test_a_failed_copy_is_told_and_the_engine_goes_on(simulated: SimulatedCuda) -> None:
    host = numbers()
    with simulated.array(host) as array:
        async with kvferry.Engine("cuda") as engine:
            simulated.fail("cuMemcpyDtoHAsync", error=Error.INVALID_VALUE)
            with pytest.raises(kvferry.KvferryError, match="cuMemcpyDtoHAsync") as failure:
                await engine.copy_out(array)
            assert failure.value.name == "KVF_ERR_DEVICE"
            assert (await engine.copy_out(array)).to_bytes() == host.tobytes()


async def test_no_memory_to_pin(simulated: SimulatedCuda) -> None:
    host = numbers()
    with simulated.array(host) as array:
        async with kvferry.Engine("cuda") as engine:
            simulated.set(pinned_limit=simulated.count("pinned_bytes"))
            with pytest.raises((MemoryError, kvferry.KvferryError)):
                await engine.copy_out(array)
            simulated.set(pinned_limit=2**64 - 1)
            assert (await engine.copy_out(array)).to_bytes() == host.tobytes()


async def test_a_cancelled_task_waits_for_the_copy_under_way(simulated: SimulatedCuda) -> None:
    host = numbers()
    with simulated.array(host) as array:
        async with kvferry.Engine("cuda") as engine:
            buffer = await engine.allocate(host.nbytes)
            simulated.hold()

            async def release_later() -> None:
                await anyio.to_thread.run_sync(simulated.wait_held)
                scope.cancel()
                await anyio.sleep(0.02)
                assert buffer.jobs == 1  # the device still writes into it
                simulated.release()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(release_later)
                with anyio.CancelScope() as scope:
                    await engine.copy_out(array, buffer)
            assert scope.cancelled_caught
            assert buffer.jobs == 0
            buffer.close()


async def test_a_lost_device_is_an_exception_of_its_own(simulated: SimulatedCuda) -> None:
    simulated.set(devices=2)
    host = numbers()
    with simulated.array(host, device=1) as array, simulated.array(host) as other:
        async with kvferry.Engine("cuda") as engine:
            simulated.hold()
            transfer = await engine.start_copy_out(array)
            await anyio.to_thread.run_sync(simulated.wait_held)
            simulated.lose_device(1)
            with pytest.raises(kvferry.DeviceLost, match="CUDA_ERROR_ECC_UNCORRECTABLE"):
                await transfer.wait()
            simulated.release()
            with pytest.raises(kvferry.DeviceLost):
                await engine.copy_out(array)
            assert [d.get("broken") for d in engine.describe()["devices"]] == [None, False, True]
            assert (await engine.copy_out(other)).to_bytes() == host.tobytes()
        # The test's own context of the device is lost too.
        with pytest.raises(Exception, match="214"):
            array.close()
    release_second_device(simulated)
