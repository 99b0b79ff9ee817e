"""Parts of a sequence's state: blocks of tokens, and checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio.to_thread
import xxhash

from ._bridge import llama_cpp_object, part_file
from ._bridge.arguments import HostMemory
from ._bridge.attachment import Attachment
from ._bridge.block_list import BlockList, checked_key, checked_position, span
from ._bridge.completion_record import Completion
from ._bridge.described_file import Kind
from ._bridge.llama_cpp_object import LlmState
from ._bridge.part_file import Content
from ._native import ffi, lib
from .buffer import borrow
from .errors import error
from .saved import Saved

if TYPE_CHECKING:
    from ._native import CData

Self = TypeVar("Self", bound="SavedPart")


class SavedPart(Saved):
    """The common base of Block and Checkpoint."""

    _kind: Kind

    def __init__(
        self,
        memory: CData,
        nbytes: int,
        *,
        key: bytes | None,
        fingerprint: str | None,
        checksum: int | None,
        completion: Completion | None,
        llm: LlmState | None,
    ) -> None:
        super().__init__(memory, nbytes, fingerprint=fingerprint, completion=completion, llm=llm)
        self.key = None if key is None else checked_key("key", key)
        """The program's own name for all tokens of the conversation up to the end of this part,
        such as a chained hash; None if the program has given none."""
        self._checksum = checksum

    @property
    def checksum(self) -> int:
        """The XXH64 of the bytes. It is computed when it is first asked for: 0.1 ms a MiB."""
        if self._checksum is None:
            self._checksum = xxhash.xxh64_intdigest(self.view)
        return self._checksum

    async def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the bytes, and what this object knows of them, to a file, on a thread.

        An existing file is replaced when the new one is completely on the disk, as by
        ``Snapshot.to_file``. Raises OSError; then the old file is unchanged.
        """
        await anyio.to_thread.run_sync(self.write_sync, path)

    def write_sync(self, path: str | os.PathLike[str]) -> None:
        """As ``write``, on this thread."""
        content = Content(
            data=self.view,
            positions=self._positions(),
            keys=self._keys(),
            fingerprint=self.fingerprint,
            checksum=self.checksum,
            llm=self.llm,
        )
        part_file.write(Path(path), self._kind, content)

    @classmethod
    async def read(cls: type[Self], path: str | os.PathLike[str]) -> Self:
        """Reads a file of ``write`` into ordinary memory, and verifies it, on a thread.

        Raises OSError, and StateDamaged if ``write`` has not written the file, or if the file is
        truncated or any of its bytes has changed since.
        """
        return await anyio.to_thread.run_sync(cls.read_sync, path)

    @classmethod
    def read_sync(cls: type[Self], path: str | os.PathLike[str]) -> Self:
        """As ``read``, on this thread."""
        return cls._of(part_file.read(Path(path), cls._kind))

    @classmethod
    def _of(cls: type[Self], content: Content) -> Self:
        """Returns what a file holds."""
        raise NotImplementedError

    def _positions(self) -> dict[str, int]:
        raise NotImplementedError

    def _keys(self) -> dict[str, bytes | None]:
        return {"key": self.key}


class Block(SavedPart):
    """The state of the tokens at some positions of a sequence, in the layers that keep every token.

    The bytes are what libllama would write for a sequence that held these tokens alone. For plain
    attention a Block is a state of its own, which ``Llama.load`` loads, too. A Block is a read-only
    Buffer. While the Block lives, no transfer may write to its memory (Busy).
    """

    _kind = part_file.BLOCK

    def __init__(
        self,
        memory: CData,
        nbytes: int,
        *,
        begin: int,
        end: int,
        key: bytes | None = None,
        parent: bytes | None = None,
        fingerprint: str | None = None,
        checksum: int | None = None,
        completion: Completion | None = None,
        llm: LlmState | None = None,
    ) -> None:
        super().__init__(
            memory,
            nbytes,
            key=key,
            fingerprint=fingerprint,
            checksum=checksum,
            completion=completion,
            llm=llm,
        )
        self.begin = begin
        """The first position."""
        self.end = end
        """The position after the last one."""
        self.parent = None if parent is None else checked_key("parent", parent)
        """The ``key`` of the block that comes before this one; None if the program has given
        none."""

    @classmethod
    def from_bytes(
        cls,
        data: HostMemory,
        begin: int,
        end: int,
        *,
        key: bytes | None = None,
        parent: bytes | None = None,
        fingerprint: str | None = None,
        llm: LlmState | None = None,
    ) -> Block:
        """Returns a Block of bytes that came from elsewhere. Borrows the memory, without a copy.

        Raises TypeError, InvalidArgument.
        """
        begin, end = span(begin, end)
        borrowed = borrow(data, "data")
        return cls(
            borrowed.memory,
            borrowed.nbytes,
            begin=begin,
            end=end,
            key=key,
            parent=parent,
            fingerprint=fingerprint,
            llm=llm,
        )

    @classmethod
    def _of(cls, content: Content) -> Block:
        return cls(
            ffi.from_buffer("uint8_t[]", content.data),
            len(content.data),
            begin=content.positions["begin"],
            end=content.positions["end"],
            key=content.keys["key"],
            parent=content.keys["parent"],
            fingerprint=content.fingerprint,
            checksum=content.checksum,
            llm=content.llm,
        )

    def _positions(self) -> dict[str, int]:
        return {"begin": self.begin, "end": self.end}

    def _keys(self) -> dict[str, bytes | None]:
        return {"key": self.key, "parent": self.parent}

    def _condition(self) -> str:
        return f", positions {self.begin} to {self.end - 1}{super()._condition()}"


class Checkpoint(SavedPart):
    """The state of a sequence's sliding windows and recurrent layers at one position.

    The bytes are what llama.cpp writes with ``LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY``. A Checkpoint is
    a read-only Buffer. While the Checkpoint lives, no transfer may write to its memory (Busy).
    """

    _kind = part_file.CHECKPOINT

    def __init__(
        self,
        memory: CData,
        nbytes: int,
        *,
        position: int,
        key: bytes | None = None,
        fingerprint: str | None = None,
        checksum: int | None = None,
        completion: Completion | None = None,
        llm: LlmState | None = None,
    ) -> None:
        super().__init__(
            memory,
            nbytes,
            key=key,
            fingerprint=fingerprint,
            checksum=checksum,
            completion=completion,
            llm=llm,
        )
        self.position = position
        """The last position of the sequence when the checkpoint was saved. The last block that is
        loaded with the checkpoint ends behind this position."""

    @classmethod
    def from_bytes(
        cls,
        data: HostMemory,
        position: int,
        *,
        key: bytes | None = None,
        fingerprint: str | None = None,
        llm: LlmState | None = None,
    ) -> Checkpoint:
        """Returns a Checkpoint of bytes that came from elsewhere. Borrows the memory, without a
        copy. Raises TypeError, InvalidArgument."""
        at = checked_position("position", position)
        borrowed = borrow(data, "data")
        return cls(
            borrowed.memory,
            borrowed.nbytes,
            position=at,
            key=key,
            fingerprint=fingerprint,
            llm=llm,
        )

    @classmethod
    def _of(cls, content: Content) -> Checkpoint:
        return cls(
            ffi.from_buffer("uint8_t[]", content.data),
            len(content.data),
            position=content.positions["position"],
            key=content.keys["key"],
            fingerprint=content.fingerprint,
            checksum=content.checksum,
            llm=content.llm,
        )

    def _positions(self) -> dict[str, int]:
        return {"position": self.position}

    def _condition(self) -> str:
        return f", position {self.position}{super()._condition()}"


class BlocksToLoad:
    """Blocks and a checkpoint as a load takes them."""

    def __init__(self, blocks: Sequence[Block], checkpoint: Checkpoint | None) -> None:
        """Raises TypeError for other objects, KvferryError if an object has been closed, and
        StateMismatch if the keys are not those of one conversation."""
        for block in blocks:
            if not isinstance(block, Block):
                raise TypeError(f"blocks are Block objects, not {type(block).__name__}")
        if not (checkpoint is None or isinstance(checkpoint, Checkpoint)):
            raise TypeError(f"checkpoint is a Checkpoint, not {type(checkpoint).__name__}")
        _check_keys(blocks, checkpoint)
        self.parts: list[SavedPart] = [*blocks]
        self.checkpoint_memory: CData = ffi.NULL
        self.checkpoint_bytes = 0
        if checkpoint is not None:
            self.parts.append(checkpoint)
            self.checkpoint_memory, self.checkpoint_bytes = checkpoint.memory, checkpoint.nbytes
        self.list = BlockList(
            [(block.memory, block.nbytes, (block.begin, block.end)) for block in blocks]
        )
        self.llm = _llm_state(blocks, checkpoint)

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint that all parts share; None if no part has one. Raises StateMismatch if
        the parts are of several models."""
        known = {part.fingerprint for part in self.parts} - {None}
        if len(known) > 1:
            detail = f"of several models: {', '.join(sorted(filter(None, known)))}"
            raise error(lib.KVF_ERR_STATE_MISMATCH, detail)
        return next(iter(known), None)

    def check_model(self, attachment: Attachment) -> None:
        """Raises StateMismatch if a part was saved with another model."""
        for part in self.parts:
            attachment.check_fingerprint(part.fingerprint)

    def submit(self, llama: int, seq: int, options: CData, job: CData) -> int:
        """Calls ``kvf_llama_load_blocks``."""
        return lib.kvf_llama_load_blocks(
            llama,
            seq,
            self.list.native,
            self.list.item_size,
            self.list.count,
            self.checkpoint_memory,
            self.checkpoint_bytes,
            options,
            job,
        )


def _check_keys(blocks: Sequence[Block], checkpoint: Checkpoint | None) -> None:
    for before, block in pairwise(blocks):
        if _differ(before.key, block.parent):
            detail = f"the block at {block.begin} does not follow the one at {before.begin}"
            raise error(lib.KVF_ERR_STATE_MISMATCH, detail)
    if checkpoint is not None and blocks and _differ(blocks[-1].key, checkpoint.key):
        detail = "the checkpoint is of another conversation"
        raise error(lib.KVF_ERR_STATE_MISMATCH, detail)


def _differ(key: bytes | None, other: bytes | None) -> bool:
    return key is not None and other is not None and key != other


def _llm_state(blocks: Sequence[Block], checkpoint: Checkpoint | None) -> LlmState | None:
    """What a ``llama_cpp.Llama`` knows of the whole sequence; None unless that is known."""
    if not blocks:
        return None if checkpoint is None else checkpoint.llm
    known = [block.llm for block in blocks if block.llm is not None]
    if len(known) < len(blocks) or blocks[0].begin != 0:
        return None
    return llama_cpp_object.joined(known)
