"""Hostile folders, and killed writers that share one."""

from __future__ import annotations

from pathlib import Path

import disk_hostile
import disk_killed
import pytest


def test_mutated_files(tmp_path: Path) -> None:
    disk_hostile.run(tmp_path / "store", 3000, seed=2)


@pytest.mark.parametrize("limit", [disk_killed.LIMIT, 8 << 30], ids=["evicting", "keeping"])
def test_killed_writers(tmp_path: Path, limit: int) -> None:
    disk_killed.run(tmp_path / "store", 14, seed=3, limit=limit)
