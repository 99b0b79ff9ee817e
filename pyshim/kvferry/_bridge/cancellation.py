"""Awaiting to the end what a cancellation or a signal breaks off."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio


async def see_through(attempt: Callable[[], Awaitable[None]], on_break: Callable[[], None]) -> None:
    """Awaits ``attempt()`` to its end, also where the awaiting is broken off.

    Cancellation, or what a signal handler raises, calls ``on_break``, and goes on after the end of
    a second attempt. Cancellation doesn't break that off again; another signal's exception does.
    """
    try:
        await attempt()
    except GeneratorExit:
        raise
    except BaseException as first:
        try:
            on_break()
        finally:
            on_break()
        latest = await _last_cancellation_until(attempt)
        if latest is None or not isinstance(first, anyio.get_cancelled_exc_class()):
            raise
        # Of several cancellations the latest counts. Not kept in a variable when raised: its
        # traceback would keep this frame, the frame the exception, and both the transfer's memory.
        try:
            raise latest
        finally:
            del latest


async def _last_cancellation_until(
    attempt: Callable[[], Awaitable[None]],
) -> BaseException | None:
    """Makes attempts until one ends uncancelled; returns the latest cancellation that came.

    The shield holds off cancel scopes; asyncio's ``Task.cancel()`` comes through it.
    """
    latest = None
    ended = False
    with anyio.CancelScope(shield=True):
        while not ended:
            try:
                await attempt()
                ended = True
            except anyio.get_cancelled_exc_class() as cancellation:
                latest = cancellation
    try:
        return latest
    finally:
        del latest  # as above
