"""Everything that the store has to say is under one logger."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path

import kvferry
import pytest
from disk_stores import BLOCK, TOKENS, prompted
from kvferry import Store
from kvferry.store.objects import Unavailable
from support.devices import DEVICES
from support.faulty_objects import FaultyObjects
from support.like_contexts import MakeContext

PACKAGE = Path(kvferry.__file__).parent
STORE = [*sorted((PACKAGE / "store").glob("*.py")), PACKAGE / "prompt_cache.py"]
NAMES = ["kvferry.store"]
"""All loggers of the package. A program that configures this one has them all."""


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node


def test_the_package_has_these_loggers() -> None:
    names = {
        ast.literal_eval(call.args[0])
        for path in PACKAGE.rglob("*.py")
        for call in calls(path)
        if ast.unparse(call.func).endswith("getLogger")
    }
    assert sorted(names) == NAMES
    known = [
        name
        for name in logging.Logger.manager.loggerDict
        if name == "kvferry" or name.startswith("kvferry.")
    ]
    assert set(known) <= {"kvferry", *NAMES}


@pytest.mark.parametrize("path", STORE, ids=lambda path: path.stem)
def test_a_module_of_the_store_tells_nothing_elsewhere(path: Path) -> None:
    """Neither the root logger, nor standard output, nor warnings."""
    elsewhere = ("print", "warnings.warn", "sys.stderr.write", "sys.stdout.write")
    root = tuple(
        f"logging.{each}" for each in ("debug", "info", "warning", "error", "exception", "log")
    )
    found = [name for call in calls(path) if (name := ast.unparse(call.func)) in elsewhere + root]
    assert found == []


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_faults_of_each_tier_are_told_there(
    make_context: MakeContext,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    context, prompt = prompted(make_context, "llama")
    objects = FaultyObjects()

    def fail(call: int) -> None:
        raise Unavailable("no answer")

    async with kvferry.Engine(DEVICES) as engine:
        llama = engine.attach(context.address)
        disk = {"disk": tmp_path, "disk_limit": "1 GiB", "block_tokens": BLOCK}
        async with Store(ram="64 MiB", remote=objects, **disk) as store:  # type: ignore[arg-type]
            await store.keep(llama, 0, prompt)
        for path in (tmp_path / "parts").glob("*.block"):
            path.write_bytes(path.read_bytes()[:-1])
        objects.fault = fail
        async with Store(ram="64 MiB", remote=objects, **disk) as store:  # type: ignore[arg-type]
            assert await store.restore(llama, 1, prompt) == 0
            assert await store.keep(llama, 0, prompt) == TOKENS
    told = [record for record in caplog.records if record.name.startswith("kvferry")]
    assert {record.name for record in told} == set(NAMES)
    assert {record.name for record in caplog.records if record.levelno >= logging.WARNING} == set(
        NAMES
    )
    text = " ".join(record.getMessage() for record in told)
    assert "quarantined" in text
    assert "no answer" in text
