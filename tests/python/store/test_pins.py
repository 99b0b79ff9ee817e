"""Pins in a folder: what they keep, no process evicts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from kvferry.store.description import Description, Kind
from kvferry.store.disk import Disk
from kvferry.store.pins import pin, unpin

ROOT = b"R" * 32
MODEL = b"M" * 32
NBYTES = 100_000
LIMIT = 2 << 20
"""Room for fewer than 20 parts."""


def key(name: str) -> bytes:
    return name.encode().ljust(32, b".")


def write(disk: Disk, name: str, parent: bytes, end: int, kind: Kind = "block") -> Description:
    data = os.urandom(NBYTES)
    begin = end if kind == "checkpoint" else end - 10
    checksum = xxhash.xxh64_intdigest(data)
    part = Description(kind, key(name), parent, begin, end, ROOT, NBYTES, checksum)
    assert disk.write(part, data)
    return part


def write_others(disk: Disk, first: int = 0) -> None:
    """Writes more than the limit has room for."""
    for number in range(first, first + 20):
        write(disk, f"other {number}", ROOT, 10)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Has a chain of two blocks, of which the second has a checkpoint; and a layout's note."""
    disk = Disk(tmp_path, LIMIT)
    note = Description("layout", ROOT, MODEL, 0, 0, MODEL, 1, xxhash.xxh64_intdigest(b"x"))
    disk.write(note, b"x")
    write(disk, "a", ROOT, 10)
    write(disk, "b", key("a"), 20)
    write(disk, "b", key("a"), 20, kind="checkpoint")
    yield disk
    disk.close()


def there(disk: Disk) -> list[str]:
    """The parts of the chain that the folder has, and the note."""
    parts = {("layout", ROOT): "note"}
    parts |= {("block", key(name)): name for name in "ab"} | {("checkpoint", key("b")): "b'"}
    names = [name for part, name in parts.items() if disk.find(*part)]
    return sorted(names)


ALL = ["a", "b", "b'", "note"]


def test_without_a_pin_the_chain_goes(disk: Disk) -> None:
    write_others(disk)
    assert there(disk) == ["note"]


def test_a_pin_keeps_all_that_its_key_stands_for(disk: Disk) -> None:
    assert pin(disk, key("b"))
    write_others(disk)
    assert there(disk) == ALL
    assert disk.stats().occupied <= LIMIT


def test_a_pin_keeps_nothing_behind_it(disk: Disk) -> None:
    assert pin(disk, key("a"))
    write_others(disk)
    assert there(disk) == ["a", "note"]


def test_a_checkpoint_without_blocks_is_pinned(tmp_path: Path, disk: Disk) -> None:
    write(disk, "c", key("of no part"), 20, kind="checkpoint")
    assert pin(disk, key("c"))
    write_others(disk)
    assert disk.find("checkpoint", key("c"))
    assert there(disk) == ["note"]


def test_what_was_unpinned_goes(disk: Disk) -> None:
    pin(disk, key("b"))
    assert unpin(disk, key("b"))
    assert not unpin(disk, key("b"))
    write_others(disk)
    assert there(disk) == ["note"]


def test_nothing_is_pinned_that_is_not_there(disk: Disk) -> None:
    assert not pin(disk, key("z"))
    assert not disk.find("pin", key("z"))


def test_a_pin_is_there_once(disk: Disk) -> None:
    pin(disk, key("b"))
    pin(disk, key("b"))
    assert [part.kind for part in disk.list()].count("pin") == 1


def test_a_pin_outlives_the_index(tmp_path: Path, disk: Disk) -> None:
    pin(disk, key("b"))
    for file in tmp_path.glob("index.sqlite*"):
        file.unlink()
    write_others(disk)
    assert there(disk) == ALL


def test_where_all_is_pinned_nothing_is_written(disk: Disk) -> None:
    for number in range(10):
        write(disk, f"pinned {number}", ROOT, 10)
        pin(disk, key(f"pinned {number}"))
    data = os.urandom(NBYTES)
    checksum = xxhash.xxh64_intdigest(data)
    written = [
        disk.write(
            Description("block", key(f"other {number}"), ROOT, 0, 10, ROOT, NBYTES, checksum), data
        )
        for number in range(5)
    ]
    large = os.urandom(LIMIT // 2)
    part = Description(
        "block", key("large"), ROOT, 0, 10, ROOT, len(large), xxhash.xxh64_intdigest(large)
    )
    assert not disk.write(part, large)
    assert all(written)  # each evicts the one before
    assert all(disk.find("block", key(f"pinned {number}")) for number in range(10))
    assert disk.stats().occupied <= LIMIT


_WRITER = """
import sys
from kvferry.store.disk import Disk
from test_pins import LIMIT, write_others
disk = Disk(sys.argv[1], LIMIT)
for line in sys.stdin:
    write_others(disk, int(line))
    print("written", flush=True)
disk.close()
"""


def test_another_process_that_has_the_folder_open_obeys(tmp_path: Path, disk: Disk) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None

        def writes(first: int) -> None:
            print(first, file=other.stdin, flush=True)  # type: ignore[union-attr]
            assert other.stdout.readline() == "written\n"  # type: ignore[union-attr]

        writes(0)
        assert there(disk) == ["note"]
        write(disk, "a", ROOT, 10)
        write(disk, "b", key("a"), 20)
        pin(disk, key("b"))
        writes(100)
        assert there(disk) == ["a", "b", "note"]
        unpin(disk, key("b"))
        writes(200)
        assert there(disk) == ["note"]
    assert other.returncode == 0
