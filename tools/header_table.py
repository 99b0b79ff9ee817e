"""Copies the header's table of what may be done beside a transfer into docs/async.md, or checks
that it stands there.

    python tools/header_table.py            copies
    python tools/header_table.py --check    fails unless it stands there
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mdformat

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
HEADER = ROOT / "include" / "kvferry.h"
PAGE = ROOT / "docs" / "async.md"
TITLE = "What may be done while a transfer is in flight"
BEGIN = "<!-- From include/kvferry.h, by tools/header_table.py. -->\n"
END = "<!-- The end. -->\n"


def comment() -> str:
    """The comment with the table, without the marks of a comment; its notes become a list."""
    found = re.search(rf"/\* {TITLE}\n(.*?) \*/", HEADER.read_text(), re.DOTALL)
    if found is None:
        raise SystemExit(f"{HEADER}: no comment begins with '{TITLE}'")
    lines = [line.removeprefix(" *").removeprefix(" ") for line in found[1].splitlines()]
    notes = re.sub(r'^(\d|"no"): ', r"- \1: ", "\n".join(lines[1:]).strip(), flags=re.MULTILINE)
    return notes + "\n"


def section() -> str:
    """The page's section, laid out as .mdformat.toml has it for all Markdown."""
    layout = tomllib.loads((ROOT / ".mdformat.toml").read_text())
    return mdformat.text(f"## {TITLE}\n\n{comment()}", options=layout, extensions={"gfm", "mkdocs"})


def main() -> int:
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    wanted = f"{before}{BEGIN}\n{section()}\n{END}{after}"
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(wanted)
    elif page != wanted:
        print(f"{PAGE} has another table than {HEADER}: run python tools/header_table.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
