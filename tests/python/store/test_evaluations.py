"""What a store learns of prefill from libllama's counts, which are given here."""

from __future__ import annotations

import pytest
from kvferry.store.evaluations import Evaluations
from kvferry.store.worth import Worth
from support.event_loops import anyio_backend  # noqa: F401

pytestmark = pytest.mark.anyio


class Counting:
    """In place of a ``kvferry.Llama``: has evaluated so many tokens in so many seconds."""

    def __init__(self) -> None:
        self.counted: tuple[int, float] | None = (0, 0.0)

    async def _evaluated(self, seq: int) -> tuple[int, float] | None:
        return self.counted

    def evaluate(self, tokens: int, seconds: float) -> None:
        assert self.counted is not None
        self.counted = self.counted[0] + tokens, self.counted[1] + seconds


class Case:
    def __init__(self) -> None:
        self.worth = Worth(lambda: 0.0)
        self.evaluations = Evaluations(self.worth)
        self.llama = Counting()

    async def restored(self, position: int) -> None:
        await self.evaluations.restored(self.llama, 0, position)  # type: ignore[arg-type]

    async def kept(self, position: int) -> None:
        await self.evaluations.kept(self.llama, 0, position)  # type: ignore[arg-type]

    @property
    def seen(self) -> list[tuple[float, float]]:
        """Mean depth, and seconds for each token."""
        return self.worth.prefill(self.llama).seen  # type: ignore[arg-type]


@pytest.fixture
def case() -> Case:
    return Case()


async def test_from_a_restore_to_a_keep(case: Case) -> None:
    case.llama.evaluate(5000, 500.0)  # before: of others
    await case.restored(1000)
    case.llama.evaluate(100, 2.0)
    await case.kept(1150)  # 50 tokens were generated
    assert case.seen == [(1050.0, 0.02)]


async def test_from_one_keep_to_the_next(case: Case) -> None:
    case.llama.evaluate(100, 1.0)
    await case.kept(120)
    case.llama.evaluate(200, 4.0)
    await case.kept(340)
    assert case.seen == [(50.0, 0.01), (220.0, 0.02)]


async def test_another_conversation_began_at_its_beginning(case: Case) -> None:
    await case.restored(1000)
    case.llama.evaluate(200, 2.0)
    await case.kept(210)
    assert case.seen == [(110.0, 0.01)]


async def test_counts_that_began_anew_or_are_of_others_say_nothing(case: Case) -> None:
    case.llama.evaluate(1000, 1.0)
    await case.restored(0)
    case.llama.counted = (500, 0.5)
    await case.kept(500)
    case.llama.evaluate(5000, 0.5)
    await case.kept(600)
    assert case.seen == []


async def test_a_context_that_does_not_count_says_nothing(case: Case) -> None:
    case.llama.counted = None
    await case.restored(0)
    await case.kept(500)
    assert case.seen == []
