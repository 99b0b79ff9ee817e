"""The descriptions that the C library gives of its objects, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._native import ffi, lib
from ..errors import check

if TYPE_CHECKING:
    from .._native import CData


def describe(function: Callable[[int, CData, int, CData], int], handle: int) -> dict[str, Any]:
    """Calls ``kvf_engine_describe`` or ``kvf_llama_describe``."""
    needed = ffi.new("uint64_t *", 4096)
    while True:
        capacity = needed[0]
        text = ffi.new("char[]", capacity)
        status = function(handle, text, capacity, needed)
        if status == lib.KVF_ERR_BUFFER_TOO_SMALL:
            continue
        check(status)
        description: dict[str, Any] = json.loads(ffi.string(text))
        return description
