"""A Mooncake Store of this machine alone: its master, and clients that talk TCP."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SEGMENT_BYTES = 256 << 20


class MooncakeServer:
    def __init__(self) -> None:
        self.port, self._metrics = _free_port(), _free_port()
        self._clients: list[Any] = []
        self.start()

    def start(self) -> None:
        self._master = subprocess.Popen(
            [_program(), f"-rpc_port={self.port}", f"-metrics_port={self._metrics}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(1000):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            assert self._master.poll() is None, "mooncake_master has ended"
            time.sleep(0.01)
        raise AssertionError("mooncake_master does not answer")

    def client(self, segment_bytes: int = 0, buffer_bytes: int = 64 << 20) -> Any:
        """A MooncakeDistributedStore; ``segment_bytes``: what it has for objects."""
        from mooncake.store import MooncakeDistributedStore

        client = MooncakeDistributedStore()
        master = f"127.0.0.1:{self.port}"
        code = client.setup(
            "localhost", "P2PHANDSHAKE", segment_bytes, buffer_bytes, "tcp", "", master
        )
        assert code == 0
        self._clients.append(client)
        return client

    def stop(self) -> None:
        """The master ends; what is asked then fails."""
        self._master.kill()
        self._master.wait()

    def suspend(self) -> None:
        self._master.send_signal(signal.SIGSTOP)
        while not _is_stopped(self._master.pid):
            time.sleep(0.001)

    def resume(self) -> None:
        self._master.send_signal(signal.SIGCONT)

    def close(self) -> None:
        if self._master.poll() is not None:
            self.start()  # a client that is closed waits long for a master that has ended
        self.resume()
        for client in self._clients:
            client.close()
        self.stop()


@contextlib.contextmanager
def mooncake_server() -> Iterator[MooncakeServer]:
    if importlib.util.find_spec("mooncake") is None:
        pytest.skip("the package mooncake-transfer-engine-non-cuda is missing")
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        pytest.skip("libibverbs is missing: apt install libibverbs1")
    server = MooncakeServer()
    try:
        yield server
    finally:
        server.close()


def _program() -> Path:
    found = importlib.util.find_spec("mooncake")
    assert found is not None
    assert found.origin is not None
    program = Path(found.origin).parent / "mooncake_master"
    program.chmod(0o755)
    return program


def _is_stopped(process: int) -> bool:
    # The state stands behind the program's name, which is in parentheses.
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
