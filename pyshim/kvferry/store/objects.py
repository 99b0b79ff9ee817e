"""The functions that the remote tier needs of an object store, and obstore behind them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol, cast

import numpy

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PIECE_BYTES = 8 << 20
"""The bytes of one request for an object that is larger."""

_SINGLE_PUT = 5 * PIECE_BYTES
"""An object of at most this size is put by one request. A multipart upload takes two requests more,
and on the servers that were measured more time."""
_HEADS = 16
"""HEAD requests in flight for one call of ``sizes``."""
_BEHIND_THE_END = "416 Range Not Satisfiable"
"""A part of the message of obstore's error for this case, which has no type of its own."""


# --8<-- [start:interface]
class Unavailable(Exception):
    """The object store failed or was not reached: the same call may succeed later."""


class Refused(Exception):
    """The object store will not do this, however often it is asked: such as wrong credentials."""


class Full(Refused):
    """The object store has no room now. Reads go on."""


class Objects(Protocol):
    """Objects of bytes that have names, such as in a bucket.

    These four functions are all that ``Store(remote=...)`` uses. Each blocks, and is called by
    several threads at a time. Names have the characters ``a-z``, ``0-9`` and ``.``. A function that
    raises Unavailable may be called again; any other exception ends the attempt, and counts as a
    failure of the object store unless it is Full. A function that hangs keeps its thread: it should
    have a timeout of its own.
    """

    def put(self, name: str, nbytes: int, pieces: Iterator[memoryview]) -> None:
        """Makes an object of the pieces, of ``nbytes`` in all, in place of an older one.

        Nobody ever sees a part of it. If ``pieces`` raises, the upload is aborted and this raises.
        """

    def get(self, name: str, offset: int, memories: Sequence[memoryview]) -> int:
        """Reads from an offset on and fills the memories, one after the other.

        Returns how many bytes were read: fewer than asked for where the object ends. Raises
        FileNotFoundError where there is no such object.
        """

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """Returns how many bytes each object has; None for an object that does not exist."""

    def delete(self, names: Sequence[str]) -> None:
        """Removes objects. Those that do not exist are no error."""


# --8<-- [end:interface]


class ObstoreObjects:
    """Objects in S3, Google Cloud Storage, Azure or what else ``obstore`` speaks.

    Needs ``pip install kvferry[remote]``. Uses obstore's blocking functions, so that it works on
    every event loop, and nothing is copied on the loop's thread.
    """

    def __init__(self, store: ObjectStore, puts: ObjectStore | None = None) -> None:
        """``puts`` is the same object store, for puts alone; by default ``store``."""
        import obstore

        self._obstore = obstore
        self._store = store
        self._puts = puts or store
        self._threads = ThreadPoolExecutor(_HEADS, "kvferry-heads")

    @classmethod
    def from_url(
        cls, url: str, *, timeout: float = 5.0, put_timeout: float = 15.0
    ) -> ObstoreObjects:
        """``url`` is as for ``obstore.store.from_url``, which takes credentials, endpoint and
        region from the environment. Of the client's options only ``..._ALLOW_HTTP`` is taken from
        there.

        The timeouts are for one request, in seconds. obstore then ends the request, which the tier
        has left before: until then it holds a thread, and the end of the process waits for it.

        Raises ImportError; ValueError for a URL that obstore does not take.
        """
        try:
            from obstore.exceptions import BaseError
        except ImportError as problem:
            raise ImportError("a remote tier needs obstore: pip install 'kvferry[remote]'") from (
                problem
            )
        try:
            return cls(_store_of(url, timeout), _store_of(url, put_timeout))
        except BaseError as problem:
            raise ValueError(f"remote: {first_line(problem)}") from None

    def put(self, name: str, nbytes: int, pieces: Iterator[memoryview]) -> None:
        # obstore sends from the memory of the pieces. It aborts a multipart upload where the
        # iterator raises. A piece that is still in flight then may be stored after the abort, and
        # stay: so one is in flight at a time, and none when _drained raises.
        multipart = nbytes > _SINGLE_PUT
        try:
            self._obstore.put(
                self._puts,
                name,
                _drained(pieces) if multipart else list(pieces),
                use_multipart=multipart,
                chunk_size=PIECE_BYTES,
                max_concurrency=1,
            )
        except Exception as problem:
            raise self._translated(problem) from None

    def get(self, name: str, offset: int, memories: Sequence[memoryview]) -> int:
        try:
            found = memoryview(
                self._obstore.get_range(
                    self._store, name, start=offset, length=sum(map(len, memories))
                )
            )
        except Exception as problem:
            if _BEHIND_THE_END in str(problem):
                return 0
            raise self._translated(problem) from None
        begin = 0
        for memory in memories:
            piece = found[begin : begin + len(memory)]
            # numpy copies without the interpreter's lock.
            numpy.copyto(
                numpy.frombuffer(memory[: len(piece)], numpy.uint8),
                numpy.frombuffer(piece, numpy.uint8),
            )
            begin += len(piece)
        return begin

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        return list(self._threads.map(self._size, names))

    def _size(self, name: str) -> int | None:
        try:
            return self._obstore.head(self._store, name)["size"]
        except FileNotFoundError:
            return None
        except Exception as problem:
            raise self._translated(problem) from None

    def delete(self, names: Sequence[str]) -> None:
        try:
            self._obstore.delete(self._store, list(names))
        except FileNotFoundError:
            pass
        except Exception as problem:
            raise self._translated(problem) from None

    def _translated(self, problem: Exception) -> Exception:
        errors = self._obstore.exceptions
        text = first_line(problem)
        if isinstance(problem, FileNotFoundError):
            return FileNotFoundError(text)
        if isinstance(problem, (errors.GenericError, errors.JoinError)):
            return Unavailable(text)
        if isinstance(problem, errors.BaseError):
            return Refused(text)
        return problem


def _drained(pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    """Gives an empty piece before it raises an error of ``pieces``. Before obstore takes that
    piece, it waits for the piece in flight."""
    try:
        yield from pieces
    except Exception:
        yield memoryview(b"")
        raise


def _store_of(url: str, timeout: float) -> ObjectStore:
    from obstore.store import from_url

    seconds = timedelta(seconds=timeout)
    return from_url(
        url,
        # The tier tries again itself.
        retry_config={"max_retries": 0, "retry_timeout": seconds},
        # obstore takes no client option from the environment where any is given here.
        client_options={
            "timeout": seconds,
            "connect_timeout": seconds,
            "allow_http": _http_allowed(),
        },
    )


def _http_allowed() -> bool:
    """Whether the environment allows a connection without TLS, by a name that obstore takes."""
    names = [f"{cloud}ALLOW_HTTP" for cloud in ("", "AWS_", "AZURE_", "GOOGLE_")]
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def first_line(problem: BaseException) -> str:
    """Returns the first line of a message. obstore's messages go on for a page."""
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def objects_of(remote: str | ObjectStore | Objects) -> Objects:
    """Returns the object store that a program has named, or given, as ``Store(remote=...)``.

    Raises TypeError, and as ``ObstoreObjects.from_url``.
    """
    if isinstance(remote, str):
        return ObstoreObjects.from_url(remote)
    if hasattr(remote, "sizes"):  # which obstore's own stores have not
        return cast("Objects", remote)
    if not hasattr(remote, "put"):
        raise TypeError(f"remote is a URL or an object store, not {type(remote).__name__}")
    return ObstoreObjects(remote)
