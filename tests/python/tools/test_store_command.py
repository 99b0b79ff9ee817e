"""`kvferry store`: what it says of a folder, and what it removes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import xxhash
from kvferry._bridge.block_list import BlocksAllowed
from kvferry.store.description import Description, Kind
from kvferry.store.disk import Disk
from kvferry.store.layout_notes import layout_note
from support.programs import run_kvferry

ROOT = bytes(32)
BYTES = 5000


def key(number: int) -> bytes:
    return bytes([number]) * 32


def keep(
    folder: Path, kind: Kind, number: int, parent: bytes, end: int, root: bytes = ROOT
) -> None:
    data = os.urandom(BYTES)
    begin = end if kind == "checkpoint" else end - 10
    checksum = xxhash.xxh64_intdigest(data)
    write(folder, Description(kind, key(number), parent, begin, end, root, BYTES, checksum), data)


def write(folder: Path, description: Description, data: bytes) -> None:
    disk = Disk(folder, 1 << 30)
    disk.write(description, data)
    disk.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two conversations: blocks 1, 2, 3 with a checkpoint at the end of 3, and blocks 1, 4."""
    keep(tmp_path, "block", 1, ROOT, 10)
    keep(tmp_path, "block", 2, key(1), 20)
    keep(tmp_path, "block", 3, key(2), 30)
    keep(tmp_path, "checkpoint", 3, key(2), 30)
    keep(tmp_path, "block", 4, key(1), 20)
    return tmp_path


def listed(folder: Path) -> list[dict[str, object]]:
    done = run_kvferry("store", "list", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, object]] = json.loads(done.stdout)
    return rows


LONG = {"name": "03" * 8, "tokens": 30, "parts": 4, "bytes": 4 * BYTES, "pinned": False}
SHORT = {"name": "04" * 8, "tokens": 20, "parts": 2, "bytes": 2 * BYTES, "pinned": False}


def test_conversations_are_listed(folder: Path) -> None:
    assert listed(folder) == [LONG, SHORT]
    done = run_kvferry("store", "list", str(folder))
    assert [line.split() for line in done.stdout.splitlines()[2:4]] == [
        ["03" * 8, "30", "4", "0.02"],
        ["04" * 8, "20", "2", "0.01"],
    ]


def test_stats_count_shared_parts_once(folder: Path) -> None:
    done = run_kvferry("store", "stats", str(folder), "--json")
    report = json.loads(done.stdout)
    assert report["kinds"] == {
        "block": {"parts": 4, "bytes": 4 * BYTES},
        "checkpoint": {"parts": 1, "bytes": BYTES},
    }
    assert report["occupied"] > 5 * BYTES
    assert "The folder occupies" in run_kvferry("store", "stats", str(folder)).stdout


def test_verify_finds_what_is_damaged(folder: Path) -> None:
    done = run_kvferry("store", "verify", str(folder))
    assert (done.returncode, done.stdout) == (0, "5 right, 0 quarantined, 0 of a newer version\n")

    [damaged] = (folder / "parts").glob("02*")
    damaged.chmod(0o600)
    with damaged.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    done = run_kvferry("store", "verify", str(folder), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"right": 4, "quarantined": 1, "newer": 0}
    # No restore finds what follows the lost block.
    assert listed(folder) == [SHORT]
    assert (
        "2 parts (0.01 MiB) need one that is lost"
        in run_kvferry("store", "list", str(folder)).stdout
    )
    assert run_kvferry("store", "evict", str(folder), "--all").returncode == 0
    assert list((folder / "parts").iterdir()) == []


@pytest.mark.parametrize("noted", [True, False])
def test_a_checkpoint_that_needs_no_blocks_is_a_conversation(tmp_path: Path, noted: bool) -> None:
    if noted:
        write(tmp_path, *layout_note(key(9), ROOT, BlocksAllowed.CHECKPOINTS_ALONE))
    keep(tmp_path, "checkpoint", 3, key(2), 30)
    assert [(row["tokens"], row["parts"]) for row in listed(tmp_path)] == [(30, 1)]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_checkpoint_whose_blocks_are_lost_is_none(tmp_path: Path, number: int) -> None:
    write(tmp_path, *layout_note(key(9), ROOT, BlocksAllowed.WITH_CHECKPOINTS))
    keep(tmp_path, "checkpoint", 3, key(2), 30)
    if number > 1:
        keep(tmp_path, "block", 1, ROOT, 10)
    if number > 2:
        keep(tmp_path, "block", 2, key(1), 20)
    assert listed(tmp_path) == []


def test_blocks_that_end_without_their_checkpoint_end_at_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, *layout_note(key(9), ROOT, BlocksAllowed.WITH_CHECKPOINTS))
    keep(tmp_path, "block", 1, ROOT, 10)
    keep(tmp_path, "checkpoint", 1, ROOT, 10)
    keep(tmp_path, "block", 2, key(1), 20)
    assert [(row["name"], row["tokens"], row["parts"]) for row in listed(tmp_path)] == [
        ("01" * 8, 10, 2)
    ]


def test_evict_leaves_what_others_share(folder: Path) -> None:
    done = run_kvferry("store", "evict", str(folder), "03" * 8)
    assert (done.returncode, done.stdout) == (0, "")
    assert listed(folder) == [SHORT]

    done = run_kvferry("store", "evict", str(folder), "03" * 8)
    assert (done.returncode, done.stdout) == (1, f"no conversation {'03' * 8}\n")
    assert run_kvferry("store", "evict", str(folder), "--all").returncode == 0
    assert listed(folder) == []
    assert list((folder / "parts").iterdir()) == []


def test_a_pinned_conversation_is_listed_until_it_is_unpinned(folder: Path) -> None:
    done = run_kvferry("store", "pin", str(folder), "04" * 8)
    assert (done.returncode, done.stdout) == (0, "")
    assert listed(folder) == [LONG, {**SHORT, "pinned": True}]
    lines = run_kvferry("store", "list", str(folder)).stdout.splitlines()
    assert [line.split()[4:] for line in lines[2:4]] == [[], ["pinned"]]
    # Pins have no bytes, and the damage of none is found.
    assert json.loads(run_kvferry("store", "stats", str(folder), "--json").stdout)["kinds"][
        "pin"
    ] == {"parts": 1, "bytes": 0}

    # A longer conversation that begins with it is another one.
    keep(folder, "block", 5, key(4), 30)
    longer = {"name": "05" * 8, "tokens": 30, "parts": 3, "bytes": 3 * BYTES, "pinned": False}
    assert listed(folder) == [LONG, longer, {**SHORT, "pinned": True}]
    assert run_kvferry("store", "evict", str(folder), "05" * 8).returncode == 0

    assert run_kvferry("store", "unpin", str(folder), "04" * 8).returncode == 0
    assert listed(folder) == [LONG, SHORT]


@pytest.mark.parametrize("action", ["pin", "unpin"])
def test_pinning_wants_names_of_conversations(folder: Path, action: str) -> None:
    done = run_kvferry("store", action, str(folder), "07" * 8)
    assert (done.returncode, done.stdout) == (1, f"no conversation {'07' * 8}\n")
    done = run_kvferry("store", action, str(folder))
    assert (done.returncode, "usage" in done.stderr) == (2, True)
    assert listed(folder) == [LONG, SHORT]


def test_evict_ends_the_pin(folder: Path) -> None:
    for name in ("03" * 8, "04" * 8):
        assert run_kvferry("store", "pin", str(folder), name).returncode == 0
    assert run_kvferry("store", "evict", str(folder), "03" * 8).returncode == 0
    assert listed(folder) == [{**SHORT, "pinned": True}]
    assert run_kvferry("store", "evict", str(folder), "--all").returncode == 0
    assert list((folder / "parts").iterdir()) == []


def test_a_pin_of_what_is_lost_can_be_ended(folder: Path) -> None:
    assert run_kvferry("store", "pin", str(folder), "04" * 8).returncode == 0
    disk = Disk(folder, 1 << 30)
    disk.remove("block", key(4))
    disk.close()
    lost = {"name": "04" * 8, "tokens": 20, "parts": 0, "bytes": 0, "pinned": True}
    assert lost in listed(folder)
    assert run_kvferry("store", "unpin", str(folder), "04" * 8).returncode == 0
    assert [row["name"] for row in listed(folder)] == ["03" * 8]


@pytest.mark.parametrize("action", ["list", "stats", "verify", "evict", "pin", "unpin"])
def test_another_folder_is_refused(tmp_path: Path, action: str) -> None:
    more = {"evict": ["--all"], "pin": ["04" * 8], "unpin": ["04" * 8]}.get(action, [])
    for folder in (tmp_path, tmp_path / "missing"):
        done = run_kvferry("store", action, str(folder), *more)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.endswith(f"not the folder of a store: '{folder}'\n")
    assert list(tmp_path.iterdir()) == []


def test_evict_wants_names_or_all(folder: Path) -> None:
    for arguments in ([], ["--all", "03" * 8]):
        done = run_kvferry("store", "evict", str(folder), *arguments)
        assert done.returncode == 2
        assert "usage" in done.stderr
    assert listed(folder) == [LONG, SHORT]
