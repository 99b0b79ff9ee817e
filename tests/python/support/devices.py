"""The devices on which the tests of llama.cpp's sequences run: the host, or a GPU with
KVFERRY_TEST_GPU=1.

A libllama built for CUDA keeps its caches in device memory. An engine for the host would leave them
to llama.cpp's own calls, so that a test would not test kvferry. An engine for CUDA also serves
caches in host memory, so that any libllama can be tested with it.
"""

from __future__ import annotations

import os
from typing import Literal

ON_GPU = bool(os.environ.get("KVFERRY_TEST_GPU"))

DEVICES: Literal["host", "cuda"] = "cuda" if ON_GPU else "host"
"""The ``devices`` of an engine for llama.cpp's contexts."""

LARGER = 4 if ON_GPU else 1
"""How many times larger a state must be on this device, so that its transfer takes some
milliseconds."""

LARGE_TOKENS = 32 * LARGER
"""Tokens of the fixture `large_model` whose transfer takes some milliseconds."""
