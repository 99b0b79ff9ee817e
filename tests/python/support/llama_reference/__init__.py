"""llama.cpp's own calls, with which kvferry is compared.

A thin layer over the loaded libllama: models, contexts, decoding into chosen sequences, and
llama.cpp's blocking calls for the state of a sequence. It has its own prototypes, because the
bindings of llama-cpp-python can be imported only with a libllama of the same release, and these
tests run with many. Its log is kept in `log_lines`, and printed only if KVFERRY_TEST_VERBOSE is
set.
"""

from __future__ import annotations

from support.llama_reference.builds import (
    BUILD,
    LIBRARY_FOLDER,
    NAMES_ROWS,
    UNFRAMED,
    fits,
    load_keeps_others,
    model_sizes,
)
from support.llama_reference.contexts import (
    CacheType,
    Context,
    ContextOptions,
    Logits,
    Model,
    Refused,
)
from support.llama_reference.library import (
    LAYOUTS,
    AbortCallback,
    ContextParams,
    bindings_fit,
    keep_log,
    llama,
    log_lines,
)

__all__ = [
    "BUILD",
    "LAYOUTS",
    "LIBRARY_FOLDER",
    "NAMES_ROWS",
    "UNFRAMED",
    "AbortCallback",
    "CacheType",
    "Context",
    "ContextOptions",
    "ContextParams",
    "Logits",
    "Model",
    "Refused",
    "bindings_fit",
    "fits",
    "keep_log",
    "llama",
    "load_keeps_others",
    "log_lines",
    "model_sizes",
]
