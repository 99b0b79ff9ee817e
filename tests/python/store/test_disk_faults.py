"""Every system call of the disk tier fails once, at each of its calls."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disk_parts import GENEROUS, file_of, leftovers, make_part, occupied
from kvferry.store.disk import Disk
from kvferry.store.system import System

LIMIT = 2 << 20


class Faulty(System):
    """The call of this number does not do what it should."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.fails_at = self.calls = -1

    def call_once(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.calls += 1
        if self.calls != self.fails_at:
            return function(*arguments)
        if self.fault == "EINTR":
            raise InterruptedError
        if self.fault != "short":
            raise OSError(getattr(errno, self.fault), "injected")
        if function is os.preadv:
            return function(arguments[0], [arguments[1][0][:7]], arguments[2])
        if function is os.pwritev:
            return function(arguments[0], [arguments[1][0][:7]], arguments[2])
        return function(*arguments)


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EACCES", "EINTR", "short"])
def test_each_call_fails_once(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "store"
    system = Faulty(fault)
    kept = [make_part(number, 150_000) for number in range(5)]
    with_room = Disk(folder, LIMIT)
    for part, data in kept:
        assert with_room.write(part, data)
    with_room.close()
    for call in range(1000):
        part, data = make_part(100 + call, 150_000)
        system.calls, system.fails_at = -1, -1
        disk = Disk(folder, LIMIT, system=system)
        system.calls, system.fails_at = -1, call
        memory = bytearray(part.nbytes)
        try:
            written = disk.write(part, data)
            assert written
        except OSError:
            if fault in ("EINTR", "short"):
                raise
            written = False
        before = system.calls
        if not written:
            assert not file_of(folder, part).exists()
            assert disk.find(part.kind, part.key) is None
        read = disk.read_into(part, memory)
        if read:
            assert memory == data
        assert read == written or call >= before
        if fault in ("EINTR", "short"):
            assert read
        disk.close()
        done = system.calls < call
        system.fails_at = -1
        assert occupied(folder) <= LIMIT
        again = Disk(folder, LIMIT)
        assert not leftovers(folder)
        assert again.stats().occupied == occupied(folder)
        assert again.verify().quarantined == 0
        for kept_part in again.list():
            assert file_of(folder, kept_part).exists()
        again.close()
        if done:
            break
    assert 20 < call < 999


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO", "EINTR", "EACCES"])
def test_each_call_of_opening_fails_once(tmp_path: Path, fault: str) -> None:
    part, data = make_part(1)
    folder = tmp_path / "store"
    disk = Disk(folder, GENEROUS)
    disk.write(part, data)
    disk.close()
    system = Faulty(fault)
    for call in range(1000):
        system.calls, system.fails_at = -1, call
        try:
            Disk(folder, GENEROUS, system=system).close()
        except OSError:
            assert fault != "EINTR"
        if system.calls < call:
            break
        again = Disk(folder, GENEROUS)
        memory = bytearray(part.nbytes)
        assert again.read_into(part, memory)
        assert memory == data
        again.close()
    assert 5 < call < 999
