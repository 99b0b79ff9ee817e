"""The event loops on which everything asynchronous must work.

Import `anyio_backend` into a test module and mark its tests `anyio`: then each runs on all of them.
"""

import pytest

EVENT_LOOPS = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


@pytest.fixture(params=EVENT_LOOPS.values(), ids=EVENT_LOOPS.keys())
def anyio_backend(request: pytest.FixtureRequest) -> object:
    return request.param
