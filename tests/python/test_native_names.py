"""The extension module has every name of the header, and type checkers know each."""

from __future__ import annotations

import re
from pathlib import Path

import kvferry
from kvferry._native import lib

HEADER = Path(__file__).parents[2] / "include" / "kvferry.h"


def names_of_the_header() -> dict[str, int | None]:
    """Enumerators and versions with their numbers; functions with None."""
    header = HEADER.read_text()
    numbers = re.findall(
        r"^ +(KVF_\w+) = (-?\d+),|^#define (KVF_\w*VERSION\w*) (\d+)$", header, re.MULTILINE
    )
    names: dict[str, int | None] = {
        enumerator or macro: int(value or version) for enumerator, value, macro, version in numbers
    }
    functions = re.findall(r"^KVF_API [\w ]+[ *](kvf_\w+)\(", header, re.MULTILINE)
    return names | dict.fromkeys(functions)


def test_the_extension_module_has_every_name_of_the_header_and_no_other() -> None:
    names = names_of_the_header()
    assert len(names) > 80
    assert set(dir(lib)) == set(names)
    for name, number in names.items():
        if number is not None:
            assert getattr(lib, name) == number, name


def test_type_checkers_know_every_name_of_the_extension_module() -> None:
    (stub,) = Path(kvferry.__file__).parent.rglob("_native.pyi")
    known = re.findall(r"^    (?:def )?(kvf_\w+|KVF_\w+)(?:\(|:)", stub.read_text(), re.MULTILINE)
    assert sorted(known) == sorted(names_of_the_header())
