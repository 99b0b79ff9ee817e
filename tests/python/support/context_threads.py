"""The threads that kvferry keeps for contexts, as seen from outside."""

from __future__ import annotations

import time

from kvferry._bridge import worker

from support.llama_reference import Context


def has_thread(context: Context) -> bool:
    """False once the thread has gone; waits for that, ten seconds at most."""
    deadline = time.monotonic() + 10
    while context.address in worker._contexts:
        if time.monotonic() > deadline:
            return True
        time.sleep(0.001)
    return False
