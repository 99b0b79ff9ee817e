"""A libllama of the user's choice, as far as the command line drives one.

Programs have bindings of their own and need none of this. The command line doesn't use theirs
because it must find and drive whatever libllama there is, with or without llama-cpp-python, and
because bindings and library often differ by a release in the layout of ``llama_context_params``.
"""

from .context import Context, ContextOptions, Model, Step
from .errors import LlamaError
from .finding import ENVIRONMENT_VARIABLE, Found, find
from .library import Libllama

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Context",
    "ContextOptions",
    "Found",
    "Libllama",
    "LlamaError",
    "Model",
    "Step",
    "find",
]
