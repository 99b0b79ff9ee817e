"""Fixtures of the tests of llama.cpp's sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.llama_reference import Model


@pytest.fixture
def anyio_backend() -> str:
    """One event loop is enough: the bytes that are moved do not depend on it. Test modules that
    concern event loops import the fixture of support/event_loops.py instead.
    """
    return "asyncio"


@pytest.fixture
def large_model(model: Callable[..., Model]) -> Model:
    """1 MiB a token, so that moving some dozen tokens takes some milliseconds."""
    return model("llama", geometry="bench")
