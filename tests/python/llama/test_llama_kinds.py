"""All kinds of models and caches are saved and loaded as by llama.cpp's own calls, bit for bit."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable

import kvferry
import pytest
from kvferry.tools.synthetic import GEOMETRIES, KINDS
from support import c_interface
from support.devices import DEVICES, ON_GPU
from support.like_contexts import (
    CACHES,
    LATENT,
    OPAQUE,
    MakeContext,
    assert_moved_as_by_llama_cpp,
    by_llama_cpp,
)
from support.llama_reference import Context
from support.sequence_edits import EDITS, can_edit

pytestmark = pytest.mark.anyio


def contiguous(context: Context) -> None:
    # Longer than a sliding window, so that a part of it has been masked.
    context.decode(0, context.model.prompt(2 * GEOMETRIES["small"].window))


def in_turn(context: Context) -> None:
    context.decode_in_turn([0, 1, 3], 20)


def at_random(context: Context) -> None:
    context.decode_at_random([0, 1, 3], 40)
    # The loaded sequence must find cells between those of others.
    context.seq_rm(1)


HISTORIES = [contiguous, in_turn, at_random]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        (kind, cache)
        for kind in KINDS
        for cache in CACHES
        if not (kind in LATENT and cache == "q8_0-keys-transposed")
    ],
)
async def test_a_sequence_is_moved_as_by_llama_cpp(
    make_context: MakeContext, kind: str, cache: str, history: Callable[[Context], None]
) -> None:
    if ON_GPU and kind == "deepseek4" and "q" in cache:
        pytest.skip("llama.cpp ends the process in ggml-cpu: ggml_is_contiguous(src0)")
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    history(ours)
    history(like)
    await assert_moved_as_by_llama_cpp(ours, like, 0, 2)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_guard_of_a_kind_is_known_once_it_has_cells(
    make_context: MakeContext, kind: str
) -> None:
    context = make_context(kind)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        context.decode(0, context.model.prompt(20))
        await llama.save(0)
        said = llama.describe()
    assert (said["format"] == "opaque") == (kind in OPAQUE)
    assert said["guarded_by"] == ("envelope" if kind in OPAQUE else "structure")


@pytest.mark.parametrize("cache", ["flash", "transposed", "streams"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_loaded_sequence_replaces_what_was_there(
    make_context: MakeContext, kind: str, cache: str
) -> None:
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    for context in (ours, like):
        context.decode_in_turn([0, 1, 2], 20)
        context.decode(2, context.model.prompt(50))
    await assert_moved_as_by_llama_cpp(ours, like, 0, 2)
    await assert_moved_as_by_llama_cpp(ours, like, 1, 1)


@pytest.mark.parametrize("kind", ["gemma3", "hybrid-iswa"])
async def test_a_window_kept_whole_is_moved_as_by_llama_cpp(
    make_context: MakeContext, kind: str
) -> None:
    ours, like = (make_context(kind, swa_full=True) for _ in range(2))
    for context in (ours, like):
        context.decode_in_turn([0, 1], 50)
    await assert_moved_as_by_llama_cpp(ours, like, 0, 2)


@pytest.mark.parametrize("cache", ["flash", "transposed", "streams"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_state_goes_from_one_context_to_another(
    make_context: MakeContext, kind: str, cache: str
) -> None:
    """Saves in one context and loads into a new one, which has never had a cell."""
    source, ours, like = (make_context(kind, **CACHES[cache]) for _ in range(3))
    source.decode_in_turn([0, 1], 20)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(source.address)
        snapshot = await llama.save(0)
        state = by_llama_cpp(llama, snapshot)
        llama = engine.attach(ours.address)
        assert llama.fingerprint == snapshot.fingerprint
        await llama.load(snapshot, 0)
    like.state_set(0, state)
    assert ours.state_get(0) == like.state_get(0)
    assert ours.decode(0, [7]).tobytes() == like.decode(0, [7]).tobytes()


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("cache", ["flash", "streams"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in OPAQUE])
async def test_no_edited_sequence_is_taken_for_damaged(
    make_context: MakeContext, kind: str, cache: str, edit: Callable[[Context], None]
) -> None:
    """Whatever llama.cpp itself writes is loaded as by its own call, also into a fresh context."""
    if not can_edit(edit, kind):
        pytest.skip("llama.cpp ends the process")
    options = {"n_ctx": 1024, "n_ubatch": 32} | CACHES[cache]
    source, like = (make_context(kind, **options) for _ in range(2))
    source.decode(0, source.model.prompt(70))
    source.decode(1, source.model.prompt(40, seed=1))
    edit(source)
    if source.pos_max(0) < 0:
        return
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(source.address)
        snapshot = await llama.save(0)
        state = by_llama_cpp(llama, snapshot)
        assert state == source.state_get(0)
        await llama.load(snapshot, 3)
        async with engine.attach(like.address) as fresh:
            await fresh.load(snapshot, 3)
            loaded = like.state_get(3)
            like.clear()
            assert like.state_set(3, state) == len(state)
            assert like.state_get(3) == loaded


async def test_a_sequence_that_fills_its_cache_is_moved_as_by_llama_cpp(
    make_context: MakeContext,
) -> None:
    ours, like = (make_context("llama", kv_unified=False, n_ctx=1024) for _ in range(2))
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(ours.address)
        for context in (ours, like):
            context.decode(0, context.model.prompt(256))
        snapshot = await llama.save(0)
        await llama.load(snapshot, 3)
        like.state_set(3, snapshot.to_bytes())
        assert ours.state_get(3) == like.state_get(3)
        assert ours.pos_max(3) == 255


@pytest.mark.parametrize("flags", [0, c_interface.FORCE_BLOCKING], ids=["tap", "blocking"])
def test_a_sequence_of_which_only_the_window_is_empty_does_not_hide_the_format(
    make_context: MakeContext, flags: int
) -> None:
    """libllama says that it is empty, but writes the cells of older tokens in the other layers."""
    whole = make_context("gemma3")
    whole.decode(1, whole.model.prompt(60, seed=1))
    state = whole.state_get(1)
    ours = make_context("gemma3", n_ctx=1024, n_batch=32, n_ubatch=32)
    for seed in range(20):
        ours.decode(0, ours.model.prompt(32, seed=seed))
    assert ours.seq_rm(0, 5, -1)
    assert ours.pos_max(0) == -1
    library = c_interface.Library(c_interface.LIBRARY)
    with (
        library.engine(devices=c_interface.Devices.HOST) as engine,
        engine.attach(ours.address, flags) as attachment,
    ):
        buffer = ctypes.create_string_buffer(state, len(state))
        assert attachment.load(1, buffer).wait() == "KVF_OK"
        assert json.loads(attachment.describe())["guarded_by"] == "structure"
    assert ours.state_get(1) == state
