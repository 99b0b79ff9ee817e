"""The index of a folder: an SQLite file that says which parts there are.

The index only chooses files: what is read is verified against the file's own header. The types of
its values are checked, so that a hostile index is rebuilt. A process changes the index only while
it holds the folder's lock. SQLite's write-ahead log needs memory that processes share, so the
folder must not lie on a network file system.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import stat
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

from . import part_format
from .description import Description

BROKEN = (sqlite3.Error, UnicodeDecodeError)
"""What an index raises that must be made anew. The second is for messages of SQLite that quote a
file."""

_SCHEMA = """
CREATE TABLE part (
    kind TEXT NOT NULL, key BLOB NOT NULL, parent BLOB NOT NULL, begin INTEGER NOT NULL,
    end INTEGER NOT NULL, root BLOB NOT NULL, nbytes INTEGER NOT NULL, checksum BLOB NOT NULL,
    allocated INTEGER NOT NULL, used INTEGER NOT NULL, PRIMARY KEY (kind, key)) WITHOUT ROWID;
CREATE INDEX part_parent ON part (parent, end);
CREATE INDEX part_used ON part (used);
CREATE TABLE total (allocated INTEGER NOT NULL);
INSERT INTO total VALUES (0);
CREATE TRIGGER part_added AFTER INSERT ON part BEGIN
    UPDATE total SET allocated = allocated + new.allocated; END;
CREATE TRIGGER part_removed AFTER DELETE ON part BEGIN
    UPDATE total SET allocated = allocated - old.allocated; END;
PRAGMA user_version = 2;
"""
_COLUMNS = "kind, key, parent, begin, end, root, nbytes, checksum"
# A block that another part builds on is useful as long as that part is; so is the note of a layout.
_EVICTABLE = """SELECT kind, key FROM part AS p WHERE kind || hex(key) <> ? AND key <> ?
    AND (kind = 'checkpoint' OR NOT EXISTS (SELECT 1 FROM part AS c WHERE c.parent = p.key
    AND NOT (c.key = p.key AND c.kind = p.kind))) ORDER BY used"""
# Jumps from one end to the next: thousands of parts may have one parent and one end.
_ENDS = """WITH RECURSIVE found(end) AS (SELECT max(end) FROM part WHERE parent = ?1 UNION ALL
    SELECT (SELECT max(end) FROM part WHERE parent = ?1 AND end < found.end) FROM found
    WHERE found.end IS NOT NULL) SELECT end FROM found WHERE end IS NOT NULL"""
_OLDEST = "SELECT kind, key FROM part WHERE kind || hex(key) <> ? AND key <> ? ORDER BY used"

# The pins, what has the key of one or of something before it, and the notes of their roots. CROSS
# JOIN tells SQLite which table comes first: it would read all parts.
_PINNED = """WITH RECURSIVE needed(key) AS (
    SELECT key FROM part WHERE kind = 'pin' UNION SELECT root FROM part WHERE kind = 'pin'
    UNION SELECT p.parent FROM part AS p JOIN needed ON p.key = needed.key
    WHERE p.kind IN ('block', 'checkpoint'))
    SELECT p.kind, p.key FROM needed CROSS JOIN part AS p ON p.key = needed.key
    WHERE p.kind IN ('block', 'checkpoint', 'layout', 'pin')"""


_TYPES = (str, bytes, bytes, int, int, bytes, int)
SUFFIXES = ("", "-wal", "-shm")
"""Of the files of an index."""
_MOST = (1 << 62) - 1


class Index:
    """One connection. Only one thread may use it at a time."""

    def __init__(self, path: str) -> None:
        """Raises one of BROKEN if the file is not such an index."""
        self.path = path
        for suffix in SUFFIXES:
            _check_regular(path + suffix)
        # For its owner only. It is opened here only if it is new: closing a descriptor of the file
        # would end SQLite's locks on it.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        self.inode = os.stat(path).st_ino
        self._sql = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        try:
            for setting in (
                "trusted_schema = OFF",
                "cell_size_check = ON",
                "journal_mode = WAL",
                "synchronous = NORMAL",
                "wal_autocheckpoint = 16",
                # KiB: what leads to the rows of some millions of parts
                "cache_size = -8192",
            ):
                self._sql.execute(f"PRAGMA {setting}").fetchall()
            version = self._sql.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self._sql.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            elif version != 2:
                raise sqlite3.DatabaseError(f"an index of version {version}")
            if _schema(self._sql) != _right_schema():
                raise sqlite3.DatabaseError("the tables are others")
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

    def ends(self, parent: bytes) -> list[int]:
        """Where the parts end that have this parent, each end once."""
        return [end for (end,) in self._sql.execute(_ENDS, (parent,)) if type(end) is int]

    def after(self, kind: str, key: bytes, count: int) -> list[Description]:
        """Returns the parts that follow this one, in the order of kind and key."""
        return self._rows("(kind, key) > (?, ?) ORDER BY kind, key LIMIT ?", kind, key, count)

    def add_up(self) -> list[tuple[str, bytes]]:
        """Computes anew what the parts occupy. Returns their kinds and keys."""
        with self.transaction():
            rows = self._sql.execute("SELECT kind, key, allocated FROM part").fetchall()
            total = 0
            for _, _, allocated in rows:
                if type(allocated) is not int or allocated < 0:
                    raise sqlite3.DatabaseError("a row has a wrong size")
                total += allocated
            self._sql.execute("DELETE FROM total")
            self._sql.execute("INSERT INTO total VALUES (?)", (min(total, _MOST),))
        return [_checked_id(row[:2]) for row in rows]

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
        self, kind: str, key: bytes, parent: bytes, *pinned: Container[tuple[str, bytes]]
    ) -> tuple[str, bytes] | None:
        """Returns the part to evict first: neither this one, nor its parent, nor a pinned one."""
        for query in (_EVICTABLE, _OLDEST):
            rows = self._sql.execute(query, (kind + key.hex().upper(), parent))
            with contextlib.closing(rows):
                for row in map(_checked_id, rows):
                    if not any(row in each for each in pinned):
                        return row
        return None

    def pinned(self) -> set[tuple[str, bytes]]:
        """Returns what the pins in the folder need."""
        return set(self._sql.execute(_PINNED))

    def allocated(self) -> int:
        """Bytes that the parts occupy."""
        return self._number("SELECT allocated FROM total")

    def count(self) -> int:
        return self._number("SELECT count(*) FROM part")

    def _number(self, query: str) -> int:
        rows = self._sql.execute(query).fetchall()
        if len(rows) != 1 or type(rows[0][0]) is not int or rows[0][0] < 0:
            raise sqlite3.DatabaseError("a number is wrong")
        return rows[0][0]

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
        rows = self._sql.execute(f"SELECT {_COLUMNS} FROM part WHERE {where}", values)
        return [_checked(*row) for row in rows]


def _checked_id(row: tuple[Any, Any]) -> tuple[str, bytes]:
    """Kind and key of a row. They are part of a path."""
    kind, key = row
    if type(kind) is not str or type(key) is not bytes or not part_format.is_id(kind, key):
        raise sqlite3.DatabaseError("a row has no right kind and key")
    return kind, key


def _checked(
    kind: Any, key: Any, parent: Any, begin: Any, end: Any, root: Any, nbytes: Any, checksum: Any
) -> Description:
    types = (type(kind), type(key), type(parent), type(begin), type(end), type(root), type(nbytes))
    if types != _TYPES or type(checksum) is not bytes or len(checksum) != 8:
        raise sqlite3.DatabaseError("a row has values of other types")
    found = Description(
        kind, key, parent, begin, end, root, nbytes, int.from_bytes(checksum, "big")
    )
    try:
        part_format.check(found)
    except ValueError as error:
        raise sqlite3.DatabaseError(f"a row: {error}") from None
    return found


def _check_regular(path: str) -> None:
    """SQLite would follow a link, and wait for the other end of a pipe."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise sqlite3.DatabaseError("a file of the index is no regular file")


def _schema(sql: sqlite3.Connection) -> set[tuple[object, ...]]:
    """Views and triggers of somebody else would run in the statements of this process."""
    return set(sql.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema"))


@functools.cache
def _right_schema() -> set[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as sql:
        sql.executescript(_SCHEMA)
        return _schema(sql)
