"""Snapshots: views, checksums, files. (Saving and loading them: test_llama_basic.py.)"""

import gc
import sys
import weakref
from pathlib import Path

import kvferry
import numpy as np
import pytest
from event_loops import anyio_backend  # noqa: F401
from kvferry import Snapshot

pytestmark = pytest.mark.anyio

STATE = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()


def test_the_bytes_are_seen_without_a_copy_and_read_only() -> None:
    source = np.frombuffer(bytearray(STATE), np.uint8)
    snapshot = Snapshot.from_bytes(source, fingerprint="a model")
    assert snapshot.nbytes == len(snapshot) == len(STATE)
    assert snapshot.to_bytes() == STATE
    for view in (snapshot.numpy(), np.asarray(snapshot), np.frombuffer(snapshot.view, np.uint8)):
        assert view.ctypes.data == source.ctypes.data
        assert view.dtype == np.uint8
        assert not view.flags.writeable
    assert snapshot.view.readonly


@pytest.mark.skipif(sys.version_info < (3, 12), reason="needs the buffer protocol of Python 3.12")
def test_a_snapshot_has_the_buffer_protocol() -> None:
    assert bytes(memoryview(Snapshot.from_bytes(STATE))) == STATE


def test_views_outlive_the_snapshot() -> None:
    class Memory(bytearray):
        """Can be referred to weakly, unlike a bytearray."""

    memory = Memory(STATE)
    freed = weakref.ref(memory)
    snapshot = Snapshot.from_bytes(memory)
    view = snapshot.numpy()
    snapshot.close()
    del snapshot, memory
    gc.collect()
    assert view.tobytes() == STATE
    del view
    assert freed() is None


def test_a_closed_snapshot_says_so() -> None:
    with Snapshot.from_bytes(STATE) as snapshot:
        pass
    with pytest.raises(kvferry.KvferryError, match="this Snapshot has been closed"):
        snapshot.to_bytes()
    assert "closed" in repr(snapshot)


async def test_verifying_finds_a_changed_byte() -> None:
    memory = bytearray(STATE)
    snapshot = Snapshot.from_bytes(memory)
    with pytest.raises(ValueError, match="seal"):
        await snapshot.verify()
    assert await snapshot.seal() == snapshot.sealed == snapshot.checksum()
    await snapshot.verify()
    memory[50_000] ^= 1
    with pytest.raises(kvferry.StateDamaged, match="the checksum is wrong"):
        await snapshot.verify()


async def test_a_file_carries_state_fingerprint_and_checksum(tmp_path: Path) -> None:
    snapshot = Snapshot.from_bytes(STATE, fingerprint="a model")
    await snapshot.to_file(tmp_path / "state")
    again = await Snapshot.from_file(tmp_path / "state")
    assert again.to_bytes() == STATE
    assert again.fingerprint == "a model"
    assert again.sealed == snapshot.checksum()
    await again.verify()


async def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    await Snapshot.from_bytes(STATE).to_file(path)
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:-1],
        whole + b"x",
        whole[:30],
        whole.replace(b"{", b"[", 1),
        b"GGUF" + whole,
        whole.replace(b'"bytes": 1', b'"bytes": "', 1),
    ):
        path.write_bytes(content)
        with pytest.raises(kvferry.StateDamaged):
            await Snapshot.from_file(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    snapshot = await Snapshot.from_file(path)
    with pytest.raises(kvferry.StateDamaged):
        await snapshot.verify()
