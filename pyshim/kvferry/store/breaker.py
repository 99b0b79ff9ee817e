"""A circuit breaker: after several failures in a row, no call is made for a while."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger("kvferry.store")


class Open(Exception):
    """The breaker is open: the call was not made."""


class Breaker:
    """Counts failures in a row. After ``failures`` of them the breaker opens for ``seconds``.

    While it is open, calls are refused. Then one call is made as a trial, and all others are still
    refused. If the trial succeeds, the breaker closes. Otherwise it stays open for twice as long as
    before, up to ``longest``. Any thread may use it.
    """

    def __init__(
        self,
        name: str,
        *,
        failures: int = 3,
        seconds: float = 10.0,
        longest: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._most = failures
        self._first, self._longest = seconds, longest
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._seconds = seconds
        self._open_until: float | None = None
        self._trial_began: float | None = None
        self.opened = 0
        """How often it has opened, from closed."""

    def another(self, name: str) -> Breaker:
        """Returns a closed breaker with the same limits and clock."""
        return Breaker(
            name,
            failures=self._most,
            seconds=self._first,
            longest=self._longest,
            clock=self._clock,
        )

    @property
    def would_refuse(self) -> bool:
        """Whether ``enter`` would raise now. Begins no trial."""
        with self._lock:
            return self._refuses(self._clock())

    def enter(self) -> bool:
        """Use this before each call, and one of ``succeeded``, ``failed`` and ``cancelled`` after
        it.

        Returns whether the call is a trial. Raises Open.
        """
        with self._lock:
            now = self._clock()
            if self._refuses(now):
                raise Open(f"{self._name} is left alone after failures")
            if self._open_until is None:
                return False
            self._trial_began = now
            return True

    def _refuses(self, now: float) -> bool:
        if self._open_until is None:
            return False
        return now < self._open_until or self._trial_began is not None

    def succeeded(self) -> None:
        with self._lock:
            was_open = self._open_until is not None
            self._failures, self._seconds = 0, self._first
            self._open_until = self._trial_began = None
        if was_open:
            log.warning("%s works again", self._name)

    def failed(self, trial: bool, why: object) -> None:
        with self._lock:
            self._failures += 1
            if self._open_until is None:
                if self._failures < self._most:
                    return
                self.opened += 1
            elif not trial:
                return  # the call began before the breaker opened
            else:
                self._seconds = min(2 * self._seconds, self._longest)
            self._open_until = self._clock() + self._seconds
            self._trial_began = None
            seconds = self._seconds
        log.warning("%s is left alone for %g s: %s", self._name, seconds, why)

    def cancelled(self, trial: bool) -> None:
        """The call was cancelled, so that its outcome is not known."""
        if trial:
            with self._lock:
                self._trial_began = None
