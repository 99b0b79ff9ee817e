"""Runs one layout with kvferry and with llama.cpp's own calls, and compares them bit by bit."""

from __future__ import annotations

from typing import Any

import numpy

from ... import Engine
from ..libllama import Context, ContextOptions, Model
from ..table import Progress
from ..timeline import Timeline
from ..workload import SEQUENCES, cells, decoding_threads, prompt
from .layouts import Layout
from .ours import with_kvferry
from .script import SPARE
from .theirs import with_llama


async def compare(
    layout: Layout, model: Model, engine: Engine, tokens: int, progress: Progress
) -> tuple[dict[str, Any], Timeline]:
    """Returns the row of the table, and the timeline of the last save and load beside decoding.

    ``tokens`` is the length of the prompt, of all sequences together.
    """

    def say(text: str) -> None:
        progress.say(f"{layout.name}: {text}")

    tokens = min(tokens, layout.most_tokens or tokens)
    each = tokens if layout.arrangement == "alone" else max(1, tokens // SEQUENCES)
    context_options = ContextOptions(
        n_ctx=cells(layout.arrangement, each, SPARE),
        n_seq_max=SEQUENCES,
        threads=decoding_threads(),
        flash_attention=layout.flash_attention,
    )
    items = prompt(layout.arrangement, each, model.vocabulary)
    with Context(model, context_options) as context:
        async with engine.attach(context.address, library=model.library.loaded_as) as llama:
            ours = await with_kvferry(layout, engine, llama, context, items, say)
    with Context(model, context_options) as context:
        theirs = with_llama(context, items, ours, say)

    agreement = {
        "blob": numpy.array_equal(ours.state, theirs.state)
        and numpy.array_equal(ours.state, ours.state_by_llama),
        "saved_again": numpy.array_equal(ours.resaved, theirs.resaved),
        "next_logits": ours.logits == theirs.logits,
    }
    identical = all(agreement.values())
    say("bit-identical" if identical else f"DIFFERS: {agreement}")
    row = {
        "layout": layout.name,
        "bit_identical": identical,
        "agreement": agreement,
        "flash_attention": layout.flash_attention,
        "model": model.description,
        "tokens": each,
        **ours.figures,
        **theirs.figures,
    }
    return row, ours.timeline
