"""The numbers of a store at one moment, for ``kvferry.metrics``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .away import Away
from .behind import Behind
from .counts import Counts, Reason, Refusals, Tier
from .ram import Ram

_REASONS: dict[Tier, tuple[Reason, ...]] = {
    "ram": ("budget", "damaged", "foreign", "slow"),
    "disk": ("budget", "damaged", "newer", "foreign", "slow", "failed", "hangs"),
    "remote": ("budget", "breaker_open", "damaged", "newer", "slow", "failed"),
}
"""Why each tier may refuse something."""


@dataclass(frozen=True)
class TierReadings:
    """The numbers of one tier. Bytes of disk and object store include the headers of files."""

    hit_tokens: int
    read_bytes: int
    """Of RAM: into contexts."""
    written_bytes: int
    """Of RAM: from contexts."""
    refused: Mapping[Reason, int]
    """All reasons that the tier may have."""
    usage_bytes: int | None = None
    """Of the disk: when it was last measured, before a write. None: not known."""
    limit_bytes: int | None = None
    evicted: int | None = None
    pending_writes: int | None = None
    failed_writes: int | None = None
    breaker_open: bool | None = None
    breaker_openings: int | None = None


@dataclass(frozen=True)
class Readings:
    """The numbers of a store. They are not all of one instant."""

    counts: Counts
    """Goes on counting."""
    tiers: Mapping[Tier, TierReadings]
    """Those that the store has."""


def readings(counts: Counts, ram: Ram, behind: Behind | None, away: Away | None) -> Readings:
    """For any thread. Calls neither the disk nor the object store."""
    tiers: dict[Tier, TierReadings] = {"ram": _of_ram(counts, ram)}
    if behind is not None:
        tiers["disk"] = _of_disk(counts, behind)
    if away is not None:
        tiers["remote"] = _of_remote(counts, away)
    return Readings(counts, tiers)


def _of_ram(counts: Counts, ram: Ram) -> TierReadings:
    return TierReadings(
        hit_tokens=counts.hit_tokens["ram"],
        read_bytes=counts.restored_bytes,
        written_bytes=counts.saved_bytes,
        refused=_refused("ram", counts, ram.refused),
        usage_bytes=ram.used + ram.reserved,
        limit_bytes=ram.limit,
        evicted=ram.evicted,
    )


def _of_disk(counts: Counts, behind: Behind) -> TierReadings:
    disk = behind.disk if behind.is_open else None
    return TierReadings(
        hit_tokens=counts.hit_tokens["disk"],
        read_bytes=behind.read_bytes,
        written_bytes=disk.written_bytes if disk else 0,
        refused=_refused("disk", counts, behind.refused, disk.refused if disk else Refusals()),
        usage_bytes=disk.latest_occupied if disk else None,
        limit_bytes=behind.limit,
        evicted=disk.evicted if disk else 0,
        pending_writes=behind.writes.pending,
        failed_writes=behind.writes.failed,
    )


def _of_remote(counts: Counts, away: Away) -> TierReadings:
    remote = away.remote
    return TierReadings(
        hit_tokens=counts.hit_tokens["remote"],
        read_bytes=remote.read_bytes,
        written_bytes=remote.written_bytes,
        refused=_refused("remote", counts, remote.refused),
        pending_writes=away.writes.pending,
        failed_writes=away.stats()["remote_writes_failed"],
        breaker_open=remote.left_alone,
        breaker_openings=remote.opened,
    )


def _refused(tier: Tier, counts: Counts, *counted: Refusals) -> dict[Reason, int]:
    refused = {reason: sum(each[reason] for each in counted) for reason in _REASONS[tier]}
    return {**refused, "slow": counts.slow[tier]}
