"""What the demonstration and the benchmarks have a context do: prompts that leave a sequence in a
known layout, and decoding beside transfers."""

from __future__ import annotations

import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import anyio
import anyio.lowlevel

from .. import Completion, Llama, Transfer
from .libllama import Context, Step

T = TypeVar("T")

SAVED, DECODED, LOADED = 0, 1, 2
"""The sequences: one is saved while another decodes, and loaded into a third."""

SEQUENCES = 4

Arrangement = Literal["alone", "in turn", "at random"]
"""``alone``: one prompt, so that its cells lie side by side. ``in turn``: four prompts, one token
of each after the other, so that a sequence has every fourth cell. ``at random``: four prompts
shuffled, so that its runs of cells have no regular pitch."""

Items = list[tuple[int, int]]


def prompt(arrangement: Arrangement, tokens: int, vocabulary: int) -> Items:
    """(sequence, token) pairs that give each of its sequences ``tokens`` cells."""
    chance = random.Random(0)
    sequences = [SAVED] if arrangement == "alone" else list(range(SEQUENCES))
    turns = sequences * tokens
    if arrangement == "at random":
        chance.shuffle(turns)
    return [(seq, chance.randrange(vocabulary)) for seq in turns]


def cells(arrangement: Arrangement, tokens: int, spare: int) -> int:
    """Cells for the prompts, a load into sequence 2, and ``spare`` tokens more."""
    # In an arrangement of four, the load takes the cells that its sequence had.
    return tokens * (2 if arrangement == "alone" else SEQUENCES) + spare


def decoding_threads() -> int:
    """For contexts: llama.cpp's threads spin while they wait for each other, so that with one on
    every core whatever else runs would hold all of them up."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


@dataclass
class Decoding:
    """Single tokens that are appended to a sequence, one after the other."""

    llama: Llama
    context: Context
    budget: int
    """Most tokens that the sequence may grow by, for the cache is finite."""
    steps: list[Step] = field(default_factory=list)
    _rewound: int = 0  # steps up to here have been taken back
    _stepped: anyio.Event = field(default_factory=anyio.Event)

    def items(self, index: int) -> Items:
        """The token of a step, by its number, so that another context can repeat it."""
        return [(DECODED, (7 * index + 3) % self.context.model.vocabulary)]

    @property
    def left(self) -> int:
        return self.budget - (len(self.steps) - self._rewound)

    async def rewind(self) -> None:
        """Takes the tokens back, so that what follows starts with as short a sequence again.

        Raises LlamaError for a recurrent cache, which can't.
        """
        await self.llama.run(self.context.shorten, DECODED, len(self.steps) - self._rewound)
        self._rewound = len(self.steps)

    async def step(self) -> None:
        step = await self.llama.run(self.context.decode, self.items(len(self.steps)))
        self.steps.append(step)
        self._stepped.set()
        self._stepped = anyio.Event()

    async def several(self, count: int) -> list[Step]:
        first = len(self.steps)
        for _ in range(min(count, self.left)):
            await self.step()
        return self.steps[first:]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Decodes for as long as the body lasts, or until the budget is spent."""
        over = False

        async def decode() -> None:
            while not over and self.left > 0:
                await self.step()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(decode)
            try:
                yield
            finally:
                over = True

    async def pass_steps(self, count: int) -> None:
        """While it is running, waits for so many steps."""
        target = len(self.steps) + min(count, self.left)
        while len(self.steps) < target:
            await self._stepped.wait()

    def during(self, begin_ns: int, end_ns: int) -> list[Step]:
        """The steps that shared time with an interval."""
        return [step for step in self.steps if step.end_ns > begin_ns and step.begin_ns < end_ns]


async def submit(llama: Llama, start: Awaitable[Transfer[T]]) -> tuple[Transfer[T], int]:
    """Starts a transfer; returns it and when the submitting call came back.

    That is asked on the context's own thread, right after the call: this task learns of it late
    where copying keeps all cores busy. (For asyncio, which begins tasks in order.)
    """
    transfers: list[Transfer[T]] = []

    async def wait() -> None:
        transfers.append(await start)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.lowlevel.checkpoint()  # it has asked for its call
        recorded_ns = await llama.run(time.monotonic_ns)
    return transfers[0], recorded_ns


def ended(transfer: Transfer[Any]) -> Completion:
    """How a transfer that has ended was done."""
    assert transfer.completion is not None
    return transfer.completion


def seconds(completion: Completion) -> float:
    """From the submitting call to the completion."""
    return (completion.finished_ns - completion.submitted_ns) / 1e9


def step_percentile(steps: Sequence[Step], percent: float) -> float | None:
    """A percentile of the steps' milliseconds, by nearest rank; None of no steps.

    Of few steps, the 99th percentile is the longest.
    """
    ordered = sorted(step.ms for step in steps)
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
