"""A server that speaks S3, and a TCP proxy before it that does what networks do."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[3] / "build/tools/versitygw"
BUCKET = "bucket"
_KEYS = {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": "not-a-secret"}


class S3Server:
    """versitygw, with its objects as files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bucket = folder / BUCKET
        self.bucket.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        address = f"127.0.0.1:{self.port}"
        roots = {
            "ROOT_ACCESS_KEY": _KEYS["AWS_ACCESS_KEY_ID"],
            "ROOT_SECRET_KEY": _KEYS["AWS_SECRET_ACCESS_KEY"],
        }
        self._process = subprocess.Popen(
            [PROGRAM, "--quiet", "--keep-alive", "--port", address, "posix", self.folder],
            env={**os.environ, **roots},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(1000):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            assert self._process.poll() is None, "versitygw has ended"
            time.sleep(0.01)
        raise AssertionError("versitygw does not answer")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def environment(self, port: int | None = None) -> dict[str, str]:
        """What programs have in the environment who use this server."""
        return {
            **_KEYS,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port or self.port}",
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    def objects(self) -> list[Path]:
        return [path for path in self.bucket.rglob("*") if path.is_file() and not hidden(path)]

    def uploads(self) -> list[Path]:
        """Multipart uploads that were neither completed nor aborted."""
        return list(self.bucket.glob(".sgwtmp/multipart/*/*"))


def hidden(path: Path) -> bool:
    return ".sgwtmp" in path.parts


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    if not PROGRAM.exists():
        if shutil.which("go") is None:
            pytest.skip("versitygw is missing, and no Go is installed to build it")
        pytest.fail("versitygw is missing: make setup")
    server = S3Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class Proxy:
    """Passes connections on to a port. Tests change what it does at any time."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.hangs = False
        """Takes everything, and passes nothing on."""
        self.delay = 0.0
        """Seconds before each piece of an answer."""
        self.cut_after: int | None = None
        """Bytes of both directions after which a connection is cut."""
        self.cuts: int | None = None
        """How many connections are cut; None: each that gets so far."""
        self.connections = 0
        self._closed = False
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._closed:
            if not select.select([self._listener], [], [], 0.02)[0]:
                continue
            client, _ = self._listener.accept()
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=[client], daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            passed = 0
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                others = {client: server, server: client}
                while not self._closed:
                    if self.hangs:
                        time.sleep(0.01)
                        continue
                    for ready in select.select(list(others), [], [], 0.02)[0]:
                        data = ready.recv(1 << 16)
                        if not data:
                            return
                        passed += len(data)
                        if self._is_cut(passed):
                            return
                        if ready is server and self.delay:
                            time.sleep(self.delay)
                        others[ready].sendall(data)

    def _is_cut(self, passed: int) -> bool:
        with self._lock:
            if self.cut_after is None or passed <= self.cut_after or self.cuts == 0:
                return False
            if self.cuts is not None:
                self.cuts -= 1
            return True

    def close(self) -> None:
        self._closed = True
        for thread in self._threads:
            thread.join()
        self._listener.close()


@contextlib.contextmanager
def proxy(port: int) -> Iterator[Proxy]:
    one = Proxy(port)
    try:
        yield one
    finally:
        one.close()
