"""The modes of saves and loads, beside decoding; and libllama's blocking calls instead of the
tap."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import kvferry
import numpy as np
import pytest
from kvferry._native import lib
from kvferry.tools.synthetic import KINDS
from support.devices import DEVICES, LARGER, ON_GPU
from support.like_contexts import CACHES, ENVELOPE, OPAQUE, MakeContext, by_llama_cpp
from support.llama_reference import Context, Logits, Model, load_keeps_others

pytestmark = pytest.mark.anyio

OVERWRITTEN = {"gemma3", "mamba", "hybrid", "hybrid-iswa"}
"""Kinds where decoding a sequence overwrites bytes that a save of that sequence reads."""

LARGE_TOKENS = 48 * LARGER

IN_PLACE, SNAPSHOT = lib.KVF_SAVE_IN_PLACE, lib.KVF_SAVE_SNAPSHOT


def large_context(make_context: MakeContext, model: Model) -> Context:
    context = make_context(model, n_ctx=4 * LARGE_TOKENS)
    context.decode(0, model.prompt(LARGE_TOKENS))
    context.decode(1, model.prompt(8, seed=1))
    return context


async def decode_beside(
    llama: kvferry.Llama, context: Context, seq: int, token: int, transfer: kvferry.Transfer[Any]
) -> tuple[Logits, bool]:
    """Decodes a token; returns the logits, and whether the transfer was in flight before."""

    def decode() -> tuple[Logits, int]:
        began_ns = time.monotonic_ns()
        return context.decode(seq, [token]), began_ns

    logits, began_ns = await llama.run(decode)
    await transfer.wait()
    assert transfer.completion is not None
    return logits, transfer.completion.finished_ns > began_ns


# ---- Modes of a save -----------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["flash", "transposed", "streams"])
@pytest.mark.parametrize("kind", KINDS)
async def test_by_default_a_sequence_may_be_decoded_as_soon_as_its_save_has_been_started(
    make_context: MakeContext, kind: str, cache: str
) -> None:
    context = make_context(kind, **CACHES[cache])
    context.decode_in_turn([0, 1], 40)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        default = "snapshot" if kind in OVERWRITTEN | OPAQUE else "in_place"
        assert llama.describe()["default_mode"] == default
        for seed in range(5):
            state = context.state_get(0)
            transfer = await llama.start_save(0)
            await llama.run(context.decode, 0, context.model.prompt(10, seed))
            snapshot = await transfer.wait()
            assert by_llama_cpp(llama, snapshot) == state
            assert snapshot.completion is not None
            assert snapshot.completion.mode == (SNAPSHOT if default == "snapshot" else IN_PLACE)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_snapshot_does_not_mind_what_is_done_to_its_sequence(
    make_context: MakeContext, kind: str
) -> None:
    context = make_context(kind)
    context.decode_in_turn([0, 1], 40)

    def overwrite() -> None:
        context.seq_rm(0)
        context.decode(1, context.model.prompt(50, seed=1))
        context.clear()

    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        state = context.state_get(0)
        transfer = await llama.start_save(0, mode="snapshot")
        await llama.run(overwrite)
        snapshot = await transfer.wait()
        assert by_llama_cpp(llama, snapshot) == state
    assert snapshot.completion is not None
    assert snapshot.completion.mode == SNAPSHOT


@pytest.mark.parametrize("kind", sorted(OVERWRITTEN))
async def test_in_place_a_resting_sequence_is_saved_beside_the_decoding_of_others(
    make_context: MakeContext, kind: str
) -> None:
    context = make_context(kind)
    context.decode_in_turn([0, 1], 40)
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        for seed in range(5):
            transfer = await llama.start_save(0, mode="in_place")
            await llama.run(context.decode, 1, context.model.prompt(10, seed))
            snapshot = await transfer.wait()
            assert snapshot.to_bytes() == state
            assert snapshot.completion is not None
            assert snapshot.completion.mode == IN_PLACE


async def test_in_place_a_sequence_that_is_decoded_on_is_saved_as_it_was(
    make_context: MakeContext, large_model: Model
) -> None:
    context = large_context(make_context, large_model)
    state = (ctypes.c_uint8 * context.state_size(0))()
    assert context.state_get_into(0, state) == len(state)
    beside = 0
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        for token in range(8):
            transfer = await llama.start_save(0, mode="in_place")
            beside += (await decode_beside(llama, context, 0, token, transfer))[1]
            snapshot = await transfer.wait()
            assert np.array_equal(snapshot.numpy(), np.ctypeslib.as_array(state))
            assert context.seq_rm(0, LARGE_TOKENS, -1)
    assert beside > 0


# ---- Modes of a load -----------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["flash", "transposed", "streams"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_load_ahead_leaves_what_llama_cpps_own_does(
    make_context: MakeContext, kind: str, cache: str
) -> None:
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    for context in (ours, like):
        context.decode_at_random([0, 1], 40)
    state = like.state_get(0)
    like.state_set(2, state)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(ours.address)
        snapshot = await llama.save(0)
        # From pinned and pageable memory; into an empty sequence, and over a loaded one.
        for source in (snapshot, snapshot.to_bytes()):
            for priority in ("urgent", "background"):
                transfer = await llama.start_load(source, 2, priority=priority, mode="ahead")
                await transfer.wait()
                assert transfer.completion is not None
                ahead = ON_GPU and kind not in OPAQUE
                assert transfer.completion.mode == (
                    lib.KVF_LOAD_AHEAD if ahead else lib.KVF_LOAD_IN_PLACE
                )
                assert ours.state_get(2) == like.state_get(2)
        await llama.load(snapshot, 2, mode="in_place")
        assert ours.state_get(2) == like.state_get(2)
    assert np.array_equal(ours.decode(2, [7]), like.decode(2, [7]))


async def test_a_load_knows_its_modes(make_context: MakeContext) -> None:
    context = make_context("llama")
    context.decode(0, context.model.prompt(10))
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        with pytest.raises(ValueError, match="'ahead'"):
            await llama.load(snapshot, 1, mode="snapshot")  # type: ignore[arg-type]
        assert context.pos_max(1) == -1


# ---- Loads beside decoding -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["in_place", "ahead"])
async def test_others_decode_beside_a_load_as_if_it_had_ended(
    make_context: MakeContext, large_model: Model, mode: Any
) -> None:
    ours, like = (large_context(make_context, large_model) for _ in range(2))
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(ours.address)
        snapshot = await llama.save(0)
        state = snapshot.to_bytes()
        beside = 0
        for token in range(8):
            transfer = await llama.start_load(snapshot, 2, mode=mode)
            logits, overlapped = await decode_beside(llama, ours, 1, token, transfer)
            beside += overlapped
            like.state_set(2, state)
            assert np.array_equal(logits, like.decode(1, [token]))
        assert np.array_equal(ours.decode(2, [7]), like.decode(2, [7]))
    assert beside > 0


# ---- Size ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["flash", "transposed", "streams"])
@pytest.mark.parametrize("kind", KINDS)
async def test_size_is_known_and_reads_no_tensor_byte(
    make_context: MakeContext, kind: str, cache: str
) -> None:
    context = make_context(kind, **CACHES[cache])
    context.decode_in_turn([0, 1], 40)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        before = llama.describe()
        more = ENVELOPE if kind in OPAQUE else 0
        for seq in range(4):
            assert llama.size(seq) == context.state_size(seq) + more
        after = llama.describe()
        assert after == before
        context.state_get(0)  # this call reads them, and is counted
        assert llama.describe()["passed_calls"] > before["passed_calls"]


# ---- Blocking ------------------------------------------------------------------------------------


@pytest.fixture
def blocking(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments for `attach` that make kvferry use blocking calls although the tap would work.

    Python has no option for that, because no program needs it: so the flag that allows blocking
    calls is replaced by the flag that forces them.
    """

    native: Any = lib

    class Forcing:
        KVF_LLAMA_ALLOW_BLOCKING = native.KVF_LLAMA_FORCE_BLOCKING

        def __getattr__(self, name: str) -> Any:
            return getattr(native, name)

    monkeypatch.setattr("kvferry._bridge.attachment.lib", Forcing())
    return {"allow_blocking": True}


@pytest.mark.parametrize("cache", ["flash", "transposed", "streams"])
@pytest.mark.parametrize("kind", KINDS)
async def test_without_the_tap_the_same_bytes_are_moved(
    make_context: MakeContext, blocking: dict[str, Any], kind: str, cache: str
) -> None:
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    for context in (ours, like):
        context.decode_in_turn([0, 1], 40)
    state = like.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(ours.address, **blocking)
        assert llama.describe()["tap"] is False
        snapshot = await llama.save(0)
        assert llama.size(0) == snapshot.nbytes
        assert by_llama_cpp(llama, snapshot) == state
        assert snapshot.completion is not None
        assert snapshot.completion.mode == IN_PLACE
        await llama.load(snapshot, 2)
        like.state_set(2, state)
        assert by_llama_cpp(llama, await llama.save(2)) == like.state_get(2)
    assert np.array_equal(ours.decode(2, [7]), like.decode(2, [7]))


@pytest.mark.parametrize("kind", KINDS)
async def test_without_the_tap_bad_states_are_refused_and_leave_the_sequence_as_it_was(
    make_context: MakeContext, blocking: dict[str, Any], kind: str
) -> None:
    """All sequences are in use, so that no empty one shows the parts of the cache."""
    context = make_context(kind)
    context.decode_in_turn(range(4), 20)
    other, before = context.state_get(0), context.state_get(2)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address, **blocking)
        state = (await llama.save(0)).to_bytes()
        for bad in (state[:-1], state[:30], b"?" * len(state), state + bytes(16)):
            with pytest.raises((kvferry.StateDamaged, kvferry.StateMismatch)):
                await llama.load(bad, 2)
            assert context.state_get(2) == before
        await llama.load(state, 2)
        assert context.state_get(0) == other or not load_keeps_others(kind)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "hybrid"])
async def test_without_the_tap_a_load_into_a_full_cache_is_refused(
    make_context: MakeContext, blocking: dict[str, Any], kind: str
) -> None:
    context = make_context(kind, n_ctx=256)
    context.decode(0, context.model.prompt(100))
    state = context.state_get(0)
    context.decode(1, context.model.prompt(100))
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address, **blocking)
        with pytest.raises(kvferry.CacheFull):
            await llama.load(state, 2)
        assert context.pos_max(2) == -1
        assert context.state_get(0) == state
