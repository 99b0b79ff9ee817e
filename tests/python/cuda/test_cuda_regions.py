"""Transfers of device memory: on the simulated CUDA driver, or on a GPU with KVFERRY_TEST_GPU=1."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import anyio
import kvferry
import numpy as np
import pytest
from numpy.typing import NDArray
from support.cuda_arrays import View, numbers
from support.cuda_driver import NEEDS_CUDA
from support.devices import ON_GPU
from support.event_loops import anyio_backend  # noqa: F401
from support.simulated_cuda import SimulatedCuda

pytestmark = [pytest.mark.anyio, NEEDS_CUDA]


PARTS: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "whole": lambda a: a,
    "some planes": lambda a: a[2:5],
    "some rows": lambda a: a[:, 3:7],
    "some columns": lambda a: a[:, :, 5:9],
    "every other row": lambda a: a[:, ::2],
    "every third column": lambda a: a[..., ::3],
    "transposed": lambda a: a.T,
    "axes moved": lambda a: np.moveaxis(a, 1, 0),
    "one element": lambda a: a[1:2, 2:3, 3:4],
    "nothing": lambda a: a[:, 4:4],
}


async def test_the_engine_knows_the_device(cuda: SimulatedCuda) -> None:
    async with kvferry.Engine("cuda") as engine:
        description = engine.describe()
    assert [d["kind"] for d in description["devices"]][:2] == ["host", "cuda"]
    assert not description["devices"][1]["broken"]
    assert description["pool"]["pinned"]


@pytest.mark.parametrize(
    ("devices", "ordinals"),
    [("cuda:1", [1]), ([0, 2], [0, 2]), ((2,), [2]), (range(3), [0, 1, 2]), ("auto", [0, 1, 2])],
)
async def test_only_the_devices_that_are_named_are_opened(
    simulated: SimulatedCuda, devices: kvferry.Devices, ordinals: list[int]
) -> None:
    simulated.set(devices=3)
    contexts = simulated.count("live_contexts")
    async with kvferry.Engine(devices) as engine:
        assert simulated.count("live_contexts") == contexts + len(ordinals)
        described = engine.describe()["devices"]
    assert [each["ordinal"] for each in described if each["kind"] == "cuda"] == ordinals
    assert simulated.count("live_contexts") == contexts


async def test_a_named_device_that_cannot_be_used_is_an_error(simulated: SimulatedCuda) -> None:
    with pytest.raises(kvferry.NoDevice, match="device 7: the CUDA driver shows 1"):
        kvferry.Engine([0, 7])


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("priority", ["background", "urgent"])
async def test_any_strides_go_out_and_come_back(
    cuda: SimulatedCuda, part: Callable[[NDArray[Any]], NDArray[Any]], priority: Any
) -> None:
    host = numbers()
    with cuda.array(host) as source, cuda.array(-host) as target:
        async with kvferry.Engine("cuda") as engine:
            shown = View(source, host, part(host))
            out = await engine.copy_out(shown, priority=priority)
            assert out.to_bytes() == part(host).tobytes()
            await engine.copy_in(View(target, host, part(host)), out, priority=priority)
            out.close()
        expected = -host
        part(expected)[...] = part(host)
        assert np.array_equal(target.download(), expected)


@pytest.mark.parametrize("pinned", [True, False])
async def test_a_large_array_moves_through_every_kind_of_buffer(
    cuda: SimulatedCuda, pinned: bool
) -> None:
    host = np.random.default_rng(1).integers(0, 2**16, (300, 7000), np.uint16)
    every_other = host[:, ::2]
    with cuda.array(host) as source, cuda.array(np.zeros_like(host)) as target:
        async with kvferry.Engine("cuda") as engine:
            into = await engine.allocate(host.nbytes) if pinned else bytearray(host.nbytes)
            await engine.copy_out(source, into)
            assert bytes(memoryview(np.asarray(into))) == host.tobytes()
            await engine.copy_in(target, into)
            assert np.array_equal(target.download(), host)
            out = await engine.copy_out(View(source, host, every_other))
            assert out.to_bytes() == every_other.tobytes()
            del into, out


async def test_arrays_of_the_device_and_of_the_host_travel_together(cuda: SimulatedCuda) -> None:
    host = numbers()
    with cuda.array(host) as first, cuda.array(host[0] * 3) as second:
        async with kvferry.Engine("cuda") as engine:
            packed = await engine.copy_out([first, b"between", second])
            assert packed.to_bytes() == host.tobytes() + b"between" + (host[0] * 3).tobytes()
            between = bytearray(7)
            first.upload(0)
            second.upload(0)
            await engine.copy_in([first, between, second], packed)
            packed.close()
        assert between == b"between"
        assert np.array_equal(first.download(), host)
        assert np.array_equal(second.download(), host[0] * 3)


@pytest.mark.parametrize("columns", [slice(None), slice(4096, 8192), slice(100, 300)])
async def test_arrays_of_many_allocations_travel_together(
    cuda: SimulatedCuda, columns: slice
) -> None:
    """Equal parts of neighbours look like rows of one array, but no copy may span two arrays."""
    if not ON_GPU:
        cuda.set(guard_pages=0)
    hosts = np.random.default_rng(3).integers(0, 256, (16, 2 << 20), np.uint8)
    with contextlib.ExitStack() as closing:
        arrays = [closing.enter_context(cuda.array(host)) for host in hosts]
        in_order = sorted(zip(arrays, hosts, strict=True), key=lambda one: one[0].address)
        shown = [View(array, host, host[columns]) for array, host in in_order]
        async with kvferry.Engine("cuda") as engine:
            out = await engine.copy_out(shown)
            assert out.to_bytes() == b"".join(host[columns].tobytes() for _, host in in_order)
            for array in arrays:
                array.upload(0)
            await engine.copy_in(shown, out)
            out.close()
        for array, host in in_order:
            expected = np.zeros_like(host)
            expected[columns] = host[columns]
            assert np.array_equal(array.download(), expected)


async def test_many_transfers_at_once(cuda: SimulatedCuda) -> None:
    host = np.random.default_rng(2).integers(0, 256, (24, 50_000), np.uint8)
    with cuda.array(host) as source, cuda.array(np.zeros_like(host)) as target:
        async with kvferry.Engine("cuda") as engine:

            async def through(row: int) -> None:
                out = await engine.copy_out(View(source, host, host[row]))
                await engine.copy_in(View(target, host, host[row]), out)

            async with anyio.create_task_group() as tasks:
                for row in range(len(host)):
                    tasks.start_soon(through, row)
        assert np.array_equal(target.download(), host)


async def test_what_is_wrong_is_said(cuda: SimulatedCuda) -> None:
    host = numbers()
    with cuda.array(host) as array:
        async with kvferry.Engine("cuda") as engine:
            with pytest.raises(kvferry.BufferTooSmall):
                await engine.copy_out(array, bytearray(host.nbytes - 1))
            with pytest.raises(kvferry.BufferTooSmall):
                await engine.copy_in(array, bytes(host.nbytes - 1))
            beyond = kvferry.Region(address=array.address, width=1 << 40)
            with pytest.raises((kvferry.Unreachable, kvferry.BufferTooSmall)):
                await engine.copy_out(beyond, bytearray(8))
            read_only = View(array, host, host)
            read_only.__cuda_array_interface__["data"] = (array.address, True)
            with pytest.raises(kvferry.InvalidArgument, match="read-only"):
                await engine.copy_in(read_only, bytes(host.nbytes))
            assert engine.describe()["jobs_in_flight"] == 0
