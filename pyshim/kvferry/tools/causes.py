"""What has failed in a task."""

from __future__ import annotations

from collections.abc import Sequence


def cause(failure: BaseException) -> BaseException:
    """Returns the exception of a task, without the groups that task groups wrap it in."""
    inner: Sequence[BaseException] = getattr(failure, "exceptions", ())
    return cause(inner[0]) if len(inner) == 1 else failure
