"""Spans of what a store does, for a trace.

``recorded`` stands at calls of the store, ``traced`` at what they do inside. A call whose store
records puts a lane into a context variable; what it calls, also in tasks that it starts, finds the
lane there. Without one nothing is recorded.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

Arguments = dict[str, int | str]

CAPACITY = 65_536
"""Spans that a store keeps, as many as an engine keeps pieces."""


class TraceSpan(NamedTuple):
    """Something that a store did. Times are nanoseconds of ``time.monotonic_ns()``."""

    name: str
    lane: str
    """Spans of one lane are one within the other, or one after the other."""
    begin_ns: int
    end_ns: int
    arguments: Arguments


class Recorder:
    """Keeps the latest spans. For the thread of the event loop."""

    def __init__(self) -> None:
        self._spans: deque[TraceSpan] = deque(maxlen=CAPACITY)
        self._free: dict[str, list[int]] = {}
        self._lanes: dict[str, int] = {}

    def add(self, span: TraceSpan) -> None:
        self._spans.append(span)

    def take(self) -> list[TraceSpan]:
        """Returns the spans that have ended, in the order of their ends, and forgets them."""
        spans = list(self._spans)
        self._spans.clear()
        return spans

    @contextlib.contextmanager
    def lane(self, kind: str) -> Iterator[str]:
        """While this is entered, spans of this task are in a lane that no other task has."""
        free = self._free.setdefault(kind, [])
        if free:
            number = heapq.heappop(free)
        else:
            number = self._lanes[kind] = self._lanes.get(kind, 0) + 1
        name = f"{kind} {number}"
        token = _current.set((self, name))
        try:
            yield name
        finally:
            _current.reset(token)
            heapq.heappush(free, number)

    @contextlib.contextmanager
    def span(self, name: str, lane: str, arguments: Arguments) -> Iterator[None]:
        begin = time.monotonic_ns()
        try:
            yield
        except BaseException as problem:
            arguments = {**arguments, "failed": type(problem).__name__}
            raise
        finally:
            self.add(TraceSpan(name, lane, begin, time.monotonic_ns(), arguments))


_current: ContextVar[tuple[Recorder, str] | None] = ContextVar("kvferry store trace", default=None)


def recorded(
    name: str,
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Records a method of an object that has a ``recorder``, in a lane of its own."""

    def decorate(
        method: Callable[P, Coroutine[Any, Any, T]],
    ) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(method)
        async def call(*arguments: P.args, **keywords: P.kwargs) -> T:
            owner: Any = arguments[0]
            recorder: Recorder | None = owner.recorder
            if recorder is None:
                return await method(*arguments, **keywords)
            with recorder.lane("store"):
                return await traced(name)(method)(*arguments, **keywords)

        return call

    return decorate


def traced(
    name: str, told: Callable[..., Arguments] = lambda *_, **__: {}, *, apart: bool = False
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Records a method where the call of a store that it is part of is recorded.

    ``told`` is given the method's arguments, and returns those of the span. ``apart``: several run
    at a time, so that each needs a lane of its own.
    """

    def decorate(
        method: Callable[P, Coroutine[Any, Any, T]],
    ) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(method)
        async def call(*arguments: P.args, **keywords: P.kwargs) -> T:
            if (current := _current.get()) is None:
                return await method(*arguments, **keywords)
            recorder, lane = current
            with (
                recorder.lane("part") if apart else contextlib.nullcontext(lane) as lane,
                recorder.span(name, lane, told(*arguments, **keywords)),
            ):
                return await method(*arguments, **keywords)

        return call

    return decorate


def part_told(_self: object, *arguments: Any, **_: object) -> Arguments:
    """Of a method that has a Description among its arguments: what part that is."""
    part = next(each for each in arguments if hasattr(each, "nbytes") and hasattr(each, "kind"))
    return {
        "kind": part.kind,
        "begin": part.begin,
        "end": part.end,
        "bytes": part.nbytes,
        "key": part.key.hex()[:16],
    }
