"""Speeds that tests give a store, in place of what it measures."""

from __future__ import annotations

import kvferry
from kvferry import Store
from kvferry.store.prefix import Tier

MIB = 1 << 20


def evaluates(store: Store, llama: kvferry.Llama, seconds_a_token: float = 1e-3) -> None:
    for _ in range(3):
        store.note_prefill(llama, 1000, 1000 * seconds_a_token)


def reads(store: Store, tier: Tier, latency: float, seconds_a_mib: float = 0.0) -> None:
    for size in (1, 2, 4, 8, 16):
        store._worth.tier(tier).note(size * MIB, latency + size * seconds_a_mib)


def loads(store: Store, llama: kvferry.Llama, seconds_a_mib: float) -> None:
    for _ in range(7):
        store._worth.load(llama).note(MIB, seconds_a_mib)
