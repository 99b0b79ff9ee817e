"""Calls that are refused: each with a clear error, and without any loss.

(Truncated and damaged states are in test_llama_damage.py, freed contexts in test_llama_freed.py.)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.to_thread
import kvferry
import numpy as np
import pytest
from kvferry.tools.synthetic import KINDS
from support.devices import DEVICES, LARGE_TOKENS
from support.like_contexts import CACHES, ENVELOPE, LATENT, OPAQUE, MakeContext, make_prompted
from support.llama_reference import Context, Model, Refused, fits, load_keeps_others

pytestmark = pytest.mark.anyio

LARGEST = 2**31 - 1


# ---- Sequences and buffers -----------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["flash", "streams"])
@pytest.mark.parametrize("kind", KINDS)
async def test_sequences_out_of_range_are_refused(
    make_context: MakeContext, kind: str, cache: str
) -> None:
    """libllama aborts at some of these ids, and uses or empties all sequences at others."""
    context = make_prompted(make_context, kind, **CACHES[cache])
    states = [context.state_get(seq) for seq in range(4)]
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        for seq in (-LARGEST - 1, -2, -1, 4, 5, 255, 256, 257, LARGEST):
            with pytest.raises(kvferry.SequenceRange):
                await llama.save(seq)
            with pytest.raises(kvferry.SequenceRange, match=f"sequence {seq}; .* 0 to 3"):
                await llama.load(snapshot, seq)
            with pytest.raises(kvferry.SequenceRange):
                await llama.remove(seq)
            with pytest.raises(kvferry.SequenceRange):
                llama.size(seq)
        for seq in (LARGEST + 1, -LARGEST - 2):
            with pytest.raises(kvferry.SequenceRange, match=f"sequence {seq}"):
                await llama.save(seq)
    assert [context.state_get(seq) for seq in range(4)] == states


@pytest.mark.parametrize("kind", KINDS)
async def test_an_empty_sequence_is_not_saved_but_an_empty_state_empties_one(
    make_context: MakeContext, kind: str
) -> None:
    """For some kinds, libllama would leave the sequence as it was, and report success."""
    context = make_prompted(make_context, kind)
    empty = context.state_get(3)
    other = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        with pytest.raises(kvferry.SequenceEmpty, match="sequence 3"):
            await llama.save(3)
        size = len(empty) + (ENVELOPE if kind in OPAQUE else 0)
        assert llama.size(3) == size
        await llama.load(empty, 1, trust=kind in OPAQUE)
        assert context.pos_max(1) == -1
        assert llama.size(1) == size
    assert context.state_get(0) == other or not load_keeps_others(kind)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_empty_state_goes_into_a_context_that_has_never_decoded(
    make_context: MakeContext, kind: str
) -> None:
    context = make_context(kind)
    empty = context.state_get(1)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        await llama.load(empty, 1, trust=kind in OPAQUE)
    assert context.state_get(1) == empty


async def test_a_buffer_that_is_too_small_is_refused_and_not_touched(
    make_context: MakeContext,
) -> None:
    context = make_prompted(make_context, "hybrid")
    state = context.state_get(0)
    memory = np.full(len(state) + 16, 0xA5, np.uint8)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        for size in (1, 7, 8, 12, 100, len(state) // 2, len(state) - 1):
            with pytest.raises(kvferry.BufferTooSmall, match=f"{len(state)} bytes are needed"):
                await llama.save(0, into=memory[:size])
            assert (memory[size:] == 0xA5).all()
        with pytest.raises((kvferry.InvalidArgument, kvferry.BufferTooSmall)):
            await llama.save(0, into=memory[:0])
        await llama.save(0, into=memory)
    assert memory[: len(state)].tobytes() == state
    assert (memory[len(state) :] == 0xA5).all()


async def test_a_state_of_no_bytes_is_refused_and_leaves_the_sequence(
    make_context: MakeContext,
) -> None:
    context = make_prompted(make_context, "llama")
    state = context.state_get(0)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        with pytest.raises(kvferry.InvalidArgument):
            await llama.load(b"", 0)
    assert context.state_get(0) == state


async def test_closed_memory_is_refused_and_nothing_waits_for_its_transfer(
    make_context: MakeContext,
) -> None:
    context = make_prompted(make_context, "llama")
    state = context.state_get(0)
    engine = kvferry.Engine(DEVICES)
    llama = engine.attach(context.address)
    snapshot = await llama.save(0)
    snapshot.close()
    buffer = await engine.allocate(len(state))
    buffer.close()
    with anyio.fail_after(20):
        with pytest.raises(kvferry.KvferryError, match="this Snapshot has been closed"):
            await llama.load(snapshot, 0)
        with pytest.raises(kvferry.KvferryError, match="this Buffer has been closed"):
            await llama.save(0, into=buffer)
        with pytest.raises(kvferry.KvferryError, match="this Buffer has been closed"):
            await engine.copy_out(b"anything", buffer)
        assert context.state_get(0) == state
        await llama.remove(0)
        await llama.detach()
        await engine.aclose()


@pytest.mark.parametrize("bad", [{"priority": "soon"}, {"mode": "soon"}])
async def test_a_refused_option_leaves_nothing_in_flight(
    make_context: MakeContext, bad: dict[str, Any]
) -> None:
    context = make_prompted(make_context, "llama")
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        with anyio.fail_after(20):
            with pytest.raises(ValueError, match="soon"):
                await llama.load(snapshot, 0, **bad)
            with pytest.raises(ValueError, match="soon"):
                await llama.save(0, **bad)
            await llama.remove(0)
            await llama.detach()


# ---- States of others ----------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False], ids=["in-use", "fresh"])
@pytest.mark.parametrize("kind", KINDS)
async def test_states_of_other_models_and_caches_are_refused(
    make_context: MakeContext, model: Callable[..., Model], kind: str, known: bool
) -> None:
    """Raw bytes, about which only their own content is known."""
    strangers: list[Context] = [
        make_prompted(make_context, other) for other in KINDS if fits(other)
    ]
    strangers.append(make_prompted(make_context, model(kind, geometry="other")))
    for name, cache in CACHES.items():
        if not (kind in LATENT and name == "q8_0-keys-transposed"):
            strangers.append(make_prompted(make_context, kind, **cache))
    states = {stranger.state_get(0) for stranger in strangers}

    context = make_context(kind)
    own = make_prompted(make_context, kind).state_get(0)
    if known:
        context.decode_in_turn([0, 1], 20)
        context.decode(2, [1, 2, 3])
    before = [context.state_get(seq) for seq in range(4)]
    # Some options change nothing for some kinds: mamba's cache is always the same.
    assert len(states - {own}) > 5
    async with kvferry.Engine(DEVICES) as engine:
        for state in states - {own}:
            async with engine.attach(context.address) as llama:
                with pytest.raises((kvferry.StateMismatch, kvferry.StateDamaged)):
                    await llama.load(state, 2)
            assert [context.state_get(seq) for seq in range(4)] == before
        llama = engine.attach(context.address)
        await llama.load(own, 2, trust=kind in OPAQUE)
        assert context.pos_max(2) == 19


@pytest.mark.parametrize(
    ("cache", "other", "why"),
    [
        ("flash", "q8_0", "types or row sizes"),
        ("q8_0", "q4_0", "types or row sizes"),
        ("flash", "transposed", "V is transposed"),
        ("transposed", "flash", "V is not transposed"),
        ("flash", "streams", "4 cache streams instead of 1"),
        ("streams", "flash", "1 cache streams instead of 4"),
    ],
)
async def test_a_state_of_another_cache_is_refused_with_the_reason(
    make_context: MakeContext, cache: str, other: str, why: str
) -> None:
    """Both caches are of the same model, so that the fingerprints are equal."""
    context = make_prompted(make_context, "llama", **CACHES[cache])
    stranger = make_prompted(make_context, "llama", **CACHES[other])
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await engine.attach(stranger.address).save(0)
        assert snapshot.fingerprint == llama.fingerprint
        with pytest.raises(kvferry.StateMismatch, match=why):
            await llama.load(snapshot, 2)
        assert context.pos_max(2) == -1


async def test_a_snapshot_of_another_model_is_refused_even_where_its_bytes_would_fit(
    make_context: MakeContext, model: Callable[..., Model]
) -> None:
    # A longer training context changes the model's metadata, but no tensor.
    context = make_prompted(make_context, "llama")
    stranger = make_prompted(make_context, model("llama", context=8192))
    context.decode(2, [1, 2, 3])
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await engine.attach(stranger.address).save(0)
        with pytest.raises(kvferry.StateMismatch, match=llama.fingerprint):
            await llama.load(snapshot, 2)
        assert context.pos_max(2) == 2  # unchanged, because libllama was not called
        assert llama.load_outcome(2) == "unchanged"
        await llama.load(snapshot.to_bytes(), 2)  # plain bytes have no fingerprint
        assert context.pos_max(2) == 19


# ---- A full cache --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["in_place", "ahead"])
@pytest.mark.parametrize("cache", ["flash", "transposed", "q8_0"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("mamba", "deepseek4")])
async def test_a_load_into_a_full_cache_is_refused_and_loses_no_cell(
    make_context: MakeContext, kind: str, cache: str, mode: Any
) -> None:
    context = make_context(kind, n_ctx=256, **CACHES[cache])
    context.decode(0, context.model.prompt(100))
    context.decode(1, context.model.prompt(100, seed=1))
    context.decode(2, context.model.prompt(10, seed=2))
    states = [context.state_get(0), context.state_get(1)]
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        snapshot = await llama.save(0)
        # Of an opaque state kvferry knows only that libllama refuses it.
        why = "did not take the state" if kind in OPAQUE else "100 cells"
        for target in (2, 3):
            with pytest.raises(kvferry.KvferryError, match=why) as refusal:
                await llama.load(snapshot, target, mode=mode)
            assert isinstance(refusal.value, kvferry.CacheFull) == (kind not in OPAQUE)
            assert context.pos_max(target) == -1
        assert [context.state_get(0), context.state_get(1)] == states
        # There is room for it in place of itself.
        await llama.load(snapshot, 0, mode=mode)
        assert context.pos_max(0) == 99
        await llama.remove(0)
        await llama.load(snapshot, 2)
    context.decode(3, context.model.prompt(56))
    with pytest.raises(Refused):
        context.decode(3, [1])


@pytest.mark.parametrize("kind", ["llama", "gemma3", "hybrid", "deepseek32"])
async def test_a_state_larger_than_the_cache_is_refused(
    make_context: MakeContext, kind: str
) -> None:
    for options in ({"n_ctx": 256}, {"n_ctx": 1024, "kv_unified": False}):
        source = make_context(kind, **{**options, "n_ctx": 2 * options["n_ctx"]})
        source.decode(0, source.model.prompt(300))
        context = make_context(kind, **options)
        async with kvferry.Engine(DEVICES) as engine:
            snapshot = await engine.attach(source.address).save(0)
            llama = engine.attach(context.address)
            for _ in range(2):
                with pytest.raises(kvferry.CacheFull, match="300 cells; a sequence may have 256"):
                    await llama.load(snapshot, 0)
                assert context.pos_max(0) == -1
                # From this load on, the cells of this cache are known.
                context.decode(1, [1])
        context.seq_rm(1)
        context.decode(0, context.model.prompt(256))


# ---- Sequences in use ----------------------------------------------------------------------------


async def test_a_sequence_in_use_is_refused_and_the_transfer_goes_on(
    make_context: MakeContext, large_model: Model
) -> None:
    context = make_context(large_model, n_ctx=8 * LARGE_TOKENS)
    context.decode(0, large_model.prompt(LARGE_TOKENS))
    context.decode(1, large_model.prompt(LARGE_TOKENS, seed=1))
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        first, second = [await llama.save(seq) for seq in (0, 1)]

        async def refused(call: Awaitable[object]) -> str:
            """Returns the text of the refusal; "" if the first transfer had ended already."""
            try:
                await call
            except kvferry.Busy as error:
                return str(error)
            return ""

        # A transfer that has ended refuses nothing: so repeat until both kinds met one in flight.
        texts: set[str] = set()
        for _ in range(100):
            # Several saves at the same time are allowed; a load beside a save is not.
            saves = [await llama.start_save(0) for _ in range(3)]
            texts.add(await refused(llama.load(second, 0)))
            for save in saves:
                assert np.array_equal((await save.wait()).numpy(), first.numpy())
            await llama.load(first, 0)

            load = await llama.start_load(first, 2)
            texts.add(await refused(llama.save(2)))
            texts.add(await refused(llama.load(first, 2)))
            other = await llama.start_load(second, 3)  # another sequence
            await load.wait()
            await other.wait()
            texts.discard("")
            if len(texts) == 2:
                break
        assert any("a save of sequence 0 is in flight" in text for text in texts)
        assert any("a load into sequence 2 is in flight" in text for text in texts)
        for source, target in ((first, 2), (second, 3)):
            loaded = await llama.save(target)
            assert np.array_equal(loaded.numpy()[-1000:], source.numpy()[-1000:])
            assert context.pos_max(target) == LARGE_TOKENS - 1
