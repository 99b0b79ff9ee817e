"""Where the tests of llama.cpp's sequences run: on the host, or on a GPU with KVFERRY_TEST_GPU=1.

A libllama built for CUDA keeps its caches in device memory, which an engine for the host leaves to
llama.cpp's own calls: a test would see those, and nothing of kvferry. An engine for CUDA serves
caches in host memory as well, so that there any libllama will do.
"""

from __future__ import annotations

import os
from typing import Literal

ON_GPU = bool(os.environ.get("KVFERRY_TEST_GPU"))

DEVICES: Literal["host", "cuda"] = "cuda" if ON_GPU else "host"
"""What an engine is made for that serves a context of llama.cpp."""

LARGER = 4 if ON_GPU else 1
"""How many times as large a state must be for its transfer to take some milliseconds there too."""
