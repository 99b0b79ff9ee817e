"""A saved sequence."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread

from ._native import ffi, lib
from .buffer import Buffer, borrow
from .claims import claim_for_snapshot
from .completions import Completion
from .errors import error
from .files import replacement

if TYPE_CHECKING:
    from ._native import CData

# A file is this, the length of a JSON header in decimal and a newline, the header, and the state.
_MAGIC = b"kvferry snapshot 1\n"
_MAX_HEADER = 65536


class Snapshot(Buffer):
    """The state of one sequence, as ``llama_state_seq_get_data`` would write it, bit for bit.

    Read-only. It knows which model and kind of cache it came from (``fingerprint``), and once it
    has been sealed, its checksum.
    """

    _writable = False

    def __init__(
        self,
        memory: CData,
        nbytes: int,
        *,
        fingerprint: str | None = None,
        checksum: int | None = None,
        completion: Completion | None = None,
    ) -> None:
        super().__init__(memory, nbytes)
        self._claim: object = claim_for_snapshot(memory, nbytes)
        self.fingerprint = fingerprint
        """Identity of model and cache. None: unknown, and not checked when it is loaded."""
        self.sealed = checksum
        """CRC-32 as of ``seal()``, or as it came with a file; None if it has not been sealed."""
        self.completion = completion
        """How the save went; None for a state that came from elsewhere."""

    @classmethod
    def from_bytes(cls, state: object, *, fingerprint: str | None = None) -> Snapshot:
        """Wraps a state that comes from elsewhere. Borrows the memory, without a copy."""
        borrowed = borrow(state)
        return cls(borrowed.memory, borrowed.nbytes, fingerprint=fingerprint)

    def close(self) -> None:
        super().close()
        self._claim = None

    def checksum(self) -> int:
        """The CRC-32 of the bytes as they are now. Takes about a second for each 1 to 3 GiB."""
        return zlib.crc32(self.view)

    async def seal(self) -> int:
        """Computes the checksum, on a thread, and keeps it for ``verify``, files and loads."""
        self.sealed = await anyio.to_thread.run_sync(self.checksum)
        return self.sealed

    async def verify(self) -> None:
        """Compares the bytes with the checksum, on a thread.

        Raises StateDamaged if they differ, ValueError if the snapshot was never sealed.
        """
        if self.sealed is None:
            raise ValueError("this Snapshot has no checksum: seal() it first")
        if await anyio.to_thread.run_sync(self.checksum) != self.sealed:
            raise error(lib.KVF_ERR_STATE_DAMAGED, "the checksum is wrong")

    async def to_file(self, path: str | os.PathLike[str]) -> None:
        """Writes state, fingerprint and checksum (seals it if need be), on a thread.

        A file that is there already is replaced once the new one is whole on the disk, so that a
        process or machine that ends meanwhile leaves the one or the other (and maybe, beside it, a
        ``.partial`` file). Raises OSError; then the old file is as it was.
        """
        if self.sealed is None:
            await self.seal()
        await anyio.to_thread.run_sync(self._write, Path(path))

    @classmethod
    async def from_file(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Reads what ``to_file`` wrote, on a thread, into ordinary memory.

        Raises StateDamaged if it is no such file or is truncated. The checksum is read, not
        compared: that is what ``verify()`` and ``load(verify=True)`` are for.
        """
        return await anyio.to_thread.run_sync(cls._read, Path(path))

    def _write(self, path: Path) -> None:
        header = {"fingerprint": self.fingerprint, "crc32": self.sealed, "bytes": self.nbytes}
        text = json.dumps(header).encode() + b"\n"
        with replacement(path) as file:
            file.write(_MAGIC + b"%d\n" % len(text) + text)
            file.write(self.view)

    @classmethod
    def _read(cls, path: Path) -> Snapshot:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise error(lib.KVF_ERR_STATE_DAMAGED, f"{path} is no snapshot of kvferry's")
            try:
                length = int(file.readline(16))
                if not 0 < length <= _MAX_HEADER:
                    raise ValueError("length of the header")
                header = json.loads(file.read(length))
                nbytes, checksum = int(header["bytes"]), int(header["crc32"])
                fingerprint = header["fingerprint"]
                if not (fingerprint is None or isinstance(fingerprint, str)):
                    raise TypeError("fingerprint")
            except (ValueError, TypeError, KeyError):
                raise error(lib.KVF_ERR_STATE_DAMAGED, f"the header of {path}") from None
            # Compared before memory is taken: a damaged header may claim any size.
            if os.fstat(file.fileno()).st_size - file.tell() != nbytes:
                raise error(lib.KVF_ERR_STATE_DAMAGED, f"{path} is truncated")
            state = bytearray(nbytes)
            if file.readinto(state) != nbytes:
                raise error(lib.KVF_ERR_STATE_DAMAGED, f"{path} is truncated")
        memory = ffi.from_buffer("uint8_t[]", state)
        return cls(memory, nbytes, fingerprint=fingerprint, checksum=checksum)
