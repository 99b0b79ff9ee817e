"""The index of a folder: an SQLite file that says which parts there are.

The index only chooses files: what is read is verified against the file's own header. A process
changes the index only while it holds the folder's lock. SQLite's write-ahead log needs memory that
processes share, so the folder must not lie on a network file system.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import cast

from .description import Description

_SCHEMA = """
CREATE TABLE part (
    kind TEXT NOT NULL, key BLOB NOT NULL, parent BLOB NOT NULL, begin INTEGER NOT NULL,
    end INTEGER NOT NULL, root BLOB NOT NULL, nbytes INTEGER NOT NULL, checksum BLOB NOT NULL,
    allocated INTEGER NOT NULL, used INTEGER NOT NULL, PRIMARY KEY (kind, key)) WITHOUT ROWID;
CREATE INDEX part_parent ON part (parent);
CREATE INDEX part_used ON part (used);
CREATE TABLE total (allocated INTEGER NOT NULL);
INSERT INTO total VALUES (0);
CREATE TRIGGER part_added AFTER INSERT ON part BEGIN
    UPDATE total SET allocated = allocated + new.allocated; END;
CREATE TRIGGER part_removed AFTER DELETE ON part BEGIN
    UPDATE total SET allocated = allocated - old.allocated; END;
PRAGMA user_version = 1;
"""
_COLUMNS = "kind, key, parent, begin, end, root, nbytes, checksum"
# A block that another part builds on is useful as long as that part is; so is the note of a layout.
_EVICTABLE = """SELECT kind, key FROM part AS p WHERE kind || hex(key) <> ? AND key <> ?
    AND (kind = 'checkpoint' OR NOT EXISTS (SELECT 1 FROM part AS c WHERE c.parent = p.key
    AND NOT (c.key = p.key AND c.kind = p.kind))) ORDER BY used"""
_OLDEST = "SELECT kind, key FROM part WHERE kind || hex(key) <> ? AND key <> ? ORDER BY used"


class Index:
    """One connection. Only one thread may use it at a time."""

    def __init__(self, path: str) -> None:
        """Raises sqlite3.Error if the file is not such an index."""
        self.path = path
        # For its owner only. It is opened here only if it is new: closing a descriptor of the file
        # would end SQLite's locks on it.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        self.inode = os.stat(path).st_ino
        self._sql = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            for setting in (
                "journal_mode = WAL",
                "synchronous = NORMAL",
                "wal_autocheckpoint = 16",
            ):
                self._sql.execute(f"PRAGMA {setting}").fetchall()
            version = self._sql.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self._sql.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            elif version != 1:
                raise sqlite3.DatabaseError(f"an index of version {version}")
        except BaseException:
            self._sql.close()
            raise

    def close(self) -> None:
        self._sql.close()

    def is_current(self) -> bool:
        """Whether the file at the path is still the one that is open."""
        try:
            return os.stat(self.path).st_ino == self.inode
        except FileNotFoundError:
            return False

    def find(self, kind: str, key: bytes) -> Description | None:
        rows = self._rows("kind = ? AND key = ?", kind, key)
        return rows[0] if rows else None

    def find_all(self, kind: str, keys: Sequence[bytes]) -> list[Description]:
        places = ",".join("?" * len(keys))
        return self._rows(f"kind = ? AND key IN ({places})", kind, *keys)

    def children(self, parent: bytes) -> list[Description]:
        return self._rows("parent = ?", parent)

    def after(self, kind: str, key: bytes, count: int) -> list[Description]:
        """Returns the parts that follow this one, in the order of kind and key."""
        return self._rows("(kind, key) > (?, ?) ORDER BY kind, key LIMIT ?", kind, key, count)

    def names(self) -> Iterator[tuple[str, bytes]]:
        return iter(self._sql.execute("SELECT kind, key FROM part").fetchall())

    def put(self, parts: Iterable[tuple[Description, int, int]]) -> None:
        """Adds or replaces parts: each is a description, the bytes that its file occupies, and the
        time of its last use."""
        with self.transaction():
            for d, allocated, used in parts:
                self._delete(d.kind, d.key)
                checksum = d.checksum.to_bytes(8, "big")
                row = (d.kind, d.key, d.parent, d.begin, d.end, d.root, d.nbytes, checksum)
                self._sql.execute(
                    "INSERT INTO part VALUES (?,?,?,?,?,?,?,?,?,?)", (*row, allocated, used)
                )

    def delete(self, kind: str, key: bytes) -> None:
        with self.transaction():
            self._delete(kind, key)

    def touch(self, uses: Iterable[tuple[int, str, bytes]]) -> None:
        with self.transaction():
            self._sql.executemany("UPDATE part SET used = ? WHERE kind = ? AND key = ?", uses)

    def evictable(
        self, kind: str, key: bytes, parent: bytes, pinned: Container[tuple[str, bytes]]
    ) -> tuple[str, bytes] | None:
        """Returns the part to evict first: neither this one, nor its parent, nor a pinned one."""
        for query in (_EVICTABLE, _OLDEST):
            rows = self._sql.execute(query, (kind + key.hex().upper(), parent))
            with contextlib.closing(rows):
                for row in rows:
                    if row not in pinned:
                        return cast("tuple[str, bytes]", row)
        return None

    def allocated(self) -> int:
        return cast("int", self._sql.execute("SELECT allocated FROM total").fetchone()[0])

    def count(self) -> int:
        return cast("int", self._sql.execute("SELECT count(*) FROM part").fetchone()[0])

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        self._sql.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._sql.execute("COMMIT")
        except BaseException:
            if self._sql.in_transaction:
                self._sql.execute("ROLLBACK")
            raise

    def _delete(self, kind: str, key: bytes) -> None:
        self._sql.execute("DELETE FROM part WHERE kind = ? AND key = ?", (kind, key))

    def _rows(self, where: str, *values: object) -> list[Description]:
        rows = self._sql.execute(f"SELECT {_COLUMNS} FROM part WHERE {where}", values).fetchall()
        return [
            Description(
                kind, key, parent, begin, end, root, nbytes, int.from_bytes(checksum, "big")
            )
            for kind, key, parent, begin, end, root, nbytes, checksum in rows
        ]
