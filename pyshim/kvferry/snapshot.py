"""The saved state of a sequence."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from ._bridge import snapshot_file
from ._bridge.arguments import HostMemory
from ._bridge.attachment import Attachment
from ._bridge.completion_record import Completion
from ._bridge.llama_cpp_object import LlmState
from ._bridge.snapshot_file import Content
from ._native import ffi, lib
from .buffer import Buffer, borrow
from .errors import error
from .saved import Saved

if TYPE_CHECKING:
    from ._native import CData


class Snapshot(Saved):
    """The state of one sequence, bit for bit as ``llama_state_seq_get_data`` would write it.

    A read-only Buffer. While it lives, its memory is refused as a target with Busy. Methods whose
    names end in ``_sync`` block; the others do their work on a thread, for an event loop.
    """

    def __init__(
        self,
        memory: CData,
        nbytes: int,
        *,
        fingerprint: str | None = None,
        checksum: int | None = None,
        completion: Completion | None = None,
        llm: LlmState | None = None,
    ) -> None:
        super().__init__(memory, nbytes, fingerprint=fingerprint, completion=completion, llm=llm)
        self.sealed = checksum
        """The CRC-32 from ``seal()`` or from the file; None if it has not been sealed."""

    @classmethod
    def from_bytes(
        cls,
        state: HostMemory,
        *,
        fingerprint: str | None = None,
        llm: LlmState | None = None,
    ) -> Snapshot:
        """Returns a Snapshot of a state that kvferry has not saved. Borrows the memory, without a
        copy."""
        borrowed = borrow(state, "state")
        return cls(borrowed.memory, borrowed.nbytes, fingerprint=fingerprint, llm=llm)

    def _condition(self) -> str:
        tokens = "" if self.llm is None else f", {len(self.llm.tokens)} tokens"
        sealed = "" if self.sealed is None else ", sealed"
        return tokens + sealed + super()._condition()

    def checksum(self) -> int:
        """Returns the CRC-32 of the bytes as they are now. Blocks: a second for 1 to 3 GiB."""
        return zlib.crc32(self.view)

    async def seal(self) -> int:
        """Computes the checksum on a thread, keeps it for ``verify`` and files, and returns it."""
        return await anyio.to_thread.run_sync(self.seal_sync)

    def seal_sync(self) -> int:
        """As ``seal``, on this thread."""
        self.sealed = self.checksum()
        return self.sealed

    async def verify(self) -> None:
        """Compares the bytes with the checksum from ``seal``, on a thread.

        Raises StateDamaged if they differ, ValueError if the Snapshot was never sealed.
        """
        await anyio.to_thread.run_sync(self.verify_sync)

    def verify_sync(self) -> None:
        """As ``verify``, on this thread."""
        if self.sealed is None:
            raise ValueError("this Snapshot has no checksum: seal() it first")
        if self.checksum() != self.sealed:
            raise error(lib.KVF_ERR_STATE_DAMAGED, "the checksum is wrong")

    async def to_file(self, path: str | os.PathLike[str]) -> None:
        """Writes state, fingerprint, checksum and ``llm`` to a file, on a thread.

        Seals the Snapshot if it is not sealed. An existing file is replaced when the new one is
        completely on the disk: if the process or the machine ends meanwhile, the path has the old
        or the new file (and maybe a ``.partial`` file beside it). Raises OSError; then the old file
        is unchanged.
        """
        await anyio.to_thread.run_sync(self.to_file_sync, path)

    def to_file_sync(self, path: str | os.PathLike[str]) -> None:
        """As ``to_file``, on this thread."""
        checksum = self.seal_sync() if self.sealed is None else self.sealed
        content = Content(self.view, self.fingerprint, checksum, self.llm)
        snapshot_file.write(Path(path), content)

    @classmethod
    async def from_file(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Reads a file of ``to_file`` into ordinary memory, on a thread; returns the Snapshot.

        Raises OSError, and StateDamaged if it is no such file or is truncated. The checksum is
        read, but not compared: ``verify()`` and ``load(verify=True)`` do that.
        """
        return await anyio.to_thread.run_sync(cls.from_file_sync, path)

    @classmethod
    def from_file_sync(cls, path: str | os.PathLike[str]) -> Snapshot:
        """As ``from_file``, on this thread."""
        content = snapshot_file.read(Path(path))
        return cls(
            ffi.from_buffer("uint8_t[]", content.state),
            len(content.state),
            fingerprint=content.fingerprint,
            checksum=content.checksum,
            llm=content.llm,
        )


def to_verify(state: HostMemory) -> Snapshot:
    """Returns a state that a load is to verify. Raises TypeError if it is not a Snapshot."""
    if not isinstance(state, Snapshot):
        raise TypeError("only a Snapshot can be verified")
    return state


def state_to_load(state: HostMemory, attachment: Attachment) -> tuple[Buffer, LlmState | None]:
    """Returns the memory of a state, and what a Snapshot has for the ``llama_cpp.Llama``.

    Raises StateMismatch for a Snapshot or a Block of another model, and as ``borrow``.
    """
    buffer = borrow(state, "state")
    if not isinstance(buffer, Saved):
        return buffer, None
    attachment.check_fingerprint(buffer.fingerprint)
    # The tokens of a Block are not all that the sequence will hold.
    return buffer, buffer.llm if isinstance(buffer, Snapshot) else None
