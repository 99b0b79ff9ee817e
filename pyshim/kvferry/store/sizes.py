"""Sizes in bytes, as programs write them."""

from __future__ import annotations

import re

from .._bridge.arguments import integer, invalid

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}B": 1000**power for power, letter in enumerate("kMGT", 1)},
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def size(name: str, value: object) -> int:
    """Returns a number of bytes, from an int or a string such as "8 GiB" or "500 MB".

    ``name`` is the argument's name, for errors. Raises TypeError, InvalidArgument.
    """
    if not isinstance(value, str):
        return integer(name, value, least=1)
    match = _SIZE.fullmatch(value)
    if match is None or match[2] not in _UNITS:
        units = ", ".join(filter(None, _UNITS))
        raise invalid(f'{name} is {value!r}, not a size such as "8 GiB" (units: {units})')
    nbytes = int(float(match[1]) * _UNITS[match[2]])
    return integer(name, nbytes, least=1)
