"""Blocks against whole states: what a turn of a conversation moves, and how long that takes."""

from __future__ import annotations

import anyio
import numpy

from .... import join_blocks
from ...table import mib, ms
from ...workload import SAVED
from ..alone import Samples
from ..conversation import LATER_TURNS
from ..measurement import Goal, Measurement, Reading, at_least
from ..moved import BLOCK_TOKENS
from ..prepared import Prepared


def same_bytes() -> Measurement:
    """Whether the bytes are right: otherwise the other figures mean nothing."""

    async def measure(prepared: Prepared) -> Reading:
        blocks = await prepared.blocks("blocks")
        parts = prepared.llama.describe()["parts_in_blocks"]
        address = prepared.pageable.ctypes.data
        await prepared.llama.run(prepared.context.state_get, SAVED, address, prepared.nbytes)

        def equal() -> bool:
            joined = join_blocks(blocks.saved, parts_in_blocks=parts)
            return numpy.array_equal(joined.numpy(), prepared.pageable)

        same = await anyio.to_thread.run_sync(equal)
        text = f"{len(blocks.saved)} blocks, joined, against llama.cpp's own call for the state"
        return Reading(float(same), text)

    return Measurement("bit-identical", "1 = yes", at_least(1), measure)


def new_tokens(goal: Goal | None) -> Measurement:
    """How long the save after a turn takes."""

    async def measure(prepared: Prepared) -> Reading:
        new, whole = await _both(prepared)
        text = (
            f"{mib(new.completion.bytes)} MiB, raw {ms(new.raw_ms)} ms; the whole state of "
            f"{mib(prepared.nbytes)} MiB {ms(whole.our_ms)} ms"
        )
        return Reading(new.our_ms, text, _details(new, whole))

    name = f"save of {BLOCK_TOKENS} new tokens, submit to completion"
    return Measurement(name, "ms", goal, measure)


def thread_held(goal: Goal | None) -> Measurement:
    """How long the context's thread cannot decode because of the save after a turn."""

    async def measure(prepared: Prepared) -> Reading:
        new, whole = await _both(prepared)
        text = (
            f"libllama lists for {ms(new.listing_ms)} ms, names for {ms(new.naming_ms)} ms; "
            f"the whole state {ms(whole.held_ms)} ms"
        )
        return Reading(new.held_ms, text, _details(new, whole))

    name = f"thread held by a save of {BLOCK_TOKENS} new tokens"
    return Measurement(name, "ms", goal, measure)


def times_as_fast(goal: Goal | None) -> Measurement:
    async def measure(prepared: Prepared) -> Reading:
        new, whole = await _both(prepared)
        text = (
            f"{ms(new.our_ms)} ms, the whole state {ms(whole.our_ms)} ms; raw copies of as many "
            f"bytes {whole.raw_ms / new.raw_ms:.1f} times"
        )
        return Reading(whole.our_ms / new.our_ms, text, _details(new, whole))

    name = f"save of {BLOCK_TOKENS} new tokens against the whole state"
    return Measurement(name, "times as fast", goal, measure)


def bytes_of_turns(goal: Goal) -> Measurement:
    """The bytes that the saves after the last turns of a conversation move."""

    async def measure(prepared: Prepared) -> Reading:
        turns = await prepared.conversation()
        last = turns[-LATER_TURNS:]
        blocks, states = (
            sum(turn.block_bytes for turn in last),
            sum(turn.state_bytes for turn in last),
        )
        text = f"{mib(blocks)} MiB, whole states {mib(states)} MiB, after {prepared.tokens} tokens"
        return Reading(blocks / states, text, {"turns": [vars(turn) for turn in turns]})

    name = f"bytes moved by {LATER_TURNS} turns of {BLOCK_TOKENS} tokens"
    return Measurement(name, "of whole states", goal, measure)


async def _both(prepared: Prepared) -> tuple[Samples, Samples]:
    """The save of the last tokens alone, and that of the whole state."""
    new = await prepared.transfers("save", moved="new tokens")
    return new, await prepared.transfers("save")


def _details(new: Samples, whole: Samples) -> dict[str, float]:
    return {
        "new_ms": new.our_ms,
        "new_held_ms": new.held_ms,
        "state_ms": whole.our_ms,
        "state_held_ms": whole.held_ms,
    }
