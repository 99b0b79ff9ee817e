"""The system calls of the disk tier. Tests put faults here."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class System:
    """Calls the operating system. A call that a signal interrupts is made again."""

    def call(self, function: Callable[..., T], *arguments: object) -> T:
        while True:
            try:
                return self.call_once(function, *arguments)
            except InterruptedError:
                continue

    def call_once(self, function: Callable[..., T], *arguments: object) -> T:
        return function(*arguments)

    def open(self, path: str, flags: int) -> int:
        """Follows no link, waits for no other end of a pipe; a new file is for its owner only."""
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return self.call(os.open, path, flags, 0o600)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def fstat(self, descriptor: int) -> os.stat_result:
        return self.call(os.fstat, descriptor)

    def lstat(self, path: str) -> os.stat_result:
        return self.call(os.lstat, path)

    def capacity(self, path: str) -> int:
        """Returns how many bytes the file system has, free or not."""
        found = self.call(os.statvfs, path)
        return found.f_blocks * found.f_frsize

    def make_folder(self, path: str) -> None:
        self.call(os.mkdir, path, 0o700)

    def names(self, path: str) -> list[str]:
        return self.call(os.listdir, path)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        self.call(os.posix_fallocate, descriptor, 0, nbytes)

    def read(self, descriptor: int, memory: memoryview, offset: int) -> int:
        return self.call(os.preadv, descriptor, [memory], offset)

    def write(self, descriptor: int, pieces: Sequence[memoryview], offset: int) -> int:
        return self.call(os.pwritev, descriptor, pieces, offset)

    def sync(self, descriptor: int) -> None:
        self.call(os.fsync, descriptor)

    def sync_folder(self, path: str) -> None:
        descriptor = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.sync(descriptor)
        finally:
            self.close(descriptor)

    def link(self, old: str, new: str) -> None:
        """Raises FileExistsError; replaces nothing."""
        self.call(os.link, old, new)

    def unlink(self, path: str) -> None:
        self.call(os.unlink, path)

    def rename(self, old: str, new: str) -> None:
        self.call(os.rename, old, new)

    def lock(self, descriptor: int, *, wait: bool) -> None:
        """Locks for this open file. Raises BlockingIOError if it is locked and ``wait`` is not."""
        self.call(fcntl.flock, descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def unlock(self, descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
