"""How much of a prefix is worth its restore."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from ..llama import Llama
from .prefix import Prefix, Tier
from .speeds import Clock, Line, PrefillSpeed, Stopwatch, TransferSpeed, prefill_seconds


@dataclass(frozen=True)
class Estimate:
    """How long the first ``end`` tokens take, by what was measured. Seconds; None: not measured
    often enough."""

    end: int
    reads: Mapping[Tier, float | None]
    """From each tier beyond RAM. Tiers are read at the same time."""
    load: float | None
    """From RAM into the sequence."""
    prefill: float | None
    """To evaluate the same tokens, except for those that the sequence holds already."""

    @property
    def bring(self) -> float:
        """Seconds of reads and load. A speed that was not measured counts as fast, so that it is
        tried."""
        reads = max((seconds or 0.0 for seconds in self.reads.values()), default=0.0)
        return reads + (self.load or 0.0)

    @property
    def gain(self) -> float:
        """Seconds that a restore saves; infinite if no prefill was measured."""
        return float("inf") if self.prefill is None else self.prefill - self.bring


@dataclass(frozen=True)
class Choice:
    """How much of a prefix is brought."""

    whole: Estimate
    """The estimate for the whole prefix."""
    best: Estimate | None
    """The estimate for the part that is brought; None if nothing is."""
    prefix: Prefix | None
    """The part that is brought; None if nothing is."""
    trials: tuple[TransferSpeed, ...] = ()
    """Speeds that are measured again: because of them the whole prefix is brought, although that
    does not seem to pay."""


@dataclass(frozen=True)
class _Lines:
    """The speeds as they are known now."""

    tiers: Mapping[Tier, Line | None]
    load: Line | None
    prefill: Line | None

    def estimate(self, end: int, nbytes: Mapping[Tier, int], held: int) -> Estimate:
        """Returns the estimate for the first ``end`` tokens, which have ``nbytes`` in each tier."""
        prefill = self.prefill
        return Estimate(
            end,
            {tier: _at(self.tiers[tier], count) for tier, count in nbytes.items() if tier != "ram"},
            _at(self.load, sum(nbytes.values())),
            None if prefill is None else prefill_seconds(prefill, held, end),
        )


def _at(line: Line | None, size: float) -> float | None:
    return None if line is None else line.at(size)


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
        """Returns the speed of reads from a tier beyond RAM."""
        return self._tiers[tier]

    def load(self, llama: Llama) -> TransferSpeed:
        """Returns the speed of loads from RAM into a context."""
        return self._context(llama).load

    def prefill(self, llama: Llama) -> PrefillSpeed:
        """Returns how fast a context evaluates tokens."""
        return self._context(llama).prefill

    def stopwatches(self) -> dict[Tier, Stopwatch]:
        """Returns a stopwatch for each tier, for the reads of one prefix."""
        return {tier: Stopwatch(self.clock) for tier in self._tiers}

    def note_reads(self, watches: Mapping[Tier, Stopwatch]) -> None:
        for tier, watch in watches.items():
            self._tiers[tier].note(watch.nbytes, watch.seconds)

    def estimate(self, llama: Llama, prefix: Prefix, held: int) -> Estimate:
        """``held`` is how many of the tokens the sequence holds already."""
        return self._lines(llama).estimate(prefix.end, prefix.nbytes_of, held)

    def choose(self, llama: Llama, prefix: Prefix, held: int = 0) -> Choice:
        """Chooses how much of a prefix is brought. Its ``end`` must be larger than ``held``.

        Changes nothing: if the choice is followed, call ``begin_trial`` of its ``trials``.

        The time of a tier grows in proportion to its bytes, and the time of a prefill at least in
        proportion to its tokens. So if several blocks in a row lie in one tier, it pays to bring
        all of them or none.
        """
        lines = self._lines(llama)
        best = whole = lines.estimate(prefix.end, prefix.nbytes_of, held)
        blocks = 0
        for count, nbytes in prefix.beginnings():
            end = prefix.blocks[count - 1].end
            if (shorter := lines.estimate(end, nbytes, held)).gain > best.gain:
                best, blocks = shorter, count
        if whole.gain >= max(0.0, best.gain):
            return Choice(whole, whole, prefix)
        loss = max(0.0, best.gain) - whole.gain
        speeds = [*(self._tiers[tier] for tier in whole.reads), self.load(llama)]
        due = tuple(each for each in speeds if each.line() is not None and each.is_due(loss))
        if due:
            return Choice(whole, whole, prefix, due)
        if best.gain <= 0:
            return Choice(whole, None, None)
        return Choice(whole, best, prefix.beginning(blocks))

    def _context(self, llama: Llama) -> _Context:
        if llama not in self._contexts:
            self._contexts[llama] = _Context(TransferSpeed(self.clock))
        return self._contexts[llama]

    def _lines(self, llama: Llama) -> _Lines:
        tiers = {tier: speed.line() for tier, speed in self._tiers.items()}
        return _Lines(tiers, self.load(llama).line(), self.prefill(llama).line())
