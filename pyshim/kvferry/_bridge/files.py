"""Files that are there whole, or not at all."""

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
    """A file to write, which takes the place of ``path`` at the end of the block.

    It is written beside that, synced and renamed, and the folder is synced: at any time ``path``
    is the old file or the new one, also after a crash of the machine. Where the block raises, the
    old one stays. What is there and is no plain file, such as a pipe, is written itself.
    """
    path = path.resolve()  # a link stays, and leads to the new file
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
