from kvferry._bridge.restore_speeds import RestoreSpeeds


def seen(speeds: RestoreSpeeds, *seconds: float) -> None:
    """Restores of 1,000 bytes each from a disk."""
    for each in seconds:
        speeds.restored("disk", 1000, each)


def test_a_restore_is_tried_as_long_as_its_speed_is_unknown() -> None:
    speeds = RestoreSpeeds()
    assert speeds.is_worth("disk", 1 << 40, 1)
    speeds.evaluated(1000, 0.001)
    seen(speeds, 1.0, 1.0)
    assert speeds.is_worth("disk", 1 << 40, 1)


def test_a_restore_that_takes_longer_than_its_tokens_is_not_worth_it() -> None:
    speeds = RestoreSpeeds()
    speeds.evaluated(100, 1.0)
    seen(speeds, 1.0, 1.0, 1.0)
    assert speeds.is_worth("disk", 1000, 100)
    assert not speeds.is_worth("disk", 1000, 99)
    assert speeds.is_worth("ram", 1000, 99)


def test_the_best_speed_counts() -> None:
    speeds = RestoreSpeeds()
    speeds.evaluated(100, 1.0)
    seen(speeds, 1.0, 0.5, 2.0)
    assert speeds.is_worth("disk", 1000, 50)
    for seconds in (0.1, 5.0):
        speeds.evaluated(100, seconds)
    assert not speeds.is_worth("disk", 1000, 499)
    speeds.evaluated(-3, -1.0)  # the context has begun to count anew
    assert speeds.is_worth("disk", 1000, 500)
