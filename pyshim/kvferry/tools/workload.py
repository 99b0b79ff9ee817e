"""What the demonstration and the benchmarks do with a context: prompts that give sequences a known
layout, and decoding beside transfers."""

from __future__ import annotations

import os
import random
import threading
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
"""The ids of the sequences: the first is saved, and loaded into the third; the second decodes."""

SEQUENCES = 4

Arrangement = Literal["alone", "in turn", "at random"]
"""How the cells of a sequence lie. ``alone``: one prompt, so that the cells are neighbours. ``in
turn``: four prompts, one token of each in turn, so that a sequence has every fourth cell. ``at
random``: four prompts shuffled, so that the runs of cells have no regular pitch."""

Items = list[tuple[int, int]]


def prompt(arrangement: Arrangement, tokens: int, vocabulary: int) -> Items:
    """Returns the (sequence, token) pairs that give each of its sequences ``tokens`` cells."""
    chance = random.Random(0)
    sequences = [SAVED] if arrangement == "alone" else list(range(SEQUENCES))
    turns = sequences * tokens
    if arrangement == "at random":
        chance.shuffle(turns)
    return [(seq, chance.randrange(vocabulary)) for seq in turns]


def cells(arrangement: Arrangement, tokens: int, spare: int) -> int:
    """Returns how many cells the prompts, a load into sequence 2 and ``spare`` more tokens need."""
    # With four prompts, the load takes the cells that its sequence had.
    return tokens * (2 if arrangement == "alone" else SEQUENCES) + spare


def decoding_threads() -> int:
    """Returns how many threads a context decodes with: one core is left free.

    llama.cpp's threads wait for each other, and spin while they wait. With a thread on every core,
    any other thread would delay all of them.
    """
    return max(1, len(os.sched_getaffinity(0)) - 1)


def step_items(index: int, vocabulary: int) -> Items:
    """Returns the (sequence, token) pair of a decode step, by the step's number."""
    return [(DECODED, (7 * index + 3) % vocabulary)]


@dataclass
class Decoding:
    """Decodes single tokens, one after the other, of one sequence."""

    llama: Llama
    context: Context
    budget: int
    """The most tokens that the sequence may grow by."""
    steps: list[Step] = field(default_factory=list)
    _rewound: int = 0  # how many steps have been removed from the sequence again
    _stepped: anyio.Event = field(default_factory=anyio.Event)

    @property
    def left(self) -> int:
        return self.budget - (len(self.steps) - self._rewound)

    async def rewind(self) -> None:
        """Removes the decoded tokens, so that the next steps start with a short sequence again.

        Raises LlamaError for a recurrent cache, which cannot remove a part of a sequence.
        """
        await self.llama.run(self.context.shorten, DECODED, len(self.steps) - self._rewound)
        self._rewound = len(self.steps)

    async def step(self) -> None:
        items = step_items(len(self.steps), self.context.model.vocabulary)
        step = await self.llama.run(self.context.decode, items)
        self.steps.append(step)
        self._stepped.set()
        self._stepped = anyio.Event()

    async def several(self, count: int) -> list[Step]:
        """Decodes so many steps, or as many as the budget allows, and returns them."""
        first = len(self.steps)
        for _ in range(min(count, self.left)):
            await self.step()
        return self.steps[first:]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Decodes until the ``with`` block ends, or the budget is spent."""
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
        """Waits for so many steps, in a ``running`` block."""
        target = len(self.steps) + min(count, self.left)
        while len(self.steps) < target:
            await self._stepped.wait()

    def during(self, begin_ns: int, end_ns: int) -> list[Step]:
        """Returns the steps that overlap an interval."""
        return [step for step in self.steps if step.end_ns > begin_ns and step.begin_ns < end_ns]


async def submit(llama: Llama, start: Awaitable[Transfer[T]]) -> tuple[Transfer[T], int]:
    """Starts a transfer; returns it, and the time when the submitting call returned.

    The context's thread takes that time right after the call: while copying keeps all cores busy,
    this task continues much later. The thread waits at a gate until both calls have been queued, so
    that it never waits for this task between them. (For asyncio, which begins tasks in order.)
    """
    transfers: list[Transfer[T]] = []
    times: list[int] = []
    gate = threading.Event()

    async def wait() -> None:
        transfers.append(await start)

    async def take_time() -> None:
        times.append(await llama.run(time.monotonic_ns))

    async with anyio.create_task_group() as tasks:
        try:
            tasks.start_soon(llama.run, gate.wait)
            for task in (wait, take_time):
                tasks.start_soon(task)
            await anyio.lowlevel.checkpoint()  # now the tasks have queued their calls
        finally:
            gate.set()
    return transfers[0], times[0]


def ended(transfer: Transfer[Any]) -> Completion:
    """Returns the completion of a transfer that has ended."""
    assert transfer.completion is not None
    return transfer.completion


def seconds(completion: Completion) -> float:
    """Returns the seconds from the submitting call to the completion."""
    return (completion.finished_ns - completion.submitted_ns) / 1e9


def step_percentile(steps: Sequence[Step], percent: float) -> float | None:
    """Returns a percentile of the steps' milliseconds, by nearest rank; None if there are no steps.

    The 99th percentile of few steps is the longest one.
    """
    ordered = sorted(step.ms for step in steps)
    if not ordered:
        return None
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
