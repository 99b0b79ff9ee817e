"""Fixtures of the tests of llama.cpp's sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from support.blocks import Pair
    from support.c_interface import Engine
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


@pytest.fixture(scope="module")
def c_engine() -> Iterator[Engine]:
    """An engine of the C functions, shared by the tests of a module."""
    from support.blocks import LIBRARY
    from support.c_interface import Devices
    from support.devices import ON_GPU

    with LIBRARY.engine(Devices.CUDA if ON_GPU else Devices.HOST) as engine:
        yield engine


@pytest.fixture(scope="module")
def pair(model: Callable[..., Model]) -> Iterator[Callable[[str, str], Pair]]:
    """`pair(kind, cache)` returns two equal, empty contexts for the histories of
    support/block_histories.py: one for kvferry, one for llama.cpp. The last pair is used again as
    long as tests ask for the same.
    """
    from support.block_histories import options
    from support.llama_reference import ContextOptions

    made: dict[tuple[str, str], Pair] = {}
    with ExitStack() as closing:

        def give(kind: str, cache: str) -> Pair:
            if (kind, cache) not in made:
                made.clear()
                closing.pop_all().close()
                chosen = ContextOptions(**options(cache))
                ours, like = (closing.enter_context(model(kind).context(chosen)) for _ in range(2))
                made[kind, cache] = ours, like
            for context in made[kind, cache]:
                context.clear()
            return made[kind, cache]

        yield give
