"""What must be closed before the interpreter ends, while threads can still be used."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class _Closable(Protocol):
    def close(self) -> None: ...


_open: weakref.WeakSet[_Closable] = weakref.WeakSet()
_lock = threading.Lock()
_watching = False


def close_at_exit(what: _Closable) -> None:
    """Calls ``what.close()`` when the main thread has ended, unless ``what`` was collected.

    Functions of the module atexit are called too late: the interpreter first waits for all threads
    that are no daemons, and the threads of an event loop that runs end only with the loop.
    """
    global _watching
    _open.add(what)
    with _lock:
        if not _watching:
            threading.Thread(target=_watch, name="kvferry exit", daemon=False).start()
            _watching = True


def _watch() -> None:
    threading.main_thread().join()
    for each in list(_open):
        each.close()


def _start_anew() -> None:
    global _lock, _watching
    _lock, _watching = threading.Lock(), False
    _open.clear()


# A forked child has neither the watching thread nor those that are to be ended.
os.register_at_fork(after_in_child=_start_anew)
