"""``kvferry doctor``: what this machine offers to kvferry, and what each finding means."""

from __future__ import annotations

import dataclasses
import json
import textwrap

from ... import Devices, __version__
from . import devices, host, sequences
from .finding import Finding


async def doctor(llama_lib: str | None, device: Devices, as_json: bool) -> int:
    """Prints all findings. Returns 0, or 1 if kvferry cannot save and load sequences."""
    opened, unusable = devices.open_engine(device)
    async with opened as engine:
        findings = [
            Finding("kvferry", __version__, "the library and the Python package agree"),
            devices.opened(engine),
            devices.driver(engine),
            *unusable,
            *devices.gpus(engine),
            *await sequences.libllama(engine, llama_lib),
            host.pinned_memory(engine),
            host.cores(),
            host.memcpy(),
            await host.transfers(engine),
        ]
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            _print(finding)
    needed = ("libllama", "tap", "save and load")
    can_move = all(each.good for each in findings if each.subject in needed)
    return 0 if can_move else 1


def _print(finding: Finding) -> None:
    mark = "ok" if finding.good else "--"
    print(f"{mark}  {finding.subject:<14} {finding.found}")
    indent = " " * 19
    print(textwrap.fill(finding.meaning, 98, initial_indent=indent, subsequent_indent=indent))
