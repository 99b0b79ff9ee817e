"""Speeds that a store has seen. Nothing here takes a time: all seconds are given."""

from __future__ import annotations

import pytest
from kvferry.store.speeds import PrefillSpeed, Stopwatch, TransferSpeed, prefill_seconds

MIB = 1 << 20


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def speed(clock: FakeClock) -> TransferSpeed:
    return TransferSpeed(clock)


def seen(speed: TransferSpeed, *seconds: float, nbytes: int = MIB) -> None:
    for each in seconds:
        speed.note(nbytes, each)


def at(speed: TransferSpeed, nbytes: int) -> float:
    line = speed.line()
    assert line is not None
    return line.at(nbytes)


# ---- Transfers -----------------------------------------------------------------------------------


def test_two_transfers_say_nothing(speed: TransferSpeed) -> None:
    seen(speed, 1.0, 1.0)
    assert speed.line() is None
    seen(speed, 1.0)
    assert at(speed, 2 * MIB) == pytest.approx(2.0)


def test_latency_and_bandwidth_are_told_apart(speed: TransferSpeed) -> None:
    for size in (1, 2, 4, 8, 16):
        speed.note(size * MIB, 0.5 + 0.01 * size)
    line = speed.line()
    assert line is not None
    assert line.fixed == pytest.approx(0.5)
    assert line.each * MIB == pytest.approx(0.01)


def test_one_slow_transfer_changes_little(speed: TransferSpeed) -> None:
    for size in (1, 2, 4, 8, 16, 32):
        speed.note(size * MIB, 0.5 + 0.01 * size)
    speed.note(3 * MIB, 60.0)
    assert at(speed, 16 * MIB) == pytest.approx(0.66, rel=0.1)


def test_one_slow_transfer_among_equal_ones_changes_nothing(speed: TransferSpeed) -> None:
    seen(speed, 1.0, 60.0, 1.0)
    assert at(speed, MIB) == pytest.approx(1.0)


def test_sizes_that_are_much_alike_tell_no_latency(speed: TransferSpeed) -> None:
    for size, seconds in ((100, 1.3), (101, 1.2), (102, 1.1), (103, 1.0)):
        speed.note(size, seconds)
    assert at(speed, 1000) == pytest.approx(11.5, rel=0.1)


def test_one_fast_transfer_changes_little(speed: TransferSpeed) -> None:
    for size in (1, 2, 4, 8, 16, 32):
        speed.note(size * MIB, 0.5 + 0.01 * size)
    speed.note(3 * MIB, 0.0)
    assert at(speed, MIB) == pytest.approx(0.51, rel=0.1)


def test_a_speed_that_has_changed_is_seen_after_four(speed: TransferSpeed) -> None:
    seen(speed, *[1.0] * 7)
    seen(speed, *[5.0] * 3)
    assert at(speed, MIB) == pytest.approx(1.0)
    seen(speed, 5.0)
    assert at(speed, MIB) == pytest.approx(5.0)


def test_what_moved_nothing_says_nothing(speed: TransferSpeed) -> None:
    seen(speed, 1.0, 1.0, 1.0, nbytes=0)
    assert speed.line() is None


def test_more_bytes_never_take_less_time(speed: TransferSpeed) -> None:
    for size in (1, 2, 4, 8):
        speed.note(size * MIB, 1.0 / size)
    line = speed.line()
    assert line is not None
    assert line.each == 0.0
    assert line.fixed > 0.0


# ---- Trials --------------------------------------------------------------------------------------


def test_a_trial_is_due_after_a_minute(speed: TransferSpeed, clock: FakeClock) -> None:
    seen(speed, 1.0)
    clock.now += 59
    assert not speed.is_due(0.1)
    clock.now += 1
    assert speed.is_due(0.1)
    seen(speed, 1.0)
    assert not speed.is_due(0.1)


def test_a_trial_that_loses_much_is_due_later(speed: TransferSpeed, clock: FakeClock) -> None:
    seen(speed, 1.0)
    clock.now += 199
    assert not speed.is_due(10.0)
    clock.now += 1
    assert speed.is_due(10.0)


def test_a_trial_that_was_lost_is_not_due_again_at_once(
    speed: TransferSpeed, clock: FakeClock
) -> None:
    seen(speed, 1.0)
    clock.now += 60
    speed.begin_trial()
    assert not speed.is_due(0.1)


def test_a_trial_that_was_fast_makes_void_what_was_slow(speed: TransferSpeed) -> None:
    seen(speed, *[10.0] * 7)
    speed.begin_trial()
    seen(speed, 1.0)
    assert speed.line() is None
    seen(speed, 1.0, 1.0)
    assert at(speed, MIB) == pytest.approx(1.0)


def test_a_trial_that_was_slow_changes_nothing(speed: TransferSpeed) -> None:
    seen(speed, *[10.0] * 7)
    speed.begin_trial()
    seen(speed, 9.0)
    assert at(speed, MIB) == pytest.approx(10.0)
    seen(speed, 1.0)  # no trial: it may have been in a cache
    assert at(speed, MIB) == pytest.approx(10.0)


# ---- Reads of one prefix -------------------------------------------------------------------------


def test_reads_at_the_same_time_count_once(clock: FakeClock) -> None:
    watch = Stopwatch(clock)
    with watch.reading():
        clock.now += 1
        with watch.reading():
            clock.now += 2
    clock.now += 100
    with watch.reading():
        clock.now += 4
    assert watch.seconds == 7.0


# ---- Prefill -------------------------------------------------------------------------------------


def seconds_of(speed: PrefillSpeed, begin: int, end: int) -> float | None:
    line = speed.line()
    return None if line is None else prefill_seconds(line, begin, end)


def test_two_prefills_say_nothing() -> None:
    speed = PrefillSpeed()
    for _ in range(2):
        speed.note(1000, 1.0, 0)
    assert seconds_of(speed, 0, 1000) is None
    speed.note(1000, 1.0, 0)
    assert seconds_of(speed, 0, 500) == pytest.approx(0.5)


def test_deep_tokens_take_longer() -> None:
    def seconds(begin: int, end: int) -> float:
        return 1e-4 * (end - begin) + 1e-8 * (end**2 - begin**2) / 2

    speed = PrefillSpeed()
    for begin, end in ((0, 1000), (1000, 3000), (4000, 8000), (8000, 16000)):
        speed.note(end - begin, seconds(begin, end), begin)
    for begin, end in ((0, 500), (10000, 32000), (31000, 32000)):
        assert seconds_of(speed, begin, end) == pytest.approx(seconds(begin, end))


def test_few_tokens_say_nothing() -> None:
    speed = PrefillSpeed()
    for _ in range(5):
        speed.note(4, 1.0, 0)
    assert seconds_of(speed, 0, 1000) is None


def test_the_fastest_of_recent_prefills_counts() -> None:
    speed = PrefillSpeed()
    for seconds in (5.0, 1.0, 60.0):
        speed.note(1000, seconds, 0)
    speed.note(40, 30.0, 4000)  # a small batch says nothing of the depth
    assert seconds_of(speed, 0, 1000) == pytest.approx(1.0)
    for _ in range(7):
        speed.note(1000, 3.0, 0)
    assert seconds_of(speed, 0, 1000) == pytest.approx(3.0)


def test_small_batches_do_not_push_out_the_others() -> None:
    speed = PrefillSpeed()
    speed.note(1000, 1.0, 0)
    for _ in range(20):
        speed.note(40, 0.8, 1000)
    assert seconds_of(speed, 0, 1000) == pytest.approx(1.0)
