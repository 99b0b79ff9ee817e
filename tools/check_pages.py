"""Checks that the Markdown files of the tree name things that exist.

    python tools/check_pages.py             every Markdown file that git knows but the changelog
    python tools/check_pages.py FILE...     these files

These must exist: the files and headings that links lead to (other hosts are not asked), the files
of this tree whose paths stand in `code`, and the names of the library in `code`: `kvf_something`,
`KVF_SOMETHING` and `Class::member`. Where a page says "`Class::member` in `cabi/file`", or has the
file in brackets behind the member, the file must have the member. Prints one line for each that
does not; fails if there is one. The site of the documentation has a check of its links too
(`mkdocs build --strict`); this one is for people who read the files on disk or in a browser of
repositories.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
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


# A path in one of the tree's folders.
PATH = re.compile(r"(?:cabi|pyshim|include|docs|tools|tests|examples|bench)/[\w./-]+")
NAME = re.compile(r"(?<![\w/.-])(?:kvf_\w+|KVF_\w+|[A-Z]\w+::\w+)(?![\w*])")


@cache
def words_of_sources() -> frozenset[str]:
    """The words of the library's sources and of its header."""
    sources = [path for folder in ("cabi", "include") for path in (ROOT / folder).rglob("*.*")]
    return frozenset(
        word
        for path in sources
        if path.suffix in (".h", ".cpp")
        for word in re.findall(r"\w+", path.read_text())
    )


MEMBER = re.compile(r"([A-Z]\w+)::(~?\w+)")


def has_member(file: Path, member: re.Match[str]) -> bool:
    """Whether a .cpp file defines `Class::member`, or a header has both words."""
    text = file.read_text()
    if file.suffix == ".cpp":
        return re.search(rf"\b{member[1]}::{member[2]}\b", text) is not None
    return all(re.search(rf"\b{word}\b", text) for word in member.groups())


def misplaced_members(path: Path) -> Iterator[tuple[int, str]]:
    for _, token in inline_tokens(path):
        children = [child for child in token.children or [] if child.type != "softbreak"]
        for name, between, file in zip(children, children[1:], children[2:], strict=False):
            if name.type != "code_inline" or file.type != "code_inline":
                continue
            if between.content.strip() not in ("in", "("):
                continue
            member = MEMBER.fullmatch(name.content)
            place = ROOT / file.content
            if member is None or not file.content.startswith("cabi/") or not place.is_file():
                continue
            if not has_member(place, member):
                line = (token.map or [0])[0] + 1
                yield line, f"`{name.content}`: not in {file.content}"


def missing_things(path: Path) -> Iterator[tuple[int, str]]:
    for _, token in inline_tokens(path):
        for child in token.children or []:
            if child.type != "code_inline":
                continue
            line = (token.map or [0])[0] + 1
            if PATH.fullmatch(child.content) and not (ROOT / child.content).exists():
                yield line, f"`{child.content}`: no such file"
            for name in NAME.findall(child.content):
                if not words_of_sources().issuperset(name.split("::")):
                    yield line, f"`{name}`: no such name in the library"


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
        # What the changelog names may be gone.
        paths = [ROOT / name for name in names.split("\0") if name and name != "CHANGELOG.md"]
    missing = 0
    for path in paths:
        for line, text in sorted(
            [*broken_links(path), *missing_things(path), *misplaced_members(path)]
        ):
            print(f"{path}:{line}: {text}")
            missing += 1
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
