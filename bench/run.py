"""Runs the benchmark that documentation quotes: `make bench`, or this file with the same arguments.

The benchmark itself is `kvferry bench` and lives in the package (pyshim/kvferry/tools/bench), so
that users can measure their own machines. This adds what only developers have: a folder under
build/, and the commit that was measured.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kvferry.tools.cli import main

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "bench"


def commit() -> str:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


if __name__ == "__main__":
    # A later --out wins over this one.
    status = main(["bench", "--out", str(OUT), *sys.argv[1:]])
    print(f"measured: {commit()}")
    sys.exit(status)
