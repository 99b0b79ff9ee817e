"""The disk tier's folder: paths, lock, files aside, quarantine, and the room they occupy.

``parts`` has the parts; ``aside`` the files that are being written, each locked by its writer, so
that a file without a lock is what a killed writer left; ``quarantine`` what was not right.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Iterator

from .system import System

log = logging.getLogger("kvferry.store")

BLOCK = 512  # the unit of st_blocks
GROWTH = 512 << 10
"""What the index and folders may grow by from one measurement to the next."""


class Folder:
    def __init__(self, path: str, system: System) -> None:
        self.path = path
        self.parts, self.aside, self.quarantine = (
            os.path.join(path, name) for name in ("parts", "aside", "quarantine")
        )
        self.index = os.path.join(path, "index.sqlite")
        self._system = system
        self._thread_lock = threading.RLock()
        self._depth = 0
        os.makedirs(os.path.dirname(path), exist_ok=True)
        for folder in (path, self.parts, self.aside, self.quarantine):
            with contextlib.suppress(FileExistsError):
                system.make_folder(folder)
        for folder in (self.parts, self.aside, self.quarantine):
            os.chmod(folder, 0o700, follow_symlinks=True)
        self._lock = system.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT)

    def close(self) -> None:
        self._system.close(self._lock)

    @contextlib.contextmanager
    def in_thread(self) -> Iterator[None]:
        """One thread of this process."""
        with self._thread_lock:
            yield

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One thread of one process."""
        with self._thread_lock:
            if self._depth == 0:
                self._system.lock(self._lock, wait=True)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._system.unlock(self._lock)

    def part(self, name: str) -> str:
        return os.path.join(self.parts, name)

    def new_aside(self, nbytes: int) -> tuple[str, int]:
        """Makes a file of this many bytes, which occupies its room at once. Needs the lock."""
        path = os.path.join(self.aside, secrets.token_hex(8))
        descriptor = self._system.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            self._system.lock(descriptor, wait=False)
            self._system.allocate(descriptor, nbytes)
        except BaseException:
            self.drop_aside(path, descriptor)
            raise
        return path, descriptor

    def drop_aside(self, path: str, descriptor: int) -> None:
        self._system.close(descriptor)
        try:
            self._system.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:  # without its lock, the next writer removes the file
            log.warning("%s stays for now: %s", path, error)

    def clean_aside(self) -> None:
        """Removes what killed writers left. Needs the lock."""
        for name in self._system.names(self.aside):
            path = os.path.join(self.aside, name)
            try:
                descriptor = self._system.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            except OSError:
                remove_tree(path)
                continue
            try:
                self._system.lock(descriptor, wait=False)
            except BlockingIOError:
                continue
            finally:
                self._system.close(descriptor)
            remove_tree(path)

    def to_quarantine(self, name: str, reason: object) -> None:
        """Moves what stands at a part's name. Needs the lock."""
        log.warning("quarantined: %s: %s", self.part(name), reason)
        with contextlib.suppress(FileNotFoundError):
            self._system.rename(
                self.part(name), os.path.join(self.quarantine, f"{name}.{secrets.token_hex(4)}")
            )

    def empty_quarantine(self) -> None:
        for name in self._system.names(self.quarantine):
            remove_tree(os.path.join(self.quarantine, name))

    def occupied_beside_parts(self) -> int:
        """Bytes, as du counts them, of everything but the parts."""
        paths = [self.path, self.parts]
        for entry in os.scandir(self.path):
            if entry.path not in (self.parts, self.aside, self.quarantine):
                paths.append(entry.path)
        return sum(map(occupied, paths)) + sum(map(tree, (self.aside, self.quarantine)))


def occupied(path: str) -> int:
    try:
        return os.lstat(path).st_blocks * BLOCK
    except FileNotFoundError:
        return 0


def tree(path: str) -> int:
    total = occupied(path)
    for folder, folders, files in os.walk(path):
        total += sum(occupied(os.path.join(folder, name)) for name in (*folders, *files))
    return total


def remove_tree(path: str) -> None:
    """Removes whatever it is; follows no link."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError):
        shutil.rmtree(path)
