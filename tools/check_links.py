"""Checks the links between the Markdown files of the tree: that files and headings exist.

    python tools/check_links.py             every Markdown file that git knows
    python tools/check_links.py FILE...     these files

The site of the documentation has its own check (`mkdocs build --strict`); this one is for people
who read the files on disk or in a browser of repositories. Prints one line for each broken link;
fails if there is one. Links to other hosts are not followed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent


def inline_tokens(path: Path) -> Iterator[tuple[Token, Token]]:
    """Each block with text, and the token before it, which tells what kind of block it is."""
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text())
    for before, token in pairwise(tokens):
        if token.type == "inline":
            yield before, token


def anchors(path: Path) -> set[str]:
    """The anchors of a file's headings, as GitHub makes them."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for before, token in inline_tokens(path):
        if before.type == "heading_open":
            text = "".join(child.content for child in token.children or [])
            anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
            seen[anchor] += 1
    return found


def links(path: Path) -> Iterator[tuple[int, str]]:
    """The links and pictures of a file, each with its block's line."""
    for _, token in inline_tokens(path):
        for child in token.children or []:
            target = child.attrGet("href") or child.attrGet("src")
            if target is not None:
                yield (token.map or [0])[0] + 1, str(target)


def broken_links(path: Path) -> Iterator[tuple[int, str]]:
    for line, link in links(path):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = path.parent / unquote(parts.path) if parts.path else path
        if not target.exists():
            yield line, f"'{link}': no such file"
        elif parts.fragment and parts.fragment not in anchors(target):
            yield line, f"'{link}': {target.name} has no such heading"


def main() -> int:
    paths = [Path(name) for name in sys.argv[1:]]
    if not paths:
        names = subprocess.run(
            ["git", "ls-files", "-z", "*.md"],
            cwd=ROOT,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        paths = [ROOT / name for name in names.split("\0") if name]
    broken = 0
    for path in paths:
        for line, text in broken_links(path):
            print(f"{path}:{line}: {text}")
            broken += 1
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
