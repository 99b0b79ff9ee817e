"""The contexts that are prepared, and what is measured in each: a table for host and for CUDA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ... import Engine
from ..libllama import Model
from ..workload import SEQUENCES, Arrangement
from .figures import beside_decoding, event_loop, memory, state, transfers
from .measurement import Goal, Measurement, Stage, at_least, at_most
from .prepared import Prepared
from .preparing import prepare
from .raw import RawMaker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OpenModel = Callable[[str, Mapping[str, int]], AbstractAsyncContextManager[Model]]
"""Takes a kind, and the sizes that differ from the geometry "demo". If the user has named a model,
opens that instead."""


@dataclass(frozen=True)
class Bench:
    engine: Engine
    open_model: OpenModel
    make_raw: RawMaker
    tokens: int | None
    real_model: bool


@dataclass(frozen=True)
class Shape:
    """The properties of a stage's context."""

    name: str
    tokens: int
    arrangement: Arrangement = "alone"
    flash_attention: bool = True
    sizes: Mapping[str, int] = field(default_factory=dict)
    steps: int = 0
    """The most single tokens that a measurement decodes."""
    repeats: int = 10
    sequences: int = SEQUENCES
    """The sequences of the context."""
    apart: bool = False
    """Whether the prompt is decoded by ``Context.decode_apart``."""


def open_stage(bench: Bench, shape: Shape, measurements: list[Measurement]) -> Stage:
    @asynccontextmanager
    async def open_() -> AsyncIterator[Prepared]:
        async with (
            bench.open_model("llama", shape.sizes) as model,
            prepare(
                shape.name,
                bench.engine,
                model,
                bench.make_raw,
                arrangement=shape.arrangement,
                tokens=bench.tokens or shape.tokens,
                flash_attention=shape.flash_attention,
                steps=shape.steps,
                repeats=shape.repeats,
                sequences=shape.sequences,
                apart=shape.apart,
            ) as prepared,
        ):
            yield prepared

    return Stage(shape.name, open_, measurements)


def host(bench: Bench) -> list[Stage]:
    """The measurements on the host: copies from memory to memory."""
    # 4 MiB a token: 1 GiB after 256 tokens. Few, because attention takes time by tokens x bytes.
    wide = {"layers": 64, "heads": 128, "kv_heads": 128, "embedding": 32, "feed_forward": 32}
    return [
        open_stage(
            bench,
            Shape("contiguous", 256, sizes=wide, repeats=5),
            [
                state.same_bytes(),
                state.size_query(at_most(5)),
                transfers.of_raw("save", at_least(0.9)),
                transfers.of_raw("load", at_least(0.9)),
                transfers.against_native("save", None),
                transfers.against_native("load", None),
                memory.host_memory(at_most(64)),
                event_loop.longest_stall(at_most(1)),
                event_loop.longest_own_stall(at_most(1)),
            ],
        ),
        open_stage(
            bench,
            Shape("V transposed", 512, flash_attention=False, repeats=5),
            [
                state.same_bytes(),
                transfers.against_native("save", None),
                transfers.against_native("load", None),
            ],
        ),
        open_stage(
            bench,
            Shape("four in turn", 256, "in turn", repeats=9),
            [
                state.same_bytes(),
                state.size_query(at_most(5)),
                transfers.against_native("save", at_least(1)),
                transfers.against_native("load", at_least(1)),
            ],
        ),
        open_stage(
            bench,
            Shape("8B geometry", 512, steps=100, repeats=5),
            [
                beside_decoding.decode_loss("save", None),
                beside_decoding.decode_percentile("save", 50, None),
                beside_decoding.decode_percentile("save", 99, None),
                beside_decoding.background_speed("save", None),
                beside_decoding.decode_loss("load", None),
                beside_decoding.background_speed("load", None),
            ],
        ),
    ]


def cuda(bench: Bench) -> list[Stage]:
    """The measurements on CUDA. The goals are for an H200 and a state of 1 GiB."""
    tokens = 8192
    steps = 100
    prefill = at_least(20) if bench.real_model else None
    return [
        open_stage(
            bench,
            Shape("contiguous", tokens, steps=steps),
            [
                *_common(0.98, 0.98, beyond=1, native=1),
                transfers.pageable_against_native("save", at_least(2.5)),
                transfers.pageable_against_native("load", at_least(4)),
                *_beside_decoding(p50=3, p99=8, speed=0.95),
                transfers.against_prefill(prefill),
                transfers.against_prefill(prefill, "ahead"),
                transfers.both_directions(at_least(1.7)),
                memory.device_memory(at_most(64)),
                memory.host_memory(at_most(64)),
                transfers.first_byte(at_most(100)),
                state.size_query(at_most(5)),
                event_loop.longest_stall(at_most(1)),
                event_loop.longest_own_stall(at_most(1)),
            ],
        ),
        open_stage(
            bench,
            Shape("V transposed", tokens, flash_attention=False, steps=20),
            _common(0.98, 0.98, native=12),
        ),
        open_stage(
            bench,
            Shape("four in turn", tokens, "in turn", steps=steps),
            [
                *_common(0.98, 0.98, beyond=15, native=150, interleaved=SEQUENCES),
                *_beside_decoding(p50=4, p99=9, speed=0.88),
                memory.device_memory(at_most(64)),
                memory.host_memory(at_most(64)),
            ],
        ),
        open_stage(
            bench,
            Shape("at random", tokens, "at random", steps=steps),
            [
                *_common(0.98, 0.97, native=150),
                *_beside_decoding(p50=4, p99=9, speed=0.88),
                memory.device_memory(at_most(64)),
            ],
        ),
    ]


def _common(
    save: float,
    load: float,
    *,
    native: float,
    beyond: float | None = None,
    interleaved: int = 1,
) -> list[Measurement]:
    goal: Goal | None = at_most(beyond) if beyond is not None else None
    return [
        state.same_bytes(),
        transfers.of_raw("save", at_least(save), interleaved),
        transfers.of_raw("load", at_least(load), interleaved),
        transfers.beyond_raw("save", goal),
        transfers.beyond_raw("load", goal),
        transfers.against_native("save", at_least(native)),
        transfers.against_native("load", at_least(native)),
        # These take as much extra device memory as the state has bytes.
        transfers.beyond_raw("load", goal, "ahead"),
        transfers.against_native("load", at_least(native), "ahead"),
    ]


def _beside_decoding(*, p50: float, p99: float, speed: float) -> list[Measurement]:
    return [
        measurement
        for direction in ("save", "load")
        for measurement in (
            beside_decoding.decode_percentile(direction, 50, at_most(p50)),
            beside_decoding.decode_percentile(direction, 99, at_most(p99)),
            beside_decoding.background_speed(direction, at_least(speed)),
            beside_decoding.decode_loss(direction, None),
            beside_decoding.pacing_cost(direction, at_most(0.6)),
        )
    ]
