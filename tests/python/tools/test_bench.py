"""How the benchmark reports its measurements. (test_cli.py runs the command itself.)"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import pytest
from kvferry.tools import bench
from kvferry.tools.bench.beside import Beside
from kvferry.tools.bench.figures import beside_decoding
from kvferry.tools.bench.measurement import Measurement, Reading, Stage, at_least, at_most
from kvferry.tools.libllama import Step
from kvferry.tools.table import Progress

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]


class NothingPrepared:
    name = "stage"
    nbytes = 0
    timeline = None
    pieces = ()

    class decoding:
        steps = ()

    def known(self, key: str) -> None: ...
    def known_transfers(self, direction: str, mode: str = "auto") -> None: ...
    def drain_trace(self) -> None: ...


def stage(prepared: Any, *measurements: Measurement) -> Stage:
    class opened:
        async def __aenter__(self) -> Any:
            return prepared

        async def __aexit__(self, *failure: object) -> None: ...

    return Stage("stage", opened, list(measurements))  # type: ignore[arg-type]


async def test_a_measurement_that_fails_loses_no_other(tmp_path: Path) -> None:
    async def fails(_: object) -> Reading:
        raise RuntimeError("out of luck")

    async def works(_: object) -> Reading:
        return Reading(2.0)

    run = bench._Run(tmp_path, Progress(), only=None)
    measurements = [Measurement("a", "x", None, fails), Measurement("b", "x", at_least(1), works)]

    await run.stage(stage(NothingPrepared(), *measurements))

    assert [(each.name, each.error, each.met) for each in run.results] == [
        ("a", "RuntimeError: out of luck", None),
        ("b", "", True),
    ]
    assert len(json.loads((tmp_path / "bench.json").read_text())["results"]) == 2


async def test_a_measurement_that_fails_in_a_task_is_named(tmp_path: Path) -> None:
    async def fails_in_a_task(_: object) -> Reading:
        async def fail() -> None:
            raise RuntimeError("out of luck")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail)
        return Reading(0)

    run = bench._Run(tmp_path, Progress(), only=None)

    await run.stage(stage(NothingPrepared(), Measurement("a", "x", None, fails_in_a_task)))

    assert [each.error for each in run.results] == ["RuntimeError: out of luck"]


async def test_no_step_beside_a_transfer_is_nothing_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class TransfersTooShort(NothingPrepared):
        async def beside(self, *_: object) -> Beside:
            idle = [Step(0, 1_000_000)]
            return Beside(idle, [], [], 1.0, 0, 1.0, [], 0.0, [])

    run = bench._Run(tmp_path, Progress(), only=None)
    run.facts["raw"] = "memcpy"

    await run.stage(
        stage(TransfersTooShort(), beside_decoding.decode_percentile("load", 50, at_most(4)))
    )
    run.finish()

    [line] = run.results
    assert (line.value, line.met, line.error) == (None, None, "")
    assert line.limit == "nothing measured: no decode step fell beside a transfer"
    assert line.limit in capsys.readouterr().out
    assert json.loads((tmp_path / "bench.json").read_text())["results"][0]["value"] is None
