"""Makes a context, decodes its prompts, and allocates its buffers."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy

from ... import Buffer, Engine, Llama
from ..libllama import Context, ContextOptions, Model, Step
from ..workload import (
    DECODED,
    LOADED,
    SAVED,
    SEQUENCES,
    Arrangement,
    Decoding,
    Items,
    cells,
    decoding_threads,
    prompt,
)
from .context import SMALL
from .moved import BLOCK_TOKENS
from .prepared import Prepared
from .raw import Raw, RawMaker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_GPU_WARM_UP_TOKENS = 512  # a whole batch, because kernels are loaded when they are first used
_WARM_UP_TOKENS = 32


@asynccontextmanager
async def prepare(
    name: str,
    engine: Engine,
    model: Model,
    make_raw: RawMaker,
    *,
    arrangement: Arrangement,
    tokens: int,
    flash_attention: bool,
    steps: int,
    repeats: int,
    sequences: int = SEQUENCES,
    apart: bool = False,
) -> AsyncIterator[Prepared]:
    """Decodes the prompts and allocates the buffers.

    ``steps`` is the most tokens that measurements decode later. With ``apart``, the prompt of the
    arrangement "alone" is decoded in parts that do not see each other.
    """
    small = _GPU_WARM_UP_TOKENS if model.gpu else _WARM_UP_TOKENS
    options = ContextOptions(
        n_ctx=cells(arrangement, tokens, steps + 2 * small + 8),
        n_seq_max=sequences,
        threads=decoding_threads(),
        flash_attention=flash_attention,
    )
    with Context(model, options) as context:
        library = model.library.loaded_as
        async with engine.attach(context.address, library=library) as llama:
            await _warm_up(llama, context, arrangement, small)
            items = prompt(arrangement, tokens, model.vocabulary)
            prefill = await _decode_prompt(llama, context, items, apart=apart)
            buffers = await _make_buffers(engine, llama, make_raw)
            prepared = Prepared(
                name,
                engine,
                llama,
                context,
                Decoding(llama, context, steps),
                buffers.nbytes,
                buffers.pinned,
                buffers.pageable,
                buffers.raw,
                repeats,
                prefill.ms,
                len(items),
                tokens,
                device_bytes_taken=buffers.device_bytes_taken,
                decodes_apart=apart,
            )
            try:
                yield prepared
            finally:
                prepared.drain_trace()
                buffers.raw.close()


class _Buffers(NamedTuple):
    nbytes: int
    pinned: Buffer
    pageable: numpy.ndarray
    raw: Raw
    device_bytes_taken: int | None


async def _make_buffers(engine: Engine, llama: Llama, make_raw: RawMaker) -> _Buffers:
    """Allocates buffers for the saved sequence, and fills both with its state."""
    nbytes = llama.size(SAVED)
    pinned = await engine.allocate(nbytes)
    pageable = numpy.ones(nbytes, numpy.uint8)
    taken = await _first_transfers(llama, pinned, make_raw)
    pageable[:] = pinned.numpy()
    raw = make_raw(pinned.numpy().ctypes.data, pageable.ctypes.data, nbytes)
    return _Buffers(nbytes, pinned, pageable, raw, taken)


async def _warm_up(llama: Llama, context: Context, arrangement: Arrangement, tokens: int) -> None:
    await llama.run(context.decode, [(SMALL, 1)] * tokens)
    await llama.run(context.remove, SMALL)
    if arrangement == "alone":
        # A short sequence of its own, so that its steps cost about the same throughout.
        await llama.run(context.decode, [(DECODED, 1)] * tokens)


async def _decode_prompt(llama: Llama, context: Context, items: Items, *, apart: bool) -> Step:
    if apart:
        return await _decode_apart(llama, context, items)
    return await llama.run(context.decode, items)


async def _decode_apart(llama: Llama, context: Context, items: Items) -> Step:
    tokens = [token for _, token in items]
    steps = [
        await llama.run(context.decode_apart, SAVED, tokens[first : first + BLOCK_TOKENS], SMALL)
        for first in range(0, len(tokens), BLOCK_TOKENS)
    ]
    return Step(steps[0].begin_ns, steps[-1].end_ns)


async def _first_transfers(llama: Llama, buffer: Buffer, make_raw: RawMaker) -> int | None:
    """Saves and loads once. Returns how many bytes of device memory that has taken; None where
    nothing tells."""
    before = make_raw.device_free_bytes()
    await llama.save(SAVED, into=buffer, priority="urgent")
    await llama.load(buffer, LOADED, priority="urgent")
    after = make_raw.device_free_bytes()
    return None if before is None or after is None else before - after
