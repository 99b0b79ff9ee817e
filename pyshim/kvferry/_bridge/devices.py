"""The devices of an engine: the words that programs use, and the numbers of the C library."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence

from .._native import lib

Devices = str | Sequence[int]
"""``"auto"``, ``"host"``, ``"cuda"``; ``"cuda:1"``; or ordinals of CUDA devices: ``[0, 2]``."""

_WORDS: dict[str, int] = {
    "auto": lib.KVF_DEVICES_AUTO,
    "host": lib.KVF_DEVICES_HOST,
    "cuda": lib.KVF_DEVICES_CUDA,
}
_MOST = 64  # bits of kvf_engine_options.cuda_devices


def engine_devices(devices: Devices) -> tuple[int, int]:
    """Returns a ``KVF_DEVICES_*``, and a mask with a bit for each CUDA device that is named.

    Raises ValueError.
    """
    if isinstance(devices, str):
        if devices in _WORDS:
            return _WORDS[devices], 0
        named = re.fullmatch(r"cuda:([0-9]{1,9})", devices)
        ordinals = [int(named[1])] if named else []
    else:
        try:
            ordinals = [operator.index(ordinal) for ordinal in devices]
        except TypeError:
            ordinals = []
    if not ordinals or not all(0 <= ordinal < _MOST for ordinal in ordinals):
        raise ValueError(
            "devices is 'auto', 'host', 'cuda', one CUDA device such as 'cuda:0', or ordinals such "
            f"as [0, 2], each below {_MOST}; not {devices!r}"
        )
    mask = 0
    for ordinal in ordinals:
        mask |= 1 << ordinal
    return lib.KVF_DEVICES_CUDA, mask
