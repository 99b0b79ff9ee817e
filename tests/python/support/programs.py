"""Python programs that tests run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]


def environment_with_support(changes: Mapping[str, str | None]) -> dict[str, str]:
    """Returns the environment of a Python program that can import ``support``. ``changes`` replaces
    variables; None removes one."""
    path = [str(_TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    changed = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **changes}
    return {name: value for name, value in changed.items() if value is not None}


def run_python(
    *arguments: str,
    environment: Mapping[str, str | None] | None = None,
    folder: Path | None = None,
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Runs Python with these arguments, and returns the finished process with its output.

    ``environment`` replaces variables; None removes one. The program can import ``support``. It
    runs in ``folder``, or in the current one. Raises TimeoutExpired after ``timeout`` seconds.
    """
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment_with_support(environment or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_kvferry(
    *arguments: str, first: str = "", environment: Mapping[str, str | None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command kvferry in a process of its own, after the Python statements ``first``."""
    code = f"import sys; {first}\nfrom kvferry.tools.cli import main; sys.exit(main(sys.argv[1:]))"
    return run_python("-c", code, *arguments, environment=environment, timeout=240)
