"""What a walk knows: its two contexts, what is in flight, and what the sequences hold."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
import threading
from collections.abc import Callable
from typing import Literal

from support import c_interface
from support.abilities import Abilities
from support.holds import Hold, released_after, wait_until
from support.llama_reference import Context
from support.random_walk.caches import SEQUENCES
from support.simulated_cuda import SimulatedCuda, Stream

PATIENCE = 0.03
"""Seconds after which held transfers are released, because a call may be waiting for them."""


class Unequal(AssertionError):
    """The two contexts differ."""


@dataclasses.dataclass
class InFlight:
    """A transfer of a sequence in flight."""

    direction: Literal["save", "load"]
    job: c_interface.Job
    attachment: c_interface.Attachment
    read: Callable[[], bytes]
    """Returns the bytes of the buffers."""
    expected: bytes
    """What they hold when the transfer has ended."""
    state: bytes
    """The whole state of the sequence."""
    hold: Hold
    held: bool
    """Whether it is certainly still in flight."""
    may_be_decoded: bool
    """Whether the sequence may be decoded meanwhile."""

    def release(self) -> None:
        """Releases it."""
        self.held = False
        self.hold.release()


class WalkState:
    """The state of a walk, which all its operations share. Use it in a ``with`` statement."""

    def __init__(
        self, cuda: SimulatedCuda, ours: Context, like: Context, abilities: Abilities, seed: int
    ) -> None:
        self.ours = ours
        self.like = like
        self.can = abilities
        self.done: collections.Counter[str] = collections.Counter()
        """How often each operation was done, and how many decodes began beside a transfer."""
        self.history: collections.deque[str] = collections.deque(maxlen=40)
        """The last operations, newest at the end."""
        self.random = random.Random(seed)
        self._cuda = cuda
        self.library = c_interface.Library(c_interface.LIBRARY)
        self._closing = contextlib.ExitStack()
        self._engines: list[c_interface.Engine] = []
        self.attachments: list[c_interface.Attachment] = []
        self.streams: list[Stream] = []
        self.in_flight: dict[int, InFlight] = {}
        """The transfers in flight, by sequence."""
        self.states: list[bytes] = []
        """States that were saved, for loads."""
        self.shared: set[int] = set()
        """Sequences that share cells with others, since a copy in a unified cache."""
        self.shift_pending: set[int] = set()
        """Sequences whose shift is applied by the next decode."""
        self.copy_pending: set[int] = set()
        """Sequences onto which the next decode copies another stream. Until then their states have
        old bytes, which a cancelled load may have left."""
        self.copy_sources: set[int] = set()
        """The sequences of the streams that this decode reads."""

    def __enter__(self) -> WalkState:
        try:
            for _ in SEQUENCES:
                self.streams.append(self._closing.enter_context(self._cuda.stream()))
            for _ in range(2):
                engine = self.library.engine(copy_threads=1)
                self._engines.append(self._closing.enter_context(engine))
            self.attach()
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.release_all()
        for transfer in self.in_flight.values():
            transfer.job.wait()
        for attachment in self.attachments:
            attachment.detach()
        self._closing.close()

    def attach(self) -> None:
        if len(self.attachments) < 3:
            engine = self.random.choice(self._engines)
            self.attachments.append(engine.attach(self.ours.address))

    def note(self, text: str) -> None:
        self.history[-1] += f" {text}"

    def both(self) -> tuple[Context, Context]:
        return self.ours, self.like

    def forget_edits(self, seq: int) -> None:
        self.shared.discard(seq)
        self.shift_pending.discard(seq)

    # ---- Which sequences

    def choose(self, seqs: list[int]) -> int | None:
        """Returns one of them at random; None if there are none."""
        return self.random.choice(seqs) if seqs else None

    def resting(self) -> list[int]:
        """The sequences without a transfer in flight."""
        return [seq for seq in SEQUENCES if seq not in self.in_flight]

    def loadable(self) -> list[int]:
        """Resting sequences whose stream the next decode neither reads nor overwrites.

        llama.cpp copies a stream as it finds it at the next decode: a state that was loaded into
        the target meanwhile is lost, and one that was loaded into the source is copied instead.
        """
        pending = self.copy_pending | self.copy_sources
        return [seq for seq in self.resting() if seq not in pending]

    def holding_cells(self, seqs: list[int]) -> list[int]:
        return [seq for seq in seqs if self.like.pos_max(seq) >= 0]

    def decodable(self) -> list[int]:
        return [
            seq
            for seq in SEQUENCES
            if seq not in self.in_flight or self.in_flight[seq].may_be_decoded
        ]

    # ---- Waiting

    def not_for_ever(self) -> contextlib.AbstractContextManager[threading.Event]:
        """Releases all held transfers if the ``with`` block waits for one of them."""
        return released_after(PATIENCE, *self.in_flight.values())

    def release_all(self) -> None:
        for transfer in list(self.in_flight.values()):
            transfer.release()

    def move_all(self) -> None:
        jobs = [transfer.job for transfer in self.in_flight.values()]
        self.release_all()
        wait_until(lambda: all(job.done for job in jobs))
