"""Views, checksums and files of Snapshots. (test_llama_basic.py saves and loads them.)"""

import errno
import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import kvferry
import numpy as np
import pytest
from kvferry import Snapshot
from support.event_loops import anyio_backend  # noqa: F401

pytestmark = pytest.mark.anyio

LLM = kvferry.LlmState(
    tokens=np.array([1, 2, 3], np.int32),
    scores=np.arange(6, dtype=np.float32).reshape(3, 2),
    seed=7,
)
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
        """Memory that has weak references, unlike a bytearray."""

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


async def test_a_file_carries_what_an_object_knew(tmp_path: Path) -> None:
    for llm in (LLM, kvferry.LlmState(LLM.tokens), kvferry.LlmState(LLM.tokens[:0])):
        await Snapshot.from_bytes(STATE, llm=llm).to_file(tmp_path / "state")
        again = await Snapshot.from_file(tmp_path / "state")
        assert again.to_bytes() == STATE
        assert again.llm is not None
        assert again.llm.tokens.tolist() == llm.tokens.tolist()
        assert again.llm.seed == llm.seed
        assert (again.llm.scores is None) == (llm.scores is None)
        if llm.scores is not None:
            assert np.array_equal(again.llm.scores, llm.scores)


async def test_a_file_of_the_first_version_is_read(tmp_path: Path) -> None:
    header = b'{"fingerprint": "a model", "crc32": 5, "bytes": %d}\n' % len(STATE)
    (tmp_path / "state").write_bytes(
        b"kvferry snapshot 1\n%d\n" % len(header) + header + STATE,
    )
    snapshot = await Snapshot.from_file(tmp_path / "state")
    assert snapshot.to_bytes() == STATE
    assert (snapshot.fingerprint, snapshot.sealed, snapshot.llm) == ("a model", 5, None)


async def test_a_file_of_a_later_version_is_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"kvferry snapshot 3\n" + bytes(100))
    with pytest.raises(kvferry.StateDamaged, match="no snapshot that this version knows"):
        await Snapshot.from_file(tmp_path / "state")


async def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    await Snapshot.from_bytes(STATE, llm=LLM).to_file(path)
    whole = path.read_bytes()
    for content in (
        b"",
        whole[:-1],
        whole + b"x",
        whole[:30],
        whole.replace(b"{", b"[", 1),
        b"GGUF" + whole,
        whole.replace(b'"bytes": 1', b'"bytes": "', 1),
        whole.replace(b'"tokens": 3', b'"tokens":-3', 1),
        whole.replace(b'"tokens": 3', b'"tokens": 4', 1),
        whole.replace(b'"columns": 2', b'"columns": 1', 1),
        whole.replace(b'"columns": 2', b'"columns": 2e', 1),
        whole.replace(b'"seed": 7', b'"seed":[]', 1),
        whole.replace(b'"llm": {', b'"llm": 5, "x": {', 1),
        b'"crc33"'.join(whole.rsplit(b'"crc32"', 1)),  # of the tokens
        whole[:-1] + bytes([whole[-1] ^ 1]),  # a score
        whole.replace(b"snapshot 2", b"snapshot 3", 1),
        whole.replace(b"snapshot 2", b"snapshot 1", 1)[: -len(STATE)],
    ):
        assert content != whole
        path.write_bytes(content)
        with pytest.raises(kvferry.StateDamaged):
            await Snapshot.from_file(path)
    damaged = bytearray(whole)
    damaged[whole.index(STATE) + 50_000] ^= 1
    path.write_bytes(damaged)
    snapshot = await Snapshot.from_file(path)
    with pytest.raises(kvferry.StateDamaged):
        await snapshot.verify()


# ---- What a file that is overwritten goes through ------------------------------------------------


async def test_a_file_is_whole_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written under another name and synced, then renamed, then the folder is synced."""
    path = tmp_path / "state"
    await Snapshot.from_bytes(STATE, fingerprint="old").to_file(path)
    old = path.read_bytes()
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        if kind == "file":
            assert os.fstat(descriptor).st_size > len(STATE)
            assert path.read_bytes() == old
        steps.append(f"sync {kind}")
        fsync(descriptor)

    def noting_replace(source: str, target: str) -> None:
        steps.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    await Snapshot.from_bytes(STATE[::-1], fingerprint="new").to_file(path)
    assert steps == ["sync file", "replace", "sync folder"]
    assert (await Snapshot.from_file(path)).fingerprint == "new"
    assert os.listdir(tmp_path) == ["state"]


async def test_a_failure_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    await Snapshot.from_bytes(STATE, fingerprint="old").to_file(path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        await Snapshot.from_bytes(STATE[::-1], fingerprint="new").to_file(path)
    assert (await Snapshot.from_file(path)).fingerprint == "old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    program = f"""
import os, signal, sys, anyio, kvferry
anyio.run(kvferry.Snapshot.from_bytes(b"old" * 1000, fingerprint="old").to_file, {str(path)!r})
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
anyio.run(kvferry.Snapshot.from_bytes(b"new" * 1000, fingerprint="new").to_file, {str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    snapshot = Snapshot.from_file_sync(path)
    assert (snapshot.fingerprint, snapshot.to_bytes()) == ("old", b"old" * 1000)


async def test_a_file_keeps_its_permissions_and_a_link_its_target(tmp_path: Path) -> None:
    path, link = tmp_path / "state", tmp_path / "link"
    await Snapshot.from_bytes(STATE).to_file(path)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    path.chmod(0o640)
    link.symlink_to("state")
    await Snapshot.from_bytes(STATE[::-1]).to_file(link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert (await Snapshot.from_file(path)).to_bytes() == STATE[::-1]


async def test_what_is_no_plain_file_is_written_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    await Snapshot.from_bytes(STATE).to_file(pipe)
    reader.join()
    assert received[0].endswith(STATE)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


# ---- What it says of itself ----------------------------------------------------------------------


async def test_a_snapshot_says_what_it_is() -> None:
    snapshot = Snapshot.from_bytes(STATE)
    assert repr(snapshot) == "<Snapshot of 100000 bytes>"
    await snapshot.seal()
    assert repr(snapshot) == "<Snapshot of 100000 bytes, sealed>"
    snapshot.close()
    assert repr(snapshot) == "<Snapshot of 100000 bytes, sealed, closed>"
    assert repr(Snapshot.from_bytes(STATE, llm=LLM)) == "<Snapshot of 100000 bytes, 3 tokens>"
