"""Store on a disk that fails or hangs: what is in RAM is found, and no error reaches the tasks."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import kvferry
import pytest
from disk_stores import BLOCK, TOKENS, HangingDisk, prompted, store_in, until
from kvferry.llama import Llama
from kvferry.store import behind
from kvferry.store.behind import layout_note
from kvferry.store.disk import Disk
from kvferry.store.system import System
from support.devices import DEVICES
from support.event_loops import anyio_backend  # noqa: F401
from support.like_contexts import MakeContext

pytestmark = pytest.mark.anyio


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [each for each in caplog.records if each.name == "kvferry.store"]


# ---- Errors of the engine ------------------------------------------------------------------------


async def test_a_failing_restore_raises_the_plain_error(
    make_context: MakeContext, tmp_path: Path
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, store_in(tmp_path) as store:
        await store.keep(engine.attach(context.address), 0, prompt)
        await store.flush()
        store.clear()
        async with kvferry.Engine(DEVICES, pinned_limit=1) as small:
            with pytest.raises(kvferry.PinnedLimit):
                await store.restore(small.attach(context.address), 1, prompt)
        assert store.stats()["ram_reserved"] == 0


@pytest.mark.parametrize("problem", ["closed", "freed", OSError(5, "x"), ValueError(), KeyError()])
async def test_a_failing_prefetch_is_in_the_log_alone(
    make_context: MakeContext,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    problem: object,
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, store_in(tmp_path) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        await store.flush()
        store.clear()
        if problem == "closed":
            async with kvferry.Engine(DEVICES) as other:
                failing = other.attach(context.address)
        elif problem == "freed":
            freed, _ = prompted(make_context, "llama")
            failing = engine.attach(freed.address)
            freed.close()
        else:
            failing = engine.attach(context.address)

            async def fail(self: Llama, _: int) -> None:
                raise problem  # type: ignore[misc]

            monkeypatch.setattr(Llama, "allocate", fail)
        store.prefetch(failing, prompt)
        await until(lambda: lines(caplog))
        monkeypatch.undo()
        assert "not brought to RAM" in lines(caplog)[0].message
        assert await store.keep(llama, 0, prompt) == TOKENS
        assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
        store.clear()
        store.prefetch(llama, prompt)
        await until(lambda: store.stats()["ram_entries"] == 4)


# ---- A disk that fails ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["find", "children", "read_into", "write"])
@pytest.mark.parametrize("problem", [OSError(errno.EIO, "broken"), ValueError("x"), TypeError("x")])
async def test_a_disk_that_fails_is_one_that_has_nothing(
    make_context: MakeContext,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    problem: Exception,
) -> None:
    context, prompt = prompted(make_context, "llama")
    other = context.model.prompt(TOKENS, seed=1)
    context.decode(1, other)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            await store.keep(llama, 0, prompt)
        async with store_in(tmp_path) as store:

            def fail(*_: object) -> None:
                raise problem

            monkeypatch.setattr(Disk, method, fail)
            for each in (llama, engine.attach(make_context("llama", n_ctx=1024).address)):
                await store.find(each, prompt)
                await store.restore(each, 1, prompt)
            context.decode(1, other[context.pos_max(1) + 1 :])
            await llama.remove(1)
            await llama.run(context.decode, 1, other)
            assert await store.keep(llama, 1, other) == TOKENS
            assert await store.restore(llama, 2, other, leave=0) == TOKENS
            store.prefetch(llama, [*prompt, 1])
            await store.flush()
            monkeypatch.undo()
            assert lines(caplog)
            # The task that writes is alive.
            await llama.remove(0)
            third = context.model.prompt(TOKENS, seed=2)
            await llama.run(context.decode, 0, third)
            await store.keep(llama, 0, third)
            await store.flush()
        async with store_in(tmp_path) as store:
            assert await store.restore(llama, 1, third, leave=0) == TOKENS


async def test_a_note_that_says_nonsense_hides_no_other(
    make_context: MakeContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        async with store_in(tmp_path) as store:
            await store.keep(llama, 0, prompt)
            model = await store._identities._model(llama, b"")

        class Nonsense:
            value = "nonsense"

        disk = Disk(tmp_path, 1 << 30)
        assert disk.write(*layout_note(model, bytes(32), Nonsense))  # type: ignore[arg-type]
        disk.close()
        async with store_in(tmp_path) as store:
            fresh = engine.attach(make_context("llama", n_ctx=1024).address)
            assert await store.restore(fresh, 0, prompt, leave=0) == TOKENS
    assert "nonsense" in lines(caplog)[0].message


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_each_system_call_of_a_store_fails_once(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, prompt = prompted(make_context, "hybrid")
    call_once, calls, fails_at = System.call_once, 0, -1

    def fail(system: System, function: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(errno.EIO, "injected")
        return call_once(system, function, *arguments)

    monkeypatch.setattr(System, "call_once", fail)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        for at in range(1, 1000):
            async with store_in(tmp_path / f"{at}") as store:
                calls, fails_at = 0, at
                assert await store.keep(llama, 0, prompt) == TOKENS
                assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
                await store.flush()
                store.clear()
                await store.find(llama, prompt)
                count = await store.restore(llama, 1, prompt, leave=0)
                assert count in (0, TOKENS)
                assert context.pos_max(1) == count - 1
                assert store.stats()["ram_reserved"] == 0
                fails_at = -1
            if calls < at:
                break
        assert 40 < at < 999


# ---- A disk that hangs ---------------------------------------------------------------------------


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[HangingDisk]:
    disk = HangingDisk(monkeypatch)
    yield disk
    disk.end()


async def until_it_hangs(hanging: HangingDisk) -> None:
    await until(lambda: hanging.hanging)
    await anyio.sleep(2 * hanging.PATIENCE)


async def test_a_keep_does_not_wait_for_a_disk_that_hangs(
    make_context: MakeContext, tmp_path: Path, hanging: HangingDisk
) -> None:
    context = make_context("llama", n_ctx=1024)
    prompts = [context.model.prompt(100, seed=seed) for seed in range(30)]
    async with kvferry.Engine(DEVICES) as engine, store_in(tmp_path, ram="1 MiB") as store:
        llama = engine.attach(context.address)
        hanging.begin()
        counts = []
        with anyio.fail_after(20):
            for prompt in prompts:
                await llama.remove(0)
                await llama.run(context.decode, 0, prompt)
                counts.append(await store.keep(llama, 0, prompt))
        assert counts[0] == 100
        assert counts[-1] == 0, "there is no room for what is not written"
        hanging.end()
        with anyio.fail_after(20):
            await until(lambda: not store.stats()["disk_writes_pending"])
            assert await store.keep(llama, 0, prompts[-1]) == 100
            assert await store.restore(llama, 1, prompts[0], leave=0) == 100
            await store.flush()
            store.clear()
            assert await store.restore(llama, 1, prompts[0], leave=0) == 100
        assert store.stats()["ram_reserved"] == 0


async def test_a_disk_that_hangs_does_not_slow_what_is_in_ram(
    make_context: MakeContext, tmp_path: Path, hanging: HangingDisk
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, store_in(tmp_path) as store:
        llama = engine.attach(context.address)
        hanging.begin()
        await store.keep(llama, 0, prompt)
        await until_it_hangs(hanging)
        hung = hanging.hanging
        assert (await store.find(llama, prompt, leave=0)).tokens == TOKENS
        assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
        assert hanging.hanging == hung
        # Something that RAM has the beginning of is looked for on the disk: that waits once.
        with anyio.fail_after(20):
            assert await store.restore(llama, 1, [*prompt, 7, 8]) == TOKENS
        with anyio.fail_after(25 * hanging.PATIENCE):
            for _ in range(50):
                assert (await store.find(llama, [*prompt, 7, 8])).tokens == TOKENS
                assert await store.restore(llama, 1, [*prompt, 7, 8]) == TOKENS
        hanging.end()


async def test_a_read_that_hangs_shortens_what_is_restored(
    make_context: MakeContext, tmp_path: Path, hanging: HangingDisk
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine, store_in(tmp_path) as store:
        llama = engine.attach(context.address)
        await store.keep(llama, 0, prompt)
        await store.flush()
        store.clear()
        assert await store.restore(llama, 1, prompt[: 2 * BLOCK], leave=0) == 2 * BLOCK
        hanging.begin()
        with anyio.fail_after(20):
            assert await store.restore(llama, 1, prompt, leave=0) == 2 * BLOCK
        assert context.pos_max(1) == 2 * BLOCK - 1
        assert store.stats()["ram_reserved"] > 0, "threads may still write into the buffers"
        hanging.end()
        with anyio.fail_after(20):
            await until(lambda: not store.stats()["ram_reserved"])
            assert await store.restore(llama, 1, prompt, leave=0) == TOKENS


async def test_a_store_can_be_left_while_its_disk_hangs(
    make_context: MakeContext,
    tmp_path: Path,
    hanging: HangingDisk,
    caplog: pytest.LogCaptureFixture,
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        with anyio.fail_after(20):
            async with store_in(tmp_path) as store:
                hanging.begin()
                await store.keep(engine.attach(context.address), 0, prompt)
        assert any("hangs" in each.message for each in lines(caplog))
        hanging.end()


async def test_a_store_that_is_left_by_an_error_does_not_wait_for_its_writes(
    make_context: MakeContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        with contextlib.suppress(ZeroDivisionError):
            async with store_in(tmp_path) as store:
                await store.keep(llama, 0, prompt)
                raise ZeroDivisionError
        assert not lines(caplog)
        async with store_in(tmp_path) as store:
            assert await store.find(llama, prompt)


async def test_opening_a_folder_that_hangs_is_a_disk_that_has_nothing(
    make_context: MakeContext,
    tmp_path: Path,
    hanging: HangingDisk,
    caplog: pytest.LogCaptureFixture,
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        hanging.begin()
        with anyio.fail_after(20):
            async with store_in(tmp_path) as store:
                assert await store.keep(llama, 0, prompt) == TOKENS
                assert (await store.find(llama, prompt, leave=0)).tier == "ram"
                assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
                assert (await store.find(llama, [*prompt, 7])).tokens == TOKENS
                store.prefetch(llama, [*prompt, 7])
        assert any("hangs" in each.message for each in lines(caplog))
        hanging.end()


async def test_a_folder_that_hung_when_it_was_opened_is_used_when_it_answers(
    make_context: MakeContext, tmp_path: Path, hanging: HangingDisk
) -> None:
    context, prompt = prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        hanging.begin()
        with anyio.fail_after(20):
            async with store_in(tmp_path) as store:
                assert await store.keep(llama, 0, prompt) == TOKENS
                hanging.end()
                await until(lambda: not store.stats()["disk_writes_pending"])
                store.clear()
                assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
        async with store_in(tmp_path) as store:
            assert (await store.find(llama, prompt, leave=0)).tier == "disk"


async def test_a_folder_that_hung_and_then_cannot_be_opened(
    make_context: MakeContext,
    tmp_path: Path,
    hanging: HangingDisk,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    context, prompt = prompted(make_context, "llama")

    def fail(*_: object, system: System, **__: object) -> None:
        system.call(lambda: None)  # hangs
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(behind, "Disk", fail)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        hanging.begin()
        with anyio.fail_after(20):
            async with store_in(tmp_path) as store:
                hanging.end()
                await until(lambda: any("broken" in each.message for each in lines(caplog)))
                assert await store.keep(llama, 0, prompt) == TOKENS
                assert await store.restore(llama, 1, prompt, leave=0) == TOKENS
                assert (await store.find(llama, [*prompt, 7])).tokens == TOKENS
                await store.flush()
                assert store.stats()["disk_writes_failed"] > 0


async def test_the_wait_for_a_folder_that_hangs_can_be_cancelled(
    tmp_path: Path, hanging: HangingDisk
) -> None:
    hanging.begin()
    with anyio.fail_after(20):
        with anyio.move_on_after(hanging.PATIENCE / 2) as moved:
            async with store_in(tmp_path):
                pass
        assert moved.cancelled_caught
        hanging.end()
        async with store_in(tmp_path):
            pass
