"""Hostile folders and buckets, and killed writers that share a folder."""

from __future__ import annotations

from pathlib import Path

import disk_hostile
import disk_killed
import pytest
import remote_hostile
import store_hostile
from support.event_loops import anyio_backend  # noqa: F401
from support.like_contexts import MakeContext


def test_mutated_files(tmp_path: Path) -> None:
    hostile = disk_hostile.run(tmp_path / "store", 500, seed=2)
    assert hostile.indexes == 25
    assert hostile.loads > 0


@pytest.mark.anyio
async def test_mutated_objects() -> None:
    assert await remote_hostile.run(400, seed=2) > 0


@pytest.mark.anyio
async def test_restores_from_mutated_files(make_context: MakeContext, tmp_path: Path) -> None:
    context = make_context("llama")
    done = await store_hostile.run(context, tmp_path / "store", 100, seed=2)
    assert done.total() == 100
    assert len(done) > 2


@pytest.mark.parametrize("limit", [disk_killed.LIMIT, 8 << 30], ids=["evicting", "keeping"])
def test_killed_writers(tmp_path: Path, limit: int) -> None:
    disk_killed.run(tmp_path / "store", 14, seed=3, limit=limit)
