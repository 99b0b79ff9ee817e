"""``kvferry store``: looks into the folder of a store, verifies it, and evicts from it.

The programs that use the folder may go on meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..store.description import Description
from ..store.disk import Disk
from ..store.layout_notes import allowed_of
from ..store.loadable import loadable
from .table import mib, table

_NO_LIMIT = 1 << 62
"""The command evicts nothing but what it is told to."""


@dataclass(frozen=True)
class Conversation:
    """The parts that lead to one end: the last block, or the checkpoint, on which none builds."""

    key: bytes
    """Of the end."""
    tokens: int
    parts: list[Description]
    """From the end to the beginning. Conversations that begin alike share parts."""

    @property
    def name(self) -> str:
        """What ``evict`` takes."""
        return self.key.hex()[:16]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def conversations(parts: Iterable[Description]) -> list[Conversation]:
    """Returns what ``parts`` has that nothing builds on, the longest first."""
    by_key: dict[bytes, list[Description]] = defaultdict(list)
    for part in parts:
        if part.kind != "layout":
            by_key[part.key].append(part)
    built_on = {part.parent for several in by_key.values() for part in several}
    found = []
    for key in by_key.keys() - built_on:
        chain: list[Description] = []
        link: list[Description] | None = by_key[key]
        while link:
            chain += link
            link = by_key.get(link[0].parent)
        found.append(Conversation(key, chain[0].end, chain))
    return sorted(found, key=lambda each: (-each.tokens, each.key))


def store_list(folder: str, as_json: bool) -> bool:
    """Prints each conversation: its name, tokens, parts and bytes."""
    with _opened(folder) as disk:
        parts, lost = _parts(disk)
        found = conversations(parts)
    rows = [(each.name, each.tokens, len(each.parts), each.nbytes) for each in found]
    if as_json:
        keys = ("name", "tokens", "parts", "bytes")
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
    else:
        lines = [[name, f"{tokens:,}", str(parts), mib(size)] for name, tokens, parts, size in rows]
        print(table(["conversation", "tokens", "parts", "MiB"], lines))
        print("Conversations that begin alike share parts: stats tells what the folder occupies.")
        if lost:
            size = mib(sum(part.nbytes for part in lost))
            print(f"{len(lost)} parts ({size} MiB) need one that is lost: no restore finds them.")
    return True


def store_stats(folder: str, as_json: bool) -> bool:
    """Prints how many parts of each kind there are, and what the folder occupies."""
    with _opened(folder) as disk:
        kinds: dict[str, dict[str, int]] = defaultdict(lambda: {"parts": 0, "bytes": 0})
        for part in disk.list():
            kinds[part.kind]["parts"] += 1
            kinds[part.kind]["bytes"] += part.nbytes
        occupied = disk.stats().occupied
    if as_json:
        print(json.dumps({"kinds": kinds, "occupied": occupied}, indent=2))
    else:
        lines = [[kind, str(each["parts"]), mib(each["bytes"])] for kind, each in kinds.items()]
        print(table(["kind", "parts", "MiB"], sorted(lines)))
        print(f"The folder occupies {mib(occupied)} MiB.")
    return True


def store_verify(folder: str, as_json: bool) -> bool:
    """Reads every file, and quarantines what is not right. Returns True if all were right."""
    with _opened(folder) as disk:
        report = disk.verify()
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        print(
            f"{report.right} right, {report.quarantined} quarantined, "
            f"{report.newer} of a newer version"
        )
    return report.quarantined == 0


def store_evict(folder: str, names: Sequence[str], everything: bool) -> bool:
    """Removes conversations, except the parts that others share. Returns True if all were there."""
    with _opened(folder) as disk:
        parts, lost = _parts(disk)
        found = conversations(parts)
        chosen = [each for each in found if everything or each.name in names]
        stays = {part for each in found if each not in chosen for part in each.parts}
        goes = {part for each in chosen for part in each.parts} - stays
        if everything:
            goes.update(lost)
        # From the end: a command that is interrupted leaves no block without its parent.
        for part in sorted(goes, key=lambda part: part.end, reverse=True):
            disk.remove(part.kind, part.key)
    missing = [name for name in names if name not in {each.name for each in chosen}]
    for name in missing:
        print(f"no conversation {name}")
    return not missing


def _parts(disk: Disk) -> tuple[list[Description], set[Description]]:
    """Returns what a restore can find, and blocks and checkpoints that none can."""
    parts = list(disk.list())
    there = loadable(parts, allowed_of(disk, parts))
    lost = {each for each in parts if each.kind in ("block", "checkpoint")} - there
    return [each for each in parts if each not in lost], lost


@contextlib.contextmanager
def _opened(folder: str) -> Iterator[Disk]:
    """Raises OSError, also for the folder of something else."""
    path = os.path.expanduser(folder)
    if not os.path.isdir(os.path.join(path, "parts")):
        raise NotADirectoryError(errno.ENOTDIR, "not the folder of a store", folder)
    disk = Disk(path, _NO_LIMIT)
    try:
        yield disk
    finally:
        disk.close()
