"""Fixtures of the store's remote tier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.s3_server import Proxy, S3Server, proxy, s3_server


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server of one bucket, which the environment names."""
    with s3_server(tmp_path / "s3") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def network(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What lies between the server and the tests that use this; the environment names it."""
    with proxy(s3.port) as one:
        for name, value in s3.environment(one.port).items():
            monkeypatch.setenv(name, value)
        yield one
