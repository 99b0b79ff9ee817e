"""Imports in the package point one way only: from each room to those on which it stands."""

from __future__ import annotations

import ast
from pathlib import Path

import kvferry

PACKAGE = Path(kvferry.__file__).parent

ROOMS = [
    # A room's modules may import those of their own room and of the rooms above it in this list.
    ("the extension module", ["_native"]),
    ("the exceptions", ["errors"]),
    ("the bridge", ["_bridge"]),
    ("what programs import", ["*"]),
    ("the store", ["store"]),
    ("what stands on the store", ["metrics", "prompt_cache", "trace_file"]),
    ("the package itself", [""]),
    ("the tools", ["tools", "__main__"]),
]


def modules() -> dict[str, Path]:
    """Returns the package's files by the names of modules in it; "" is the package itself."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str) -> set[str]:
    """Returns the modules of the package that a module imports, in functions and for types too.

    ``from . import name`` imports the module of that name if there is one, else the package.
    """
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
            assert not any(name.split(".")[0] == "kvferry" for name in names), (module, names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package.split(".") if package else []
            base = base[: len(base) - (node.level - 1)]
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for each in node.names:
                inner = f"{target}.{each.name}" if target else each.name
                found.add(inner if inner in MODULES or inner == "_native" else target)
    return found


def room(module: str) -> int:
    first = module.split(".")[0]
    named = [index for index, (_, names) in enumerate(ROOMS) if first in names]
    return named[0] if named else [names for _, names in ROOMS].index(["*"])


def test_no_room_uses_one_that_stands_on_it() -> None:
    wrong = [
        f"{module} ({ROOMS[room(module)][0]}) imports {used} ({ROOMS[room(used)][0]})"
        for module in MODULES
        for used in imports(module)
        if room(used) > room(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    uses = {module: imports(module) & MODULES.keys() for module in MODULES}
    while leaves := [module for module, used in uses.items() if not used]:
        for leaf in leaves:
            del uses[leaf]
        for used in uses.values():
            used.difference_update(leaves)
    assert not uses, f"in a circle, or above one: {sorted(uses)}"


def test_every_room_is_there() -> None:
    """Otherwise the table could name rooms that have been renamed."""
    names = {module.split(".")[0] for module in MODULES} | {"_native"}
    for _, listed in ROOMS:
        assert set(listed) - {"*"} <= names
