"""The bindings with which the command line uses a libllama.

Programs have their own bindings and need none of this. The command line has bindings of its own
because it must work with any libllama, with or without llama-cpp-python, and because other bindings
often fit another release, whose ``llama_context_params`` are laid out differently.
"""

from .context import Context, ContextOptions, Model, Step
from .errors import LlamaError
from .finding import ENVIRONMENT_VARIABLE, Found, find
from .library import Libllama
from .parameters import CACHE_TYPES, CacheType

__all__ = [
    "CACHE_TYPES",
    "ENVIRONMENT_VARIABLE",
    "CacheType",
    "Context",
    "ContextOptions",
    "Found",
    "Libllama",
    "LlamaError",
    "Model",
    "Step",
    "find",
]
