"""The disk tier: round trips, limits, and what is not right."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from disk_parts import GENEROUS, file_of, leftovers, make_part, occupied
from kvferry.store import part_format
from kvferry.store.disk import Disk
from kvferry.store.system import System


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def disk(folder: Path) -> Iterator[Disk]:
    disk = Disk(folder, GENEROUS)
    yield disk
    disk.close()


def read(disk: Disk, description) -> bytes | None:
    memory = bytearray(description.nbytes)
    return bytes(memory) if disk.read_into(description, memory) else None


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, (3 << 20) + 7])
def test_round_trip(disk: Disk, folder: Path, nbytes: int) -> None:
    part, data = make_part(1, nbytes)
    assert disk.find(part.kind, part.key) is None
    assert disk.write(part, data)
    assert disk.write(part, data)
    assert disk.find(part.kind, part.key) == part
    assert read(disk, part) == data
    assert list(disk.list()) == [part]
    assert disk.children(part.parent) == [part]
    assert disk.stats().occupied == occupied(folder)
    assert not leftovers(folder)
    assert disk.remove(part.kind, part.key)
    assert not disk.remove(part.kind, part.key)
    assert read(disk, part) is None


def test_many_are_found_at_once(disk: Disk) -> None:
    parts = [make_part(number) for number in range(30)]
    for part, data in parts:
        disk.write(part, data)
    keys = [part.key for part, _ in parts]
    disk.remove("block", keys[7])
    found = disk.find_all("block", [*keys, bytes(32)])
    assert {part.key for part in found} == {*keys} - {keys[7]}
    assert disk.find_all("checkpoint", keys) == disk.find_all("block", []) == []


def test_pinned_parts_are_not_evicted(folder: Path) -> None:
    pinned: set[tuple[str, bytes]] = set()
    disk = Disk(folder, 2 << 20, pinned=pinned)
    chain = [make_part(0, 200_000)]
    chain.append(make_part(1, 200_000, parent=chain[0][0].key))
    for part, data in chain:
        pinned.add((part.kind, part.key))
        assert disk.write(part, data)
    for number in range(10, 40):
        assert disk.write(*make_part(number, 200_000))
    assert disk.stats().evicted > 10
    assert all(read(disk, part) == data for part, data in chain)
    assert not disk.write(*make_part(99, 1_700_000)), "only evicting what is pinned makes the room"
    assert all(read(disk, part) == data for part, data in chain)
    disk.close()


def test_checkpoint_and_block_of_one_key(disk: Disk) -> None:
    block, data = make_part(1)
    checkpoint = replace(block, kind="checkpoint", begin=block.end)
    assert disk.write(block, data)
    assert disk.write(checkpoint, data)
    assert list(disk.list()) == [block, checkpoint]
    assert read(disk, checkpoint) == data


def test_opened_again(disk: Disk, folder: Path) -> None:
    parts = [make_part(number) for number in range(300)]
    for part, data in parts:
        assert disk.write(part, data)
    disk.close()
    again = Disk(folder, GENEROUS)
    assert {part.key for part in again.list()} == {part.key for part, _ in parts}
    assert all(read(again, part) == data for part, data in parts)
    again.close()


def test_for_the_owner_only(disk: Disk, folder: Path) -> None:
    part, data = make_part(1)
    disk.write(part, data)
    for path in [folder, *folder.rglob("*")]:
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("limit", [GENEROUS, 600 << 10])
def test_a_folder_of_something_else_is_refused(folder: Path, limit: int) -> None:
    (folder / "parts" / "engine").mkdir(parents=True)
    drawing = folder / "parts" / "engine" / "drawing.dxf"
    drawing.write_bytes(b"of years")
    with pytest.raises(OSError, match="something else"):
        Disk(folder, limit)
    assert drawing.read_bytes() == b"of years"
    assert [path.name for path in folder.iterdir()] == ["parts"]


@pytest.mark.parametrize("name", ["parts", "aside", "quarantine"])
def test_a_link_in_place_of_an_inner_folder_is_refused(
    folder: Path, tmp_path: Path, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    (elsewhere / "letter").write_bytes(b"Dear Sir or Madam")
    folder.mkdir()
    (folder / "lock").touch()
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(NotADirectoryError):
        Disk(folder, GENEROUS)
    assert [path.name for path in elsewhere.iterdir()] == ["letter"]
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o755


def test_a_folder_that_has_lost_all_but_its_parts(disk: Disk, folder: Path) -> None:
    part, data = make_part(1)
    disk.write(part, data)
    disk.close()
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    again = Disk(folder, GENEROUS)
    assert read(again, part) == data
    again.close()


def test_data_of_another_description(disk: Disk) -> None:
    part, data = make_part(1)
    with pytest.raises(ValueError, match="length"):
        disk.write(part, data[1:])
    with pytest.raises(ValueError, match="checksum"):
        disk.write(part, bytes(len(data)))


def test_every_flipped_byte_is_noticed(disk: Disk, folder: Path) -> None:
    part, data = make_part(1, 200)
    disk.write(part, data)
    right = bytearray(file_of(folder, part).read_bytes())
    values = random.Random(1)
    for place in range(len(right)):
        right[place] ^= (flip := values.randrange(1, 256))
        file_of(folder, part).write_bytes(right)
        assert read(disk, part) is None, place
        assert not file_of(folder, part).exists()
        right[place] ^= flip
    file_of(folder, part).write_bytes(right)
    assert read(disk, part) == data


def test_every_truncation_is_noticed(disk: Disk, folder: Path) -> None:
    part, data = make_part(1, 100)
    disk.write(part, data)
    right = file_of(folder, part).read_bytes()
    for length in range(len(right)):
        file_of(folder, part).write_bytes(right[:length])
        assert read(disk, part) is None, length
    file_of(folder, part).write_bytes(right + b"\0")
    assert read(disk, part) is None


def test_swapped_names(disk: Disk, folder: Path) -> None:
    (a, data_a), (b, data_b) = make_part(1), make_part(2)
    disk.write(a, data_a)
    disk.write(b, data_b)
    file_of(folder, a).rename(folder / "x")
    file_of(folder, b).rename(file_of(folder, a))
    (folder / "x").rename(file_of(folder, b))
    assert read(disk, a) is None
    assert read(disk, b) is None
    assert disk.stats().quarantined == 2


@pytest.mark.parametrize("what", ["folder", "pipe", "link", "link to nothing", "deleted"])
def test_something_else_in_its_place(disk: Disk, folder: Path, what: str) -> None:
    part, data = make_part(1)
    disk.write(part, data)
    path = file_of(folder, part)
    path.rename(folder / "elsewhere")
    if what == "folder":
        (path / "inside").mkdir(parents=True)
    elif what == "pipe":
        os.mkfifo(path)
    elif what != "deleted":
        path.symlink_to(folder / ("elsewhere" if what == "link" else "nothing"))
    assert read(disk, part) is None
    assert disk.find(part.kind, part.key) is None
    assert disk.write(part, data)
    assert read(disk, part) == data


def test_newer_version_is_left_alone(disk: Disk, folder: Path, monkeypatch) -> None:
    part, data = make_part(1)
    monkeypatch.setattr(part_format, "VERSION", 2)
    header = part_format.header_of(part)
    monkeypatch.undo()
    file_of(folder, part).write_bytes(header + data)
    again = Disk(folder, GENEROUS)
    assert read(again, part) is None
    assert again.find(part.kind, part.key) is None
    assert not again.write(part, data)
    assert again.verify().newer == 1
    assert file_of(folder, part).exists()
    assert again.stats().occupied == occupied(folder)
    again.close()


@pytest.mark.parametrize(
    "harm", ["lost", "corrupt", "stale", "lost while open", "corrupt while open"]
)
def test_index_is_made_anew(disk: Disk, folder: Path, harm: str) -> None:
    parts = [make_part(number) for number in range(20)]
    for part, data in parts[:10]:
        disk.write(part, data)
    disk.close()
    index = folder / "index.sqlite"
    before = index.read_bytes()
    again = Disk(folder, GENEROUS)
    for part, data in parts[10:]:
        again.write(part, data)
    if "open" not in harm:
        again.close()
    if "lost" in harm:
        for path in folder.glob("index*"):
            path.unlink()
    elif "corrupt" in harm:
        for path in folder.glob("index*"):
            path.write_bytes(b"no index" * 1000)
    else:
        index.write_bytes(before)
    if "open" not in harm:
        again = Disk(folder, GENEROUS)
    assert all(again.find(part.kind, part.key) == part for part, _ in parts)
    assert all(read(again, part) == data for part, data in parts)
    again.close()


def test_limit_evicts_the_longest_unused_leaf(folder: Path) -> None:
    disk = Disk(folder, 2 << 20)
    chain = [make_part(0, 200_000)]
    for number in range(1, 4):
        chain.append(make_part(number, 200_000, parent=chain[-1][0].key))
    for part, data in chain:
        assert disk.write(part, data)
    for number in range(10, 30):
        part, data = make_part(number, 200_000)
        assert disk.write(part, data)
        assert occupied(folder) <= 2 << 20
        kept = [disk.find(part.kind, part.key) is not None for part, _ in chain]
        assert kept == sorted(kept, reverse=True)  # none without those before
    assert not disk.write(*make_part(99, 3 << 20))
    disk.close()


def test_use_keeps_a_part(folder: Path) -> None:
    disk = Disk(folder, 2 << 20)
    loved, data = make_part(0, 200_000)
    disk.write(loved, data)
    for number in range(1, 30):
        disk.write(*make_part(number, 200_000))
        assert read(disk, loved) == data
    assert disk.stats().evicted > 10
    disk.close()


def test_smaller_limit_evicts_at_once(folder: Path) -> None:
    disk = Disk(folder, GENEROUS)
    for number in range(20):
        disk.write(*make_part(number, 200_000))
    disk.close()
    Disk(folder, 2 << 20).close()
    assert occupied(folder) <= 2 << 20


def test_room_is_reserved_before_the_data_are_written(folder: Path) -> None:
    """Another writer fills the folder between a part's reservation and its first byte."""
    limit = 4 << 20
    other = Disk(folder, limit)

    class Slow(System):
        def __init__(self) -> None:
            self.interposed = False

        def write(self, descriptor: int, pieces: Sequence[memoryview], offset: int) -> int:
            if not self.interposed:
                self.interposed = True
                assert occupied(folder) > 2 << 20
                for number in range(10, 40):
                    assert other.write(*make_part(number, 150_000))
                    assert occupied(folder) <= limit
            return super().write(descriptor, pieces, offset)

    system = Slow()
    disk = Disk(folder, limit, system=system)
    part, data = make_part(1, 2 << 20)
    assert disk.write(part, data)
    assert system.interposed
    assert occupied(folder) <= limit
    assert read(disk, part) == data
    disk.close()
    other.close()
