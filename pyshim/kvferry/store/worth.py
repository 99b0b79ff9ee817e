"""Whether a prefix is worth its restore, or how much of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from ..llama import Llama
from .prefix import Prefix, Tier
from .speeds import Clock, PrefillSpeed, Stopwatch, TransferSpeed


@dataclass(frozen=True)
class Estimate:
    """How long a prefix takes, by what was measured. Seconds; None: not measured yet."""

    prefix: Prefix
    reads: Mapping[Tier, float | None]
    """From each tier beyond RAM. Tiers are read at the same time."""
    load: float | None
    """From RAM into the sequence."""
    prefill: float | None
    """To evaluate the same tokens, except for those that the sequence holds already."""

    @property
    def bring(self) -> float:
        """Seconds of reads and load. What was not measured is taken for fast, so that it is
        tried."""
        return max((seconds or 0.0 for seconds in self.reads.values()), default=0.0) + (
            self.load or 0.0
        )

    @property
    def gain(self) -> float:
        """Seconds that a restore saves. Endless where no prefill was measured."""
        return float("inf") if self.prefill is None else self.prefill - self.bring


@dataclass(frozen=True)
class Choice:
    """What is brought of a prefix."""

    whole: Estimate
    """Of the whole prefix."""
    best: Estimate | None
    """Of what is brought; None: nothing is."""
    trials: tuple[TransferSpeed, ...] = ()
    """Speeds for whose sake all is brought although it does not seem to pay."""


@dataclass
class _Context:
    """The speeds of one context."""

    load: TransferSpeed
    prefill: PrefillSpeed = field(default_factory=PrefillSpeed)


class Worth:
    """Compares what it takes to bring a prefix with what it takes to evaluate its tokens.

    For the thread of the event loop.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._tiers: dict[Tier, TransferSpeed] = {
            "disk": TransferSpeed(clock),
            "remote": TransferSpeed(clock),
        }
        self._contexts: WeakKeyDictionary[Llama, _Context] = WeakKeyDictionary()

    def tier(self, tier: Tier) -> TransferSpeed:
        """How fast a tier beyond RAM is read."""
        return self._tiers[tier]

    def load(self, llama: Llama) -> TransferSpeed:
        """How fast a context is loaded from RAM."""
        return self._context(llama).load

    def prefill(self, llama: Llama) -> PrefillSpeed:
        """How fast a context evaluates tokens."""
        return self._context(llama).prefill

    def stopwatches(self) -> dict[Tier, Stopwatch]:
        """For the reads of one prefix, from each tier."""
        return {tier: Stopwatch(self.clock) for tier in self._tiers}

    def note_reads(self, watches: Mapping[Tier, Stopwatch]) -> None:
        for tier, watch in watches.items():
            self._tiers[tier].note(watch.nbytes, watch.seconds)

    def estimate(self, llama: Llama, prefix: Prefix, held: int) -> Estimate:
        """``held`` is how many of the tokens the sequence holds already."""
        return next(self._estimates(llama, [prefix], held))

    def choose(self, llama: Llama, prefix: Prefix, held: int = 0) -> Choice:
        """Chooses what of a prefix is brought, whose ``end`` is larger than ``held``. Changes
        nothing: call ``begin_trial`` of the ``trials`` of what is done."""
        whole = self.estimate(llama, prefix, held)
        # From one tier the seconds grow as the bytes do, and those of a prefill no slower.
        if whole.prefill is None or (whole.gain >= 0 and len(prefix.nbytes_of) == 1):
            return Choice(whole, whole)
        best = max(
            self._estimates(llama, prefix.beginnings(longer_than=held), held),
            key=lambda each: each.gain,
        )
        most = max(0.0, best.gain)
        if whole.gain >= most:
            return Choice(whole, whole)
        loss = most - whole.gain
        speeds = [*(self._tiers[tier] for tier in whole.reads), self.load(llama)]
        due = tuple(each for each in speeds if each.line() is not None and each.is_due(loss))
        if due:
            return Choice(whole, whole, due)
        return Choice(whole, best if best.gain > 0 else None)

    def _context(self, llama: Llama) -> _Context:
        if llama not in self._contexts:
            self._contexts[llama] = _Context(TransferSpeed(self.clock))
        return self._contexts[llama]

    def _estimates(self, llama: Llama, prefixes: Iterable[Prefix], held: int) -> Iterator[Estimate]:
        load, prefill = self.load(llama).line(), self.prefill(llama)
        lines = {tier: speed.line() for tier, speed in self._tiers.items()}
        for prefix in prefixes:
            reads: dict[Tier, float | None] = {}
            for tier, nbytes in prefix.nbytes_of.items():
                if tier != "ram":
                    line = lines[tier]
                    reads[tier] = None if line is None else line.at(nbytes)
            yield Estimate(
                prefix,
                reads,
                None if load is None else load.at(prefix.nbytes),
                prefill.seconds(held, prefix.end),
            )
