"""``kvferry store``: looks into the folder of a store, verifies it, pins and evicts.

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
from ..store.pins import pin, unpin
from .table import StatusLine, mib, table

_NO_LIMIT = 1 << 62
"""The command evicts nothing but what it is told to."""


@dataclass(frozen=True)
class Conversation:
    """The parts that lead to one end: the last block, or the checkpoint, on which none builds."""

    key: bytes
    """Of the end."""
    tokens: int
    parts: list[Description]
    """From the end to the beginning. Conversations that begin alike share parts. Of a pinned one
    parts may be lost."""
    pinned: bool

    @property
    def name(self) -> str:
        """What ``evict`` takes."""
        return conversation_name(self.key)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def conversation_name(key: bytes) -> str:
    """Returns what the commands call the conversation whose end has this key."""
    return key.hex()[:16]


def conversations(parts: Iterable[Description]) -> list[Conversation]:
    """Returns what nothing in ``parts`` builds on, or what is pinned, the longest first."""
    by_key: dict[bytes, list[Description]] = defaultdict(list)
    pins: dict[bytes, Description] = {}
    for part in parts:
        if part.kind == "pin":
            pins[part.key] = part
        elif part.kind != "layout":
            by_key[part.key].append(part)
    built_on = {part.parent for several in by_key.values() for part in several}
    found = []
    for key in (by_key.keys() - built_on) | pins.keys():
        chain: list[Description] = []
        link = by_key.get(key)
        while link:
            chain += link
            link = by_key.get(link[0].parent)
        end = chain[0].end if chain else pins[key].end
        found.append(Conversation(key, end, chain, key in pins))
    return sorted(found, key=lambda each: (-each.tokens, each.key))


def store_list(folder: str, as_json: bool) -> bool:
    """Prints each conversation: its name, tokens, parts and bytes."""
    with _opened(folder) as disk:
        parts, lost = _parts(disk)
        found = conversations(parts)
    rows = [(each.name, each.tokens, len(each.parts), each.nbytes, each.pinned) for each in found]
    if as_json:
        keys = ("name", "tokens", "parts", "bytes", "pinned")
        print(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=2))
    else:
        lines = [
            [name, f"{tokens:,}", str(parts), mib(size), "pinned" if pinned else ""]
            for name, tokens, parts, size, pinned in rows
        ]
        print(table(["conversation", "tokens", "parts", "MiB", ""], lines, left=(0, 4)))
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
    line = StatusLine()
    with _opened(folder) as disk:
        report = disk.verify(lambda done, names: line.show(f"{done + 1}/{names} files"))
    line.clear()
    if as_json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        print(
            f"{report.right} right, {report.quarantined} quarantined, "
            f"{report.newer} of a newer version"
        )
    return report.quarantined == 0


def store_evict(folder: str, names: Sequence[str], everything: bool) -> bool:
    """Removes conversations and their pins, except the parts that others share.

    Returns True if all were there.
    """
    with _opened(folder) as disk:
        parts, lost = _parts(disk)
        found = conversations(parts)
        chosen = [each for each in found if everything or each.name in names]
        stays = {part for each in found if each not in chosen for part in each.parts}
        goes = {part for each in chosen for part in each.parts} - stays
        for each in chosen:
            unpin(disk, each.key)
        if everything:
            goes.update(lost)
        # From the end: a command that is interrupted leaves no block without its parent.
        for part in sorted(goes, key=lambda part: part.end, reverse=True):
            disk.remove(part.kind, part.key)
    return _all_there(names, chosen)


def store_pin(folder: str, names: Sequence[str]) -> bool:
    """Keeps conversations from being evicted, by any process. Returns True if all were there."""
    with _opened(folder) as disk:
        chosen = [each for each in _named(disk, names) if pin(disk, each.key)]
    return _all_there(names, chosen)


def pin_keys(folder: str, keys: Iterable[bytes]) -> None:
    """Pins the conversations whose ends have these keys."""
    with _opened(folder) as disk:
        for key in keys:
            pin(disk, key)


def store_unpin(folder: str, names: Sequence[str]) -> bool:
    """Ends ``store_pin``. Returns True if all were there."""
    with _opened(folder) as disk:
        chosen = _named(disk, names)
        for each in chosen:
            unpin(disk, each.key)
    return _all_there(names, chosen)


def _named(disk: Disk, names: Sequence[str]) -> list[Conversation]:
    return [each for each in conversations(_parts(disk)[0]) if each.name in names]


def _all_there(names: Sequence[str], chosen: Sequence[Conversation]) -> bool:
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
