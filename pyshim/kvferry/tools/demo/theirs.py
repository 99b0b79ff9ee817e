"""Runs a layout with llama.cpp's own blocking calls."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from ..libllama import Context, LlamaError
from ..workload import LOADED, SAVED, Items, step_items
from .ours import Ours
from .script import REPEATS, median_us, next_token


@dataclass
class Theirs:
    """The results of a layout with llama.cpp's own calls."""

    state: NDArray[numpy.uint8]
    resaved: NDArray[numpy.uint8]
    logits: bytes
    figures: dict[str, Any]


def with_llama(context: Context, items: Items, ours: Ours, say: Callable[[str], None]) -> Theirs:
    """Does what ``ours.script`` lists, in a context of its own."""
    say("the same with llama.cpp's own calls")
    context.decode(items)
    nbytes = context.state_size(SAVED)
    buffer = numpy.zeros(nbytes, numpy.uint8)
    address = buffer.ctypes.data
    save_ms = [
        _call_ms(lambda: context.state_get(SAVED, address, nbytes), "save")
        for _ in range(REPEATS + 1)
    ][1:]
    size_query_us = median_us(lambda: context.state_size(SAVED))
    load_ms: list[float] = []
    state = buffer
    for event in ours.script:
        if event == "save":
            state = buffer[: context.state_get(SAVED, address, nbytes)]
        elif event == "load":
            call = functools.partial(context.state_set, LOADED, address, state.nbytes)
            load_ms.append(_call_ms(call, "load"))
        else:
            context.decode(step_items(event, context.model.vocabulary))
    resaved = numpy.empty(context.state_size(LOADED), numpy.uint8)
    context.state_get(LOADED, resaved.ctypes.data, resaved.nbytes)
    context.decode(next_token(context))
    return Theirs(
        state,
        resaved,
        context.logits(),
        {
            "native_save_ms": statistics.median(save_ms),
            "native_load_ms": statistics.median(load_ms),
            "native_size_query_us": size_query_us,
        },
    )


def _call_ms(call: Callable[[], int], what: str) -> float:
    begin = time.monotonic_ns()
    done = call()
    end = time.monotonic_ns()
    if not done:
        raise LlamaError(f"llama.cpp's own {what} failed")
    return (end - begin) / 1e6
