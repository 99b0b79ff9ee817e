"""Files that are written whole, or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacement(path: Path) -> Iterator[IO[bytes]]:
    """Gives a file to write that replaces ``path`` at the end of the ``with`` block.

    The new file is written beside ``path``, synced and renamed, and the folder is synced: at any
    time, also after a crash of the machine, ``path`` is the old file or the new one. If the block
    raises, the old file stays. Anything at ``path`` that is no regular file, such as a pipe, is
    written directly.
    """
    path = path.resolve()  # so that a link stays, and leads to the new file
    mode = _mode_of(path)
    if mode is not None and not stat.S_ISREG(mode):
        with path.open("wb") as file:
            yield file
        return
    aside = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.partial")
    try:
        with aside.open("xb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _mode_of(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
