"""Sequences that have been cut, copied, shifted or kept are moved as by llama.cpp's own calls.

A recurrent cell is kept whole or not at all: kinds with such cells allow only edits of whole
sequences. llama.cpp applies shifts, and copies between streams, at the next decode. States that are
saved before that decode must equal llama.cpp's own, too.
"""

from __future__ import annotations

from collections.abc import Callable

import kvferry
import pytest
from kvferry.tools.synthetic import KINDS
from support.devices import DEVICES
from support.like_contexts import CACHES, RECURRENT, MakeContext, assert_moved_as_by_llama_cpp
from support.llama_reference import Context

pytestmark = pytest.mark.anyio


def remove_from_the_middle(context: Context) -> None:
    assert context.seq_rm(0, 10, 20)


def remove_the_end(context: Context) -> None:
    assert context.seq_rm(0, 30, -1)


def remove_and_append(context: Context) -> None:
    assert context.seq_rm(0, 30, -1)
    context.decode(0, context.model.prompt(20, seed=5))


def copy(context: Context) -> None:
    context.seq_cp(0, 2)
    context.decode(3, [1])


def copy_delayed(context: Context) -> None:
    context.seq_cp(0, 2)


def copy_and_part(context: Context) -> None:
    context.seq_cp(0, 2)
    context.decode(2, context.model.prompt(5, seed=5))
    context.decode(0, context.model.prompt(5, seed=6))


def copy_a_part(context: Context) -> None:
    context.seq_cp(0, 2, 10, 20)


def shift(context: Context) -> None:
    assert context.seq_rm(0, 0, 8)
    context.seq_add(0, 8, -1, -8)
    context.decode(1, [1])


def shift_delayed(context: Context) -> None:
    assert context.seq_rm(0, 0, 8)
    context.seq_add(0, 8, -1, -8)


def keep(context: Context) -> None:
    context.seq_keep(0)


def start_again(context: Context) -> None:
    assert context.seq_rm(0)
    context.decode(0, context.model.prompt(20, seed=5))


def clear(context: Context) -> None:
    context.clear()
    context.decode(0, context.model.prompt(20, seed=5))


OF_WHOLE_SEQUENCES = [copy, copy_delayed, copy_and_part, keep, start_again, clear]
OF_PARTS = [remove_from_the_middle, remove_the_end, remove_and_append]


@pytest.mark.parametrize("cache", ["transposed", "streams"])
@pytest.mark.parametrize(
    ("kind", "edit"),
    [
        (kind, edit)
        for kind in KINDS
        for edit in OF_WHOLE_SEQUENCES + (OF_PARTS if kind not in RECURRENT else [])
    ],
)
async def test_an_edited_sequence_is_moved_as_by_llama_cpp(
    make_context: MakeContext, kind: str, cache: str, edit: Callable[[Context], None]
) -> None:
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    for context in (ours, like):
        context.decode_in_turn([0, 1], 40)
        edit(context)
    await assert_moved_as_by_llama_cpp(ours, like, 0, 3)
    if edit in (copy, copy_delayed, copy_and_part):
        await assert_moved_as_by_llama_cpp(ours, like, 2, 1)
        await assert_moved_as_by_llama_cpp(ours, like, 3, 2)


@pytest.mark.parametrize("cache", ["flash", "transposed", "q8_0"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "deepseek2"])
async def test_a_copied_part_is_moved_as_by_llama_cpp(
    make_context: MakeContext, kind: str, cache: str
) -> None:
    """Only in one stream: between streams, llama.cpp copies whole sequences."""
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    for context in (ours, like):
        context.decode_in_turn([0, 1], 40)
        copy_a_part(context)
    await assert_moved_as_by_llama_cpp(ours, like, 2, 3)


# What b10361 can shift. It says that it cannot shift qwen2vl; with deepseek32 and with quantised
# latent rows, the next decode ends the process.
SHIFTABLE = [
    *[(kind, cache) for kind in ("llama", "gemma3") for cache in CACHES],
    *[("deepseek2", cache) for cache in ("flash", "transposed", "streams")],
]


@pytest.mark.parametrize("edit", [shift, shift_delayed])
@pytest.mark.parametrize(("kind", "cache"), SHIFTABLE)
async def test_a_shifted_sequence_is_moved_as_by_llama_cpp(
    make_context: MakeContext, kind: str, cache: str, edit: Callable[[Context], None]
) -> None:
    ours, like = (make_context(kind, **CACHES[cache]) for _ in range(2))
    for context in (ours, like):
        assert context.can_shift
        context.decode_in_turn([0, 1], 40)
        edit(context)
    await assert_moved_as_by_llama_cpp(ours, like, 0, 3)


async def test_a_load_into_a_copy_leaves_its_origin_alone(make_context: MakeContext) -> None:
    """In a unified cache both sequences share their cells."""
    context, like = make_context("llama"), make_context("llama")
    for each in (context, like):
        each.decode_in_turn([0, 1], 40)
        each.seq_cp(0, 2)
    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        await llama.load(await llama.save(1), 2)
        with pytest.raises(kvferry.StateDamaged):
            await llama.load(b"no state at all", 2)
    like.seq_rm(2)
    assert context.state_get(0) == like.state_get(0)
    assert context.decode(0, [7]).tobytes() == like.decode(0, [7]).tobytes()
