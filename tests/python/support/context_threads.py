"""Whether kvferry has a thread for a context."""

from __future__ import annotations

import time

from kvferry._bridge import worker

from support.llama_reference import Context


def has_thread(context: Context) -> bool:
    """Waits until the context's thread has ended; returns True if it has not after ten seconds."""
    deadline = time.monotonic() + 10
    while context.address in worker._contexts:
        if time.monotonic() > deadline:
            return True
        time.sleep(0.001)
    return False
