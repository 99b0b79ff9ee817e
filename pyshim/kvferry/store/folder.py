"""The disk tier's folder: paths, lock, files aside, quarantine, and the room they occupy.

``parts`` has the parts. ``aside`` has the files that are being written. Each is locked by its
writer, so that a file without a lock was left by a killed writer. ``quarantine`` has files that
were not right.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
import threading
from collections.abc import Iterator

from .part_format import parse_name
from .system import System

log = logging.getLogger("kvferry.store")

BLOCK = 512  # the unit of st_blocks
GROWTH = 512 << 10
"""How much the index and the folders may grow between two measurements."""
_LONGEST_NAME = 100
"""Bytes of a name that are kept in the quarantine; a part's name has 80 at most."""


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
        lock = os.path.join(path, "lock")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if not os.path.lexists(lock):
            self._check_parts()
        for folder in (path, self.parts, self.aside, self.quarantine):
            with contextlib.suppress(FileExistsError):
                system.make_folder(folder)
        for folder in (self.parts, self.aside, self.quarantine):
            # Somebody else's folder behind a link must keep its mode and its files.
            if not stat.S_ISDIR(system.lstat(folder).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
            os.chmod(folder, 0o700)
        self._lock = system.open(lock, os.O_RDWR | os.O_CREAT)

    def _check_parts(self) -> None:
        """Raises OSError if ``parts`` has other files than parts, in a folder that no store has
        used.

        A store quarantines these files, and removes them when it needs the room.
        """
        try:
            names = self._system.names(self.parts)
        except (FileNotFoundError, NotADirectoryError):
            return
        if not all(map(parse_name, names)):
            raise FileExistsError(errno.EEXIST, f"{self.parts} has files of something else")

    def close(self) -> None:
        self._system.close(self._lock)

    @contextlib.contextmanager
    def in_thread(self) -> Iterator[None]:
        """Admits one thread of this process at a time."""
        with self._thread_lock:
            yield

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Admits one thread of all processes that share the folder at a time: the folder's lock."""
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
        """Creates a file in ``aside``, whose bytes are allocated at once. Needs the folder's lock.

        Returns its path, and a descriptor that holds the file's own lock.
        """
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
            log.warning("%s was not removed: %s", path, error)

    def clean_aside(self) -> None:
        """Removes the files that killed writers have left. Needs the folder's lock."""
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
        """Moves whatever has a part's name into the quarantine. Needs the folder's lock."""
        # With %r a name has no line break in the log. What is logged may be kept: an exception
        # would keep the frames that have buffers.
        log.warning("quarantined: %r: %s", self.part(name), str(reason))
        short = os.fsdecode(os.fsencode(name)[:_LONGEST_NAME])
        with contextlib.suppress(FileNotFoundError):
            self._system.rename(
                self.part(name), os.path.join(self.quarantine, f"{short}.{secrets.token_hex(4)}")
            )

    def empty_quarantine(self) -> None:
        for name in self._system.names(self.quarantine):
            remove_tree(os.path.join(self.quarantine, name))

    def occupied_beside_parts(self) -> int:
        """Returns the bytes, as du counts them, of everything but the parts."""
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
    """As ``occupied``, with everything below; without what the system finds too deep."""
    total, folders = occupied(path), [path]
    while folders:  # without recursion, as somebody may have made folders of any depth
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                total += occupied(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
    return total


def remove_tree(path: str) -> None:
    """Removes a file, a link, or a folder with all that is in it. Follows no link. Moves inner
    folders out of it first, so that no path is too long."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except (IsADirectoryError, PermissionError):
        folders = [path]
        while folders:
            folder = folders.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(os.path.join(os.path.dirname(path), secrets.token_hex(8)))
                        os.rename(entry.path, folders[-1])
                    else:
                        os.unlink(entry.path)
            os.rmdir(folder)
