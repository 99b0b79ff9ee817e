"""The search for the longest prefix, compared with one that asks for each part alone."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from kvferry._bridge.block_list import BlocksAllowed
from kvferry.store.description import Description
from kvferry.store.disk import Disk
from kvferry.store.keys import Link, Tokens, chain
from kvferry.store.prefix import InTurn, OnDisk, Prefix, Search
from kvferry.store.ram import Entry, Ram

ROOT = bytes(32)
BLOCK = 4
ALLOWED = [each for each in BlocksAllowed if each.blocks or each.checkpoints]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "store", 64 << 20)
    yield disk
    disk.close()


def part_of(kind: str, link: Link) -> Description:
    begin = link.begin if kind == "block" else link.end
    return Description(kind, link.key, link.parent, begin, link.end, ROOT, 8, 0)  # type: ignore[arg-type]


class Closed:
    def close(self) -> None:
        pass


def longest(parts: set[tuple[str, bytes]], allowed: BlocksAllowed, tokens: Tokens) -> int:
    """Tries every length."""
    for end in range(len(tokens), 0, -1):
        links = chain(ROOT, tokens[:end], BLOCK)
        needed = [("block", link.key) for link in links] if allowed.blocks else []
        if allowed.checkpoints:
            needed.append(("checkpoint", links[-1].key))
        if parts.issuperset(needed):
            return end
    return 0


@pytest.mark.parametrize("allowed", ALLOWED, ids=[each.value for each in ALLOWED])
def test_parts_in_ram_and_on_the_disk_with_gaps(disk: Disk, allowed: BlocksAllowed) -> None:
    chooser = random.Random(3)
    lengths = set()
    for case in range(60):
        tokens = numpy.array([chooser.randrange(9) for _ in range(150)], "<i4")
        tokens[0] = case
        ram, rows, parts = Ram(1 << 20), [], set()
        lost = chooser.choice([0, 0.02, 0.5])
        ends = {len(tokens), *(chooser.randrange(1, 151) for _ in range(6))}
        for end in ends:
            links = chain(ROOT, tokens[:end], BLOCK)
            for kind, link in [*(("block", link) for link in links), ("checkpoint", links[-1])]:
                if chooser.random() < lost or (kind, link.key) in parts:
                    continue
                parts.add((kind, link.key))
                part = part_of(kind, link)
                if chooser.random() < 0.3:
                    room = ram.reserve(8)
                    assert room is not None
                    ram.add(Entry(part, Closed(), 8), room)  # type: ignore[arg-type]
                else:
                    rows.append((part, 8192, 1))
        disk._with_index(lambda index, rows=rows: index.put(rows))
        alone = Search(InTurn({"ram": ram}), ROOT, allowed, tokens, BLOCK)
        on_disk = OnDisk(disk, [link.key for link in alone.links])
        lookup = InTurn({"ram": ram, "disk": on_disk})
        found: Prefix | None = dataclasses.replace(alone, lookup=lookup).run()
        expected = longest(parts, allowed, tokens)
        assert (found.end if found else 0) == expected
        lengths.add(expected)
    assert len(lengths) > 5
