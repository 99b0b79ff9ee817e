"""Files of blocks and checkpoints that the packages for Python and Go exchange.

examples/go/kvferry/testdata has files of either package, and part_file_test.go is the other half of
these tests: each package writes its files as they are there, and reads those of the other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kvferry import Block, Checkpoint, LlmState

FILES = Path(__file__).resolve().parents[2] / "examples" / "go" / "kvferry" / "testdata"

DATA = bytes(range(100))
KEY, PARENT = b"\x00two\xff", b"one"
LLM = LlmState(np.array([1, 2, 3], np.int32), np.arange(6, dtype=np.float32).reshape(3, 2), seed=7)

BLOCK = Block.from_bytes(DATA, 256, 512, key=KEY, parent=PARENT, fingerprint="a model")
CHECKPOINT = Checkpoint.from_bytes(DATA, 511, key=KEY, fingerprint="a model")

WRITTEN = {
    "python.block": BLOCK,
    "python-llm.block": Block.from_bytes(DATA, 0, 3, llm=LLM),
    "python.checkpoint": CHECKPOINT,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_are_written_as_go_reads_them(tmp_path: Path, name: str) -> None:
    WRITTEN[name].write_sync(tmp_path / name)
    assert (tmp_path / name).read_bytes() == (FILES / name).read_bytes()


def test_a_block_that_go_has_written_is_read() -> None:
    block = Block.read_sync(FILES / "go.block")
    assert block.to_bytes() == DATA
    assert (block.begin, block.end, block.checksum) == (256, 512, BLOCK.checksum)
    assert (block.key, block.parent, block.fingerprint) == (KEY, PARENT, "a model")


def test_a_block_of_which_go_knew_little_is_read() -> None:
    block = Block.read_sync(FILES / "go-bare.block")
    assert (block.to_bytes(), block.begin, block.end) == (DATA[:9], 0, 1)
    assert (block.key, block.parent, block.fingerprint, block.llm) == (None,) * 4


def test_a_checkpoint_that_go_has_written_is_read() -> None:
    checkpoint = Checkpoint.read_sync(FILES / "go.checkpoint")
    assert checkpoint.to_bytes() == DATA
    assert (checkpoint.position, checkpoint.checksum) == (511, BLOCK.checksum)
    assert (checkpoint.key, checkpoint.fingerprint) == (KEY, "a model")
