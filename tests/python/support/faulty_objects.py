"""An object store in memory, of which tests say what fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence


class FaultyObjects:
    """Has the four functions of ``kvferry.store.objects.Objects``."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.calls = 0
        self.fault: Callable[[int], None] = lambda call: None
        """Called with the number of each call, before it; may raise."""
        self.change: Callable[[int, bytes], bytes] = lambda call, data: data
        """Changes what a call of ``get`` reads."""
        self._lock = threading.Lock()

    def _call(self) -> int:
        with self._lock:
            self.calls += 1
            call = self.calls
        self.fault(call)
        return call

    def put(self, name: str, nbytes: int, pieces: Iterator[memoryview]) -> None:
        self._call()
        data = b"".join(pieces)
        assert len(data) == nbytes
        self.objects[name] = data

    def get(self, name: str, offset: int, memories: Sequence[memoryview]) -> int:
        call = self._call()
        if name not in self.objects:
            raise FileNotFoundError(name)
        data = self.change(call, self.objects[name][offset:])
        count = 0
        for memory in memories:
            piece = data[count : count + len(memory)]
            memory[: len(piece)] = piece
            count += len(piece)
        return count

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        self._call()
        return [len(self.objects[name]) if name in self.objects else None for name in names]

    def delete(self, names: Sequence[str]) -> None:
        self._call()
        for name in names:
            self.objects.pop(name, None)
