"""What ``Store.explain`` tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MIB = 1 << 20


@dataclass(frozen=True)
class Share:
    """What a restore of the longest known prefix takes from one tier."""

    tier: Literal["ram", "disk", "remote"]
    tokens: int
    """Of the blocks that lie in this tier and in no nearer one. Where the cache has checkpoints
    alone, all tokens before the checkpoint."""
    nbytes: int
    seconds: float | None
    """How long it takes to read them into RAM, as it was measured. Tiers are read at the same
    time. None: not measured often enough."""
    latency: float | None
    """Seconds that a read takes whatever its size. None as before, and of RAM."""
    bandwidth: float | None
    """Bytes per second beyond the latency. None as before, and where a read takes no longer for
    more bytes."""

    def __str__(self) -> str:
        line = f"{self.tier:6}  {self.tokens:,} tokens, {self.nbytes / MIB:,.1f} MiB"
        if self.tier == "ram":
            return line
        if self.seconds is None:
            return f"{line}, speed not known yet"
        speed = f"latency {time_text(self.latency or 0.0)}"
        if self.bandwidth is not None:
            speed += f", {self.bandwidth / MIB:,.0f} MiB/s"
        return f"{line}, read in {time_text(self.seconds)} ({speed})"


@dataclass(frozen=True)
class Explanation:
    """What a store knows of a prompt, and what a restore would do now. ``str()`` is for people."""

    tokens: int
    """How many tokens were asked for, without those that are left."""
    held: int
    """How many of them the sequence holds already."""
    known: int
    """How many tokens the longest known prefix has."""
    shares: tuple[Share, ...]
    """Where the known prefix lies, the nearest tier first."""
    load_seconds: float | None
    """How long a load of it from RAM takes, as it was measured; None: not measured often enough."""
    prefill_seconds: float | None
    """How long the context takes to evaluate the known tokens that the sequence does not hold; None
    likewise."""
    restored: int
    """How many tokens a restore would bring now."""
    why: str
    """Why so many."""
    not_found: tuple[str, ...]
    """Why the rest of the tokens was not found, as far as that is known."""

    @property
    def bring_seconds(self) -> float | None:
        """How long reads and load of the known prefix take together; None: not measured often
        enough."""
        reads = [share.seconds for share in self.shares]
        measured = [each for each in reads if each is not None]
        if self.load_seconds is None or len(measured) < len(reads):
            return None
        return max(measured, default=0.0) + self.load_seconds

    def __str__(self) -> str:
        lines = [
            f"of {self.tokens:,} tokens {self.known:,} are known; "
            f"a restore brings {self.restored:,}",
            f"  why     {self.why}",
            *(f"  {share}" for share in self.shares),
        ]
        if self.known:
            lines.append(f"  load    {_time_or_unknown(self.load_seconds)}")
            lines.append(f"  prefill {_time_or_unknown(self.prefill_seconds)}")
        lines += [f"  not found: {each}" for each in self.not_found]
        return "\n".join(lines)


def _time_or_unknown(seconds: float | None) -> str:
    return "speed not known yet" if seconds is None else time_text(seconds)


def time_text(seconds: float) -> str:
    """Seconds, or milliseconds where they are fewer than one."""
    return f"{seconds:.2f} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"
