"""Checks that includes of cabi/ point one way: a room includes itself and rooms before it only.

    python check_includes.py CABI             fails if an include breaks a wall
    python check_includes.py --planted CABI   fails unless each kind of broken wall is found

A file's header and source (job.h and job.cpp) count as one: no circle may lead from it back to it.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path

# Each room, the rooms that it may include, and why the wall above it stands.
ROOMS = {
    # Errors, handles, threads and fork() serve every room and know nothing of transfers.
    "core": set(),
    # Which bytes there are and where they lie: useful, and testable, without a job.
    "memory": {"core"},
    # When and in which order bytes move, on devices that are known by their interface alone.
    "jobs": {"core", "memory"},
    # One kind of device each. Neither knows the other, so that a build can do without one.
    "host": {"core", "memory", "jobs"},
    "cuda": {"core", "memory", "jobs"},
    # The only room that knows every kind of device; it knows nothing of llama.cpp.
    "engine": {"core", "memory", "jobs", "host", "cuda"},
    # What the bytes of a state mean: testable on plain memory, without libllama and without an
    # engine.
    "states": {"core"},
    # What a llama.cpp context stores, turned into submissions to an engine.
    "llama": {"core", "memory", "jobs", "engine", "states"},
    # abi.cpp: arguments and handles of the C functions. Nothing includes it.
    "": {"core", "memory", "jobs", "engine", "states", "llama"},
}
# Headers without a room: the public one, which every room may include, and what the build makes.
OUTSIDE = {"kvferry.h", "gather_ptx.h"}

INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def files_of(cabi: Path) -> list[Path]:
    return sorted(path for path in cabi.rglob("*") if path.suffix in (".h", ".cpp", ".cu"))


def room_of(name: str) -> str:
    return name.rpartition("/")[0]


def find_broken_walls(cabi: Path) -> list[str]:
    """Returns one line for each include that a room may not have, and for each circle."""
    problems = []
    uses: dict[str, set[str]] = {}
    for path in files_of(cabi):
        name = path.relative_to(cabi).as_posix()
        room = room_of(name)
        if room not in ROOMS:
            problems.append(f"{name}: the table in {Path(__file__).name} lacks this room")
            continue
        unit = name.rpartition(".")[0]
        for included in INCLUDE.findall(path.read_text()):
            if included in OUTSIDE:
                continue
            if not (cabi / included).is_file():
                problems.append(f'{name} includes "{included}": no such file in {cabi.name}/')
            elif room_of(included) not in {room, *ROOMS[room]}:
                problems.append(f'{name} includes "{included}": that room comes later, or beside')
            else:
                uses.setdefault(unit, set()).add(included.rpartition(".")[0])
    return problems + find_circles(uses)


def find_circles(uses: dict[str, set[str]]) -> list[str]:
    circles = []
    finished: set[str] = set()

    def visit(unit: str, way: list[str]) -> None:
        if unit in way:
            circles.append("a circle: " + " -> ".join([*way[way.index(unit) :], unit]))
        elif unit not in finished:
            for used in sorted(uses.get(unit, set()) - {unit}):
                visit(used, [*way, unit])
            finished.add(unit)

    for unit in sorted(uses):
        visit(unit, [])
    return circles


def plant(cabi: Path) -> list[str]:
    """Breaks walls in copies of the tree. Returns the breaks that were not found."""
    breaks = {
        "a later room": ("memory/layout.h", '#include "jobs/job.h"'),
        "the room beside": ("host/device.cpp", '#  include "cuda/device.h"'),
        "a device from llama": ("llama/policy.cpp", '#include "cuda/device.h"'),
        "libllama from states": ("states/formats.cpp", '#include "llama/api.h"'),
        "a circle in a room": ("jobs/queue.h", '#include "jobs/job.h"'),
        "a missing file": ("core/fork.h", '#include "core/missing.h"'),
        "an unknown room": ("other/new.h", '#include "core/status.h"'),
    }
    missed = []
    for what, (name, line) in breaks.items():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / cabi.name
            shutil.copytree(cabi, copy)
            path = copy / name
            path.parent.mkdir(exist_ok=True)
            path.write_text((path.read_text() if path.exists() else "") + line + "\n")
            if len(find_broken_walls(copy)) != len(find_broken_walls(cabi)) + 1:
                missed.append(f"{what}: `{line}` in {name} was not found")
    return missed


def main() -> int:
    *options, folder = sys.argv[1:]
    check = plant if options == ["--planted"] else find_broken_walls
    problems = check(Path(folder).resolve())
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
