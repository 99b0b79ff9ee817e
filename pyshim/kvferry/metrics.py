"""Metrics of stores for Prometheus.

Needs ``pip install kvferry[metrics]``.

    from prometheus_client import REGISTRY, start_http_server
    REGISTRY.register(kvferry.metrics.StoreCollector(store))
    start_http_server(9464)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Protocol

try:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector
except ImportError as problem:
    raise ImportError("metrics need prometheus_client: pip install 'kvferry[metrics]'") from problem

from .store.counts import BOUNDS, Counts, Histogram
from .store.readings import Readings, TierReadings


class Measured(Protocol):
    """A ``Store``, or a ``PromptCache``."""

    def readings(self) -> Readings: ...


class StoreCollector(Collector):
    """Reads the numbers of one or several stores when Prometheus scrapes.

    Register one collector in a registry; each of its stores has a name, which the label ``store``
    shows. Any thread may call all methods, and a scrape waits for no disk and no object store. A
    store that was closed keeps its numbers until ``remove``. The numbers are those of this process:
    the multiprocess mode of ``prometheus_client`` does not have them.
    """

    def __init__(self, store: Measured | None = None, name: str = "default") -> None:
        """``store`` is a ``Store`` or a ``PromptCache``; None: ``add`` follows."""
        self._lock = threading.Lock()
        self._stores: dict[str, Measured] = {}
        if store is not None:
            self.add(store, name)

    def add(self, store: Measured, name: str) -> None:
        """Raises ValueError where another store has this name."""
        with self._lock:
            if name in self._stores:
                raise ValueError(f"there is a store {name!r} already")
            self._stores[name] = store

    def remove(self, name: str) -> None:
        """Raises KeyError."""
        with self._lock:
            del self._stores[name]

    def describe(self) -> Iterator[Metric]:
        """The metrics without samples: a registry refuses a second collector of these names."""
        return _families({})

    def collect(self) -> Iterator[Metric]:
        """The metrics of all stores."""
        with self._lock:
            stores = dict(self._stores)
        return _families({name: store.readings() for name, store in stores.items()})


def _families(stores: dict[str, Readings]) -> Iterator[Metric]:
    for name, text, total in _TOTALS:
        family = CounterMetricFamily(f"kvferry_store_{name}", text, labels=["store"])
        for store, readings in stores.items():
            family.add_metric([store], total(readings.counts))
        yield family
    for kind, name, text, number in _BY_TIER:
        by_tier = kind(f"kvferry_store_{name}", text, labels=["store", "tier"])
        for store, readings in stores.items():
            for tier, values in readings.tiers.items():
                if (value := number(values)) is not None:
                    by_tier.add_metric([store, tier], value)
        yield by_tier
    yield _refusals(stores)
    for name, text, labels, histograms in _TIMES:
        times = HistogramMetricFamily(f"kvferry_store_{name}_seconds", text, labels=labels)
        for store, readings in stores.items():
            for more, histogram in histograms(readings.counts).items():
                times.add_metric([store, *more], *_buckets(histogram))
        yield times


def _refusals(stores: dict[str, Readings]) -> Metric:
    family = CounterMetricFamily(
        "kvferry_store_refusals",
        "What a tier was asked for and did not do.",
        labels=["store", "tier", "reason"],
    )
    for store, readings in stores.items():
        for tier, values in readings.tiers.items():
            for reason, count in values.refused.items():
                family.add_metric([store, tier, reason], count)
    return family


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """The buckets as Prometheus wants them, each with those below it; and the sum."""
    counts, total = histogram.read()
    bounds = [*(str(float(bound)) for bound in BOUNDS), "+Inf"]
    return [(bound, sum(counts[: n + 1])) for n, bound in enumerate(bounds)], total


_TOTALS: tuple[tuple[str, str, Callable[[Counts], float]], ...] = (
    ("requested_tokens", "Tokens for which restores have looked.", lambda c: c.requested_tokens),
    (
        "missed_tokens",
        "Tokens for which restores have looked and that were not restored.",
        lambda c: c.requested_tokens - sum(c.hit_tokens.values()),
    ),
    ("kept_tokens", "Tokens that were kept when keeps returned.", lambda c: c.kept_tokens),
)
_BY_TIER: tuple[
    tuple[
        type[CounterMetricFamily] | type[GaugeMetricFamily],
        str,
        str,
        Callable[[TierReadings], float | None],
    ],
    ...,
] = (
    (
        CounterMetricFamily,
        "hit_tokens",
        "Tokens that restores have loaded, by the tier that had them.",
        lambda tier: tier.hit_tokens,
    ),
    (
        CounterMetricFamily,
        "read_bytes",
        "Bytes read: from RAM into contexts, from other tiers into RAM.",
        lambda tier: tier.read_bytes,
    ),
    (
        CounterMetricFamily,
        "write_bytes",
        "Bytes written: from contexts into RAM, from RAM to other tiers.",
        lambda tier: tier.written_bytes,
    ),
    (
        CounterMetricFamily,
        "evictions",
        "Blocks and checkpoints that were evicted to make room.",
        lambda tier: tier.evicted,
    ),
    (
        CounterMetricFamily,
        "write_failures",
        "Writes behind keeps that have failed or were refused.",
        lambda tier: tier.failed_writes,
    ),
    (
        CounterMetricFamily,
        "breaker_openings",
        "How often the circuit breaker has opened.",
        lambda tier: tier.breaker_openings,
    ),
    (
        GaugeMetricFamily,
        "breaker_open",
        "Whether the tier is left alone now, after failures.",
        lambda tier: tier.breaker_open,
    ),
    (
        GaugeMetricFamily,
        "pending_writes",
        "Writes behind keeps that have not ended.",
        lambda tier: tier.pending_writes,
    ),
    (
        GaugeMetricFamily,
        "usage_bytes",
        "Bytes that are taken; on disk as of the latest write.",
        lambda tier: tier.usage_bytes,
    ),
    (GaugeMetricFamily, "limit_bytes", "The most bytes.", lambda tier: tier.limit_bytes),
)
_TIMES: tuple[
    tuple[str, str, list[str], Callable[[Counts], dict[tuple[str, ...], Histogram]]], ...
] = (
    ("find", "Seconds of a call of find.", ["store"], lambda counts: {(): counts.find_seconds}),
    (
        "restore",
        "Seconds of a call of restore, by the farthest tier that it has taken something from.",
        ["store", "tier"],
        lambda counts: {(tier or "none",): each for tier, each in counts.restore_seconds.items()},
    ),
    ("keep", "Seconds of a call of keep.", ["store"], lambda counts: {(): counts.keep_seconds}),
)
