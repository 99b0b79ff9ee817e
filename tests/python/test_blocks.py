"""Blocks and Checkpoints as objects, and their files. (test_llama_block_api.py saves and loads
them.)"""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import kvferry
import numpy as np
import pytest
import xxhash
from kvferry import Block, Checkpoint
from support.event_loops import anyio_backend  # noqa: F401

pytestmark = pytest.mark.anyio

DATA = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8).tobytes()
LLM = kvferry.LlmState(
    tokens=np.array([1, 2, 3], np.int32),
    scores=np.arange(6, dtype=np.float32).reshape(3, 2),
    seed=7,
)


def make_block(data: bytes = DATA) -> Block:
    return Block.from_bytes(
        data, 256, 512, key=b"\x00two", parent=b"one", fingerprint="a model", llm=LLM
    )


def make_checkpoint(data: bytes = DATA) -> Checkpoint:
    return Checkpoint.from_bytes(data, 511, key=b"\x00two", fingerprint="a model", llm=LLM)


# ---- As objects ----------------------------------------------------------------------------------


def test_a_block_knows_its_positions_and_its_bytes() -> None:
    block = make_block()
    assert (block.begin, block.end, block.nbytes) == (256, 512, len(DATA))
    assert (block.key, block.parent, block.fingerprint) == (b"\x00two", b"one", "a model")
    assert block.to_bytes() == DATA
    assert block.view.readonly
    assert repr(block) == "<Block of 10000 bytes, positions 256 to 511>"


def test_a_checkpoint_knows_its_position_and_its_bytes() -> None:
    checkpoint = make_checkpoint()
    assert (checkpoint.position, checkpoint.nbytes) == (511, len(DATA))
    assert (checkpoint.key, checkpoint.fingerprint) == (b"\x00two", "a model")
    assert checkpoint.to_bytes() == DATA
    assert repr(checkpoint) == "<Checkpoint of 10000 bytes, position 511>"


def test_the_memory_is_borrowed_and_refused_to_writers() -> None:
    memory = bytearray(DATA)
    with kvferry.sync.Engine("host") as engine:
        for make in (make_block, make_checkpoint):
            with make(memory) as part:  # type: ignore[arg-type]
                assert part.numpy().ctypes.data == np.frombuffer(memory, np.uint8).ctypes.data
                kind = type(part).__name__
                with pytest.raises(kvferry.Busy, match=f"a {kind} that has not been closed has"):
                    engine.copy_out(b"x", memory)
                with pytest.raises(kvferry.InvalidArgument, match=f"read-only: a {kind}"):
                    engine.copy_out(b"x", part)
        engine.copy_out(b"x", memory)
    assert memory == b"x" + DATA[1:]


@pytest.mark.parametrize("make", [make_block, make_checkpoint])
def test_a_closed_one_says_so(make: type[Block] | type[Checkpoint]) -> None:
    with make() as part:
        pass
    with pytest.raises(kvferry.KvferryError, match="has been closed"):
        part.to_bytes()
    with pytest.raises(kvferry.KvferryError, match="has been closed"):
        _ = part.checksum
    assert "closed" in repr(part)


def test_the_checksum_is_the_xxh64_of_when_it_was_first_asked_for() -> None:
    memory = bytearray(DATA)
    block = make_block(memory)  # type: ignore[arg-type]
    expected = xxhash.xxh64_intdigest(DATA)
    assert block.checksum == expected
    memory[0] ^= 1
    assert block.checksum == expected
    assert make_checkpoint().checksum == expected


@pytest.mark.parametrize(
    ("begin", "end", "error"),
    [
        (5, 5, ValueError),
        (6, 5, ValueError),
        (-1, 5, ValueError),
        (0, 1 << 31, ValueError),
        ("0", 5, TypeError),
        (0, None, TypeError),
        (0, 2.0, TypeError),
    ],
)
def test_wrong_positions_are_refused(begin: object, end: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        Block.from_bytes(DATA, begin, end)  # type: ignore[arg-type]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="position is -1"):
        Checkpoint.from_bytes(DATA, -1)
    with pytest.raises(TypeError, match="a key is bytes, not str"):
        Checkpoint.from_bytes(DATA, 1, key="key")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="parent: a key is bytes, not int"):
        Block.from_bytes(DATA, 0, 1, parent=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="data is contiguous memory, not int"):
        Block.from_bytes(5, 0, 1)  # type: ignore[arg-type]


# ---- Files ---------------------------------------------------------------------------------------


async def test_a_file_carries_a_block(tmp_path: Path) -> None:
    block = make_block()
    await block.write(tmp_path / "block")
    again = await Block.read(tmp_path / "block")
    assert again.to_bytes() == DATA
    for name in ("begin", "end", "key", "parent", "fingerprint", "checksum"):
        assert getattr(again, name) == getattr(block, name)
    assert again.llm is not None
    assert again.llm.tokens.tolist() == [1, 2, 3]
    assert os.listdir(tmp_path) == ["block"]


async def test_a_file_carries_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = make_checkpoint()
    await checkpoint.write(tmp_path / "checkpoint")
    again = await Checkpoint.read(tmp_path / "checkpoint")
    assert again.to_bytes() == DATA
    for name in ("position", "key", "fingerprint", "checksum"):
        assert getattr(again, name) == getattr(checkpoint, name)


def test_a_file_carries_what_is_not_known(tmp_path: Path) -> None:
    Block.from_bytes(DATA, 0, 3).write_sync(tmp_path / "block")
    block = Block.read_sync(tmp_path / "block")
    assert (block.key, block.parent, block.fingerprint, block.llm) == (None, None, None, None)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    make_block().write_sync(tmp_path / "block")
    make_checkpoint().write_sync(tmp_path / "checkpoint")
    anyio.run(kvferry.Snapshot.from_bytes(DATA).to_file, tmp_path / "snapshot")
    with pytest.raises(kvferry.StateDamaged, match="is no block"):
        Block.read_sync(tmp_path / "checkpoint")
    with pytest.raises(kvferry.StateDamaged, match="is no checkpoint"):
        Checkpoint.read_sync(tmp_path / "snapshot")
    with pytest.raises(kvferry.StateDamaged, match="is no snapshot"):
        kvferry.Snapshot.from_file_sync(tmp_path / "block")
    later = (tmp_path / "block").read_bytes().replace(b"block 1", b"block 2", 1)
    (tmp_path / "block").write_bytes(later)
    with pytest.raises(kvferry.StateDamaged, match="no block that this version knows"):
        Block.read_sync(tmp_path / "block")
    with pytest.raises(FileNotFoundError):
        Block.read_sync(tmp_path / "none")


@pytest.mark.parametrize("make", [make_block, make_checkpoint])
def test_every_damaged_byte_is_found(tmp_path: Path, make: type[Block] | type[Checkpoint]) -> None:
    path = tmp_path / "file"
    part = make(DATA[:50])  # type: ignore[arg-type]
    part.write_sync(path)
    whole = path.read_bytes()
    for index in range(len(whole)):
        for changed in (1, 0x20):  # other digits; another case of letters
            damaged = bytearray(whole)
            damaged[index] ^= changed
            path.write_bytes(damaged)
            with pytest.raises(kvferry.StateDamaged):
                type(part).read_sync(path)
    for content in (b"", whole[:-1], whole + b"x", whole[:30]):
        path.write_bytes(content)
        with pytest.raises(kvferry.StateDamaged):
            type(part).read_sync(path)
