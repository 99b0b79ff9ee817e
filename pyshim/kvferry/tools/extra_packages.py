"""The packages of the extra ``demo``, which the tools use where they are installed."""

from __future__ import annotations

import importlib.util

LIBLLAMA = "xllamacpp"
"""The package that contains a prebuilt libllama."""

PACKAGES = (LIBLLAMA, "gguf", "matplotlib")
"""All of them, as in pyproject.toml. gguf writes synthetic models, matplotlib draws pictures."""


def install_command(*, libllama: bool) -> str:
    """Returns the shell command that installs those of the packages that are missing here.

    ``libllama``: whether a libllama is missing too. The command names packages rather than the
    extra, and so is right wherever kvferry itself was installed from.
    """
    missing = [
        package
        for package in PACKAGES
        if (libllama or package != LIBLLAMA) and importlib.util.find_spec(package) is None
    ]
    return f"pip install {' '.join(missing)}"
