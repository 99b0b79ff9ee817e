"""Awaiting something to its end although the task is cancelled meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio


async def await_to_end(
    attempt: Callable[[], Awaitable[None]], on_break: Callable[[], None]
) -> None:
    """Awaits ``attempt()``, and awaits it again if a cancellation or a signal interrupts it.

    If a cancellation, or the exception of a signal handler, interrupts the first attempt, this
    calls ``on_break``, makes the second attempt, and raises that exception when the second attempt
    has ended. A further cancellation does not end the second attempt; the exception of a further
    signal does.
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
        # Of several cancellations the latest is raised. No variable keeps it: its traceback would
        # keep this frame alive, the frame the exception, and both the memory of the transfer.
        try:
            raise latest
        finally:
            del latest


async def _last_cancellation_until(
    attempt: Callable[[], Awaitable[None]],
) -> BaseException | None:
    """Awaits attempts until one is not cancelled; returns the latest cancellation, or None.

    The shield keeps cancel scopes out, but not asyncio's ``Task.cancel()``.
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
