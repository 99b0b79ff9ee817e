"""The disk tier: blocks and checkpoints in a folder that several processes may share."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import xxhash

from . import part_format
from .counts import Reason, Refusals
from .description import Description
from .folder import BLOCK, GROWTH, Folder, log, occupied, remove_tree
from .index import BROKEN, SUFFIXES, Index
from .part_format import HEADER_BYTES, Damaged, Newer, name_of
from .system import System

T = TypeVar("T")

_TOUCHES = 32
"""How many uses are noted in memory before the index gets them. A killed process loses them."""
_TRANSIENT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}


@dataclass(frozen=True)
class DiskStats:
    parts: int
    occupied: int
    """Bytes of everything in the folder, as du counts them."""
    limit: int
    written: int
    evicted: int
    quarantined: int
    """``written``, ``evicted`` and ``quarantined`` count since this object was made."""


@dataclass(frozen=True)
class Report:
    right: int
    quarantined: int
    newer: int
    """Files of a newer version, which stay as they are."""


class Disk:
    """Parts in a folder. Every method may be called by any thread, and blocks on the disk.

    The folder must be on a local file system. An object must not be used across a fork.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        limit: int,
        *,
        system: System | None = None,
        pinned: Container[tuple[str, bytes]] = (),
    ) -> None:
        """Opens the folder or creates it. Raises OSError.

        ``limit`` bounds the bytes that the folder occupies, as du counts them. Processes that share
        a folder should have one limit: each evicts down to its own. ``pinned`` has kinds and keys
        of parts that this object does not evict; the program may change it at any time.
        """
        self._limit = limit
        self._pinned = pinned
        self._closed = False
        self._system = system or System()
        path = os.path.abspath(os.path.expanduser(os.fspath(folder)))
        self._folder = Folder(path, self._system)
        self._largest = min(limit, self._system.capacity(path))
        self._index: Index | None = None
        self._touched: dict[tuple[str, bytes], int] = {}
        self._newer = 0  # bytes of files of a newer version, which stay
        self._written = self.evicted = self._quarantined = 0
        self.written_bytes = 0
        self.latest_occupied = 0
        """Bytes, as they were measured for the latest write."""
        self.refused: Refusals = Refusals()
        try:
            with self._folder.locked():
                self._folder.clean_aside()
                self._with_index(self._reconcile)
                self._make_room(0, "", b"", b"")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent. No other method may be under way, or be called later."""
        if self._closed:
            return
        self._closed = True
        if self._index is not None:
            try:
                with self._folder.locked():
                    self._flush_touches()
            except OSError as error:
                log.warning("the latest uses are not in the index: %s", error)
            if self._index is not None:
                self._index.close()
        self._folder.close()

    def find(self, kind: str, key: bytes) -> Description | None:
        """Returns what the index says. Only ``read_into`` checks the file."""
        return self._with_index(lambda index: index.find(kind, key))

    def find_all(self, kind: str, keys: Sequence[bytes]) -> list[Description]:
        """As ``find``, for at most 900 keys. Returns the parts that the index has, in no order."""
        return self._with_index(lambda index: index.find_all(kind, keys))

    def children(self, parent: bytes) -> list[Description]:
        """Returns the parts that have this parent, in no order."""
        return self._with_index(lambda index: index.children(parent))

    def ends(self, parent: bytes) -> list[int]:
        """Returns where the parts end that have this parent, each end once, in no order."""
        return self._with_index(lambda index: index.ends(parent))

    def use(self, kind: str, key: bytes) -> None:
        """Notes a use of a part. Parts are evicted in the order of their last use."""
        with self._folder.in_thread():
            self._touched[kind, key] = time.time_ns()

    def list(self) -> Iterator[Description]:
        """Gives the parts in the order of kind and key. A part that is written or removed meanwhile
        may be among them or not."""
        kind, key = "", b""
        while True:
            # The lambda runs before the loop goes on.
            page = self._with_index(lambda index: index.after(kind, key, 256))  # noqa: B023
            if not page:
                return
            yield from page
            kind, key = page[-1].kind, page[-1].key

    def write(self, description: Description, data: bytes | bytearray | memoryview) -> bool:
        """Keeps a part: it is on the disk when this returns True, also if it was there before.

        Returns False if the limit leaves no room, or a file of a newer version has the name.
        Raises ValueError if the data are not those described; OSError, such as for a full disk:
        then nothing of the part stays.
        """
        part_format.check(description)
        memory = memoryview(data).cast("B")
        if len(memory) != description.nbytes:
            raise ValueError("the data have another length than their description says")
        if xxhash.xxh64_intdigest(memory) != description.checksum:
            raise ValueError("the data have another checksum than their description says")
        header = part_format.header_of(description)
        with self._folder.locked():
            try:
                if self._is_there(description):
                    self._system.sync_folder(self._folder.parts)
                    return True
            except Newer:
                self._refuse("newer")
                return False
            aside = self._reserve(description)
        if aside is None:
            self._refuse("budget")
            return False
        path, descriptor = aside
        try:
            part_format.write_part(self._system, descriptor, header, memory)
            with self._folder.locked():
                self._publish(description, path, descriptor)
        finally:
            self._folder.drop_aside(path, descriptor)
        return True

    def read_into(self, description: Description, memory: bytearray | memoryview) -> bool:
        """Fills ``memory``, of ``description.nbytes`` bytes, with the part's bytes.

        Returns False if the part is not there or not right. Then a file that is not right has been
        quarantined, and ``memory`` has any content. Raises OSError where the process lacks
        descriptors or memory.
        """
        part_format.check(description)
        view = memoryview(memory).cast("B")
        if len(view) != description.nbytes:
            raise ValueError("the memory has another length than the part")
        name = name_of(description.kind, description.key)
        try:
            with self._opened(name) as (descriptor, found):
                if found != description:  # the caller has an old description, or the index has
                    self._refuse("foreign")
                    self._renew_entry(found)
                    return False
                part_format.read_data(self._system, descriptor, view, description.checksum)
        except FileNotFoundError:
            self._forget(description.kind, description.key)
            return False
        except Newer:
            self._refuse("newer")
            return False
        except (Damaged, OSError) as error:
            if isinstance(error, OSError) and error.errno in _TRANSIENT:
                raise
            self._quarantine(name, error)
            return False
        self._touch(description.kind, description.key)
        return True

    def remove(self, kind: str, key: bytes) -> bool:
        """Returns whether the part was there. Raises OSError."""
        with self._folder.locked():
            return self._remove(kind, key)

    def stats(self) -> DiskStats:
        with self._folder.locked():
            count = self._with_index(lambda index: index.count())
            return DiskStats(
                count,
                self._occupied(),
                self._limit,
                self._written,
                self.evicted,
                self._quarantined,
            )

    def quarantined(self) -> set[tuple[str, bytes]]:
        """Returns kinds and keys of what is in quarantine now."""
        names = self._system.names(self._folder.quarantine)
        parsed = (part_format.parse_name(name.rpartition(".")[0]) for name in names)
        return set(filter(None, parsed))

    def verify(self, told: Callable[[int, int], object] = lambda done, names: None) -> Report:
        """Reads every file of the folder, and quarantines what is not right.

        ``told`` is called with how many files have been read, and how many there are.
        """
        right = newer = 0
        before = self._quarantined
        with self._folder.locked():
            self._with_index(self._reconcile)
            names = self._system.names(self._folder.parts)
        for done, name in enumerate(names):
            told(done, len(names))
            try:
                with self._opened(name) as (descriptor, found):
                    part_format.check_data(self._system, descriptor, found)
                right += 1
            except FileNotFoundError:
                continue
            except Newer:
                newer += 1
            except (Damaged, OSError) as error:
                self._quarantine(name, error)
        return Report(right, self._quarantined - before, newer)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[tuple[int, Description]]:
        """Opens a part's file and reads its header. Raises OSError, Damaged, Newer."""
        descriptor = part_format.open_part(self._system, self._folder.part(name))
        try:
            found = part_format.read_header(self._system, descriptor)
            if name_of(found.kind, found.key) != name:
                raise Damaged("the file has the name of another")
            # Somebody may have made a file of any length that has no blocks.
            if HEADER_BYTES + found.nbytes > self._largest:
                raise Damaged("the file is longer than the folder may be large")
            yield descriptor, found
        finally:
            self._system.close(descriptor)

    # ---- With the folder's lock

    def _is_there(self, description: Description) -> bool:
        name = name_of(description.kind, description.key)
        found = self._describe(name)
        if found is None:
            return False
        part, allocated = found
        if part != description:
            self._to_quarantine(name, "another part has the same kind and key")
            return False
        if self._with_index(lambda index: index.find(part.kind, part.key)) != part:
            self._with_index(lambda index: index.put([(part, allocated, time.time_ns())]))
        return True

    def _describe(self, name: str) -> tuple[Description, int] | None:
        """Returns what a file's header says, and the bytes that the file occupies; None if there is
        no right file. Quarantines a file that is not right."""
        try:
            with self._opened(name) as (descriptor, found):
                allocated = self._system.fstat(descriptor).st_blocks * BLOCK
        except FileNotFoundError:
            return None
        except (Damaged, OSError) as error:
            if isinstance(error, OSError) and error.errno in _TRANSIENT:
                raise
            self._to_quarantine(name, error)
            return None
        return found, allocated

    def _reserve(self, description: Description) -> tuple[str, int] | None:
        self._folder.clean_aside()
        self._flush_touches()
        size = HEADER_BYTES + description.nbytes
        # One page more for the file's last page, and one for the file system's list of its extents.
        need = size + 2 * 4096
        if not self._make_room(need, description.kind, description.key, description.parent):
            return None
        return self._folder.new_aside(size)

    def _make_room(self, need: int, kind: str, key: bytes, parent: bytes) -> bool:
        """Evicts until ``need`` bytes are free. Returns False if that is not possible."""
        over = self._occupied() + need + GROWTH - self._limit
        if over > 0:
            self._folder.empty_quarantine()
            over = self._occupied() + need + GROWTH - self._limit
        if need and over > self._with_index(lambda index: index.allocated()):
            return False
        noted = self._with_index(lambda index: index.pinned()) if over > 0 else set()
        while over > 0:
            victim = self._with_index(
                lambda index: index.evictable(kind, key, parent, self._pinned, noted)
            )
            if victim is None:
                return False
            before = self._with_index(lambda index: index.allocated())
            self._remove(*victim)
            over -= before - self._with_index(lambda index: index.allocated())
            self.evicted += 1
        return True

    def _publish(self, description: Description, path: str, descriptor: int) -> None:
        part = self._folder.part(name_of(description.kind, description.key))
        allocated = self._system.fstat(descriptor).st_blocks * BLOCK
        # The index first: a killed process may leave it with one entry too many, never one too few.
        self._with_index(lambda index: index.put([(description, allocated, time.time_ns())]))
        linked = False
        try:
            try:
                self._system.link(path, part)
                linked = True
            except FileExistsError:
                if not self._is_there(description):
                    self._with_index(lambda i: i.put([(description, allocated, time.time_ns())]))
                    self._system.link(path, part)
                    linked = True
            self._system.sync_folder(self._folder.parts)
        except BaseException:
            if linked or occupied(part) == 0:
                self._remove(description.kind, description.key)
            raise
        self._written += linked
        self.written_bytes += linked * (HEADER_BYTES + description.nbytes)

    def _remove(self, kind: str, key: bytes) -> bool:
        there = True
        try:
            self._system.unlink(self._folder.part(name_of(kind, key)))
        except FileNotFoundError:
            there = False
        except IsADirectoryError:
            remove_tree(self._folder.part(name_of(kind, key)))
        self._with_index(lambda index: index.delete(kind, key))
        return there

    def _to_quarantine(self, name: str, reason: object) -> None:
        self._folder.to_quarantine(name, reason)
        self._quarantined += 1
        self._refuse("damaged")
        parsed = part_format.parse_name(name)
        if parsed is not None:
            self._with_index(lambda index: index.delete(*parsed))

    def _reconcile(self, index: Index) -> None:
        """Makes the index agree with the names in the folder; reads only headers it lacks."""
        known = {name_of(kind, key): (kind, key) for kind, key in index.add_up()}
        names = set(self._system.names(self._folder.parts))
        for name in known.keys() - names:
            index.delete(*known[name])
        found: list[tuple[Description, int, int]] = []
        self._newer = 0
        for name in names - known.keys():
            try:
                described = self._describe(name)
            except Newer:
                self._newer += occupied(self._folder.part(name))
                continue
            if described is not None:
                used = self._system.lstat(self._folder.part(name)).st_mtime_ns
                found.append((*described, used))
            if len(found) >= 256:
                index.put(found)
                found.clear()
        index.put(found)

    def _occupied(self) -> int:
        parts = self._with_index(lambda index: index.allocated())
        self.latest_occupied = parts + self._newer + self._folder.occupied_beside_parts()
        return self.latest_occupied

    def _flush_touches(self) -> None:
        uses = [(used, kind, key) for (kind, key), used in self._touched.items()]
        self._touched.clear()
        if uses:
            self._with_index(lambda index: index.touch(uses))

    # ---- By any thread

    def _refuse(self, reason: Reason) -> None:
        with self._folder.in_thread():
            self.refused[reason] += 1

    def _touch(self, kind: str, key: bytes) -> None:
        with self._folder.in_thread():
            self.use(kind, key)
            if len(self._touched) < _TOUCHES:
                return
        with self._folder.locked():
            self._flush_touches()

    def _forget(self, kind: str, key: bytes) -> None:
        with self._folder.locked():
            if occupied(self._folder.part(name_of(kind, key))) == 0:
                self._with_index(lambda index: index.delete(kind, key))

    def _renew_entry(self, description: Description) -> None:
        with self._folder.locked():
            path = self._folder.part(name_of(description.kind, description.key))
            entry = (description, occupied(path), time.time_ns())
            self._with_index(lambda index: index.put([entry]))

    def _quarantine(self, name: str, reason: object) -> None:
        with self._folder.locked():
            self._to_quarantine(name, reason)

    def _with_index(self, use: Callable[[Index], T]) -> T:
        """Calls ``use`` with the index, which is rebuilt from the files if it is lost or corrupt.

        Raises OSError.
        """
        with self._folder.in_thread():
            try:
                if self._index is not None and self._index.is_current():
                    return use(self._index)
            except BROKEN as error:
                _raise_if_full(error)
                log.warning("the index is rebuilt: %s", error)
                return self._renew(use, corrupt=True)
            return self._renew(use, corrupt=False)

    def _renew(self, use: Callable[[Index], T], *, corrupt: bool) -> T:
        with self._folder.locked():
            old, self._index = self._index, None
            if old is not None:
                # Another process may have rebuilt it already.
                corrupt = corrupt and old.is_current()
                old.close()
            try:
                if not corrupt:
                    try:
                        return self._open_index(use)
                    except BROKEN as error:
                        _raise_if_full(error)
                        log.warning("the index is rebuilt: %s", error)
                        if self._index is not None:
                            self._index.close()
                for suffix in SUFFIXES:
                    remove_tree(self._folder.index + suffix)
                return self._open_index(use)
            except BROKEN as error:
                raise OSError(errno.EIO, f"the index: {error}") from error

    def _open_index(self, use: Callable[[Index], T]) -> T:
        new = not os.path.lexists(self._folder.index)
        self._index = Index(self._folder.index)
        if new:
            self._reconcile(self._index)
        return use(self._index)


def _raise_if_full(error: Exception) -> None:
    if "full" in str(error):
        raise OSError(errno.ENOSPC, f"the index: {error}") from error
