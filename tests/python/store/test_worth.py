"""What of a prefix is worth its restore, by speeds that are given."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from kvferry.store.description import Description
from kvferry.store.prefix import Prefix, Tier
from kvferry.store.worth import Worth

BLOCK = 100
KEY = bytes(32)


class Context:
    """In place of a ``kvferry.Llama``, of which only the identity counts."""


class Case:
    """Blocks of 100 tokens and 1,000 bytes. A token takes a millisecond to evaluate."""

    def __init__(self) -> None:
        self.now = 0.0
        self.worth = Worth(lambda: self.now)
        self.llama = Context()

    def prefills(self, seconds_a_token: float = 1e-3) -> None:
        for _ in range(3):
            self.worth.prefill(self.llama).note(1000, 1000 * seconds_a_token, 0)  # type: ignore[arg-type]

    def reads(self, tier: Tier, seconds_a_block: float) -> None:
        for _ in range(7):
            self.worth.tier(tier).note(1000, seconds_a_block)

    def loads(self, seconds_a_block: float) -> None:
        for _ in range(7):
            self.worth.load(self.llama).note(1000, seconds_a_block)  # type: ignore[arg-type]

    def brought(self, *tiers: Tier, held: int = 0, checkpoint: bool = False) -> int:
        """How many tokens are brought of blocks that lie in these tiers."""
        choice = self.worth.choose(self.llama, prefix(tiers, checkpoint), held)  # type: ignore[arg-type]
        for speed in choice.trials:
            speed.begin_trial()
        return 0 if choice.prefix is None else choice.prefix.end


def prefix(tiers: Sequence[Tier], checkpoint: bool = False) -> Prefix:
    ends = range(BLOCK, BLOCK * len(tiers) + 1, BLOCK)
    blocks = [Description("block", KEY, KEY, end - BLOCK, end, KEY, 1000, 0) for end in ends]
    if not checkpoint:
        return Prefix(blocks, None, ends[-1], tuple(tiers))
    last = Description("checkpoint", KEY, KEY, ends[-1], ends[-1], KEY, 1000, 0)
    return Prefix(blocks, last, ends[-1], (*tiers, tiers[-1]))


@pytest.fixture
def case() -> Case:
    return Case()


def test_all_is_brought_until_a_prefill_was_measured(case: Case) -> None:
    case.reads("remote", 1000.0)
    case.loads(1000.0)
    assert case.brought("remote", "remote") == 200
    case.prefills()
    assert case.brought("remote", "remote") == 0


def test_all_is_brought_until_its_tier_was_measured(case: Case) -> None:
    case.prefills()
    case.reads("disk", 1000.0)
    assert case.brought("remote", "remote") == 200
    case.reads("remote", 1000.0)
    assert case.brought("remote", "remote") == 0


@pytest.mark.parametrize("tier", ["ram", "disk", "remote"])
@pytest.mark.parametrize(("seconds", "tokens"), [(0.09, 300), (0.11, 0)])
def test_what_takes_longer_than_its_tokens_is_not_brought(
    case: Case, tier: Tier, seconds: float, tokens: int
) -> None:
    case.prefills()
    if tier == "ram":
        case.loads(seconds)
    else:
        case.reads(tier, seconds)
    assert case.brought(tier, tier, tier) == tokens


def test_a_load_follows_its_reads(case: Case) -> None:
    case.prefills()
    case.reads("disk", 0.06)
    case.loads(0.06)
    assert case.brought("disk", "disk") == 0
    assert case.brought("ram", "ram") == 200


def test_tiers_are_read_at_the_same_time(case: Case) -> None:
    case.prefills()
    case.reads("disk", 0.15)
    case.reads("remote", 0.15)
    assert case.brought("disk", "remote") == 200
    assert case.brought("remote", "remote") == 0


@pytest.mark.parametrize("near", ["ram", "disk"])
def test_a_prefix_is_brought_as_far_as_it_pays(case: Case, near: Tier) -> None:
    case.prefills()
    case.loads(0.001)
    case.reads("disk", 0.01)
    case.reads("remote", 0.5)
    assert case.brought(near, near, "remote", "remote") == 200


def test_a_latency_pays_for_long_prefixes_only(case: Case) -> None:
    case.prefills()
    for size in (1, 2, 4, 8, 16):
        case.worth.tier("remote").note(1000 * size, 1.0 + 0.01 * size)
    assert case.brought(*["remote"] * 5) == 0
    assert case.brought(*["remote"] * 20) == 2000


def test_a_checkpoint_is_brought_with_all_its_blocks_or_not(case: Case) -> None:
    case.prefills()
    case.reads("remote", 0.5)
    assert case.brought("ram", "ram", "remote", checkpoint=True) == 0


def test_deep_tokens_are_worth_more(case: Case) -> None:
    for begin in (0, 4000, 12000, 28000):
        tokens = max(1000, begin)
        depth = begin + tokens / 2
        case.worth.prefill(case.llama).note(tokens, tokens * 1e-6 * depth, begin)  # type: ignore[arg-type]
    case.reads("disk", 0.2)
    assert case.brought(*["disk"] * 10) == 0
    assert case.brought(*["disk"] * 100) == 10000


def test_only_what_the_sequence_lacks_counts(case: Case) -> None:
    case.prefills()
    case.loads(0.05)
    assert case.brought("ram", "ram", "ram", held=100) == 300
    assert case.brought("ram", "ram", "ram", held=200) == 0


def test_one_slow_read_is_no_reason(case: Case) -> None:
    case.prefills()
    for seconds in (0.01, 60.0, 0.01):
        case.worth.tier("remote").note(1000, seconds)
    assert case.brought("remote", "remote") == 200


def test_a_tier_that_was_slow_is_tried_again_now_and_then(case: Case) -> None:
    case.prefills()
    case.reads("remote", 1.0)
    assert case.brought("remote") == 0
    case.now += 61
    assert case.brought("remote") == BLOCK  # a trial
    assert case.brought("remote") == 0  # while that goes on, or was lost
    case.worth.tier("remote").note(1000, 1.0)
    case.now += 61
    assert case.brought("remote") == BLOCK
    case.worth.tier("remote").note(1000, 0.01)  # the tier is fast now
    for _ in range(2):
        assert case.brought("remote") == BLOCK
        case.worth.tier("remote").note(1000, 0.01)
    assert case.brought("remote") == BLOCK
    assert case.worth.tier("remote").line() is not None


def test_a_trial_wastes_little_of_the_time(case: Case) -> None:
    case.prefills()
    case.reads("remote", 10.0)
    case.now += 61
    assert case.brought("remote") == 0
    case.now += 140
    assert case.brought("remote") == BLOCK


def test_each_context_has_its_own_speed(case: Case) -> None:
    case.prefills()
    case.reads("disk", 0.5)
    assert case.brought("disk") == 0
    case.llama = Context()
    assert case.brought("disk") == BLOCK
