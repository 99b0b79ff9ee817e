"""Pages of the documentation's site that are made from other files of the tree.

A hook of mkdocs (mkdocs.yml names it). Files outside of docs/ become pages, and links between
these files and the pages in docs/ are rewritten, so that a link works on disk and on the site.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
HEADER = "include/kvferry.h"
GO_PACKAGE = "examples/go/kvferry"


def header_page(source: str) -> str:
    """The header, a heading for each of its sections."""
    page = [
        "# C reference",
        f"This is `{HEADER}`, whole and unchanged, a heading for each of its sections.",
    ]
    # A section begins with a comment whose first line is a rule; its titles stand below rules.
    parts = re.split(r"^(?=/\* -{20,}\n)", source, flags=re.MULTILINE)
    line = 1
    for part in parts:
        banner = part.partition("*/")[0] if part.startswith("/* --") else ""
        titles = re.findall(r"-{20,}\n \* (.+?)(?=[:.]\s|\n)", banner)
        page.append(f"## {': '.join(titles) or 'Introduction'}")
        page.append(f'```c linenums="{line}"\n{part.rstrip()}\n```')
        line += part.count("\n")
    return "\n\n".join(page) + "\n"


def go_page() -> str:
    """What `go doc` says of the Go package."""
    page = ["# Go reference"]
    if shutil.which("go") is None:
        page.append(
            f"No Go was installed where this site was built. `go doc -all` in `{GO_PACKAGE}` shows "
            "this page."
        )
    else:
        text = subprocess.run(
            ["go", "doc", "-all"],
            cwd=ROOT / GO_PACKAGE,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        page.append(f"This is what `go doc -all` prints in `{GO_PACKAGE}`.")
        # Its sections: CONSTANTS, VARIABLES, FUNCTIONS, TYPES.
        for part in re.split(r"^(?=[A-Z]{5,}\n\n)", text, flags=re.MULTILINE):
            title = re.match(r"[A-Z]{5,}\n\n", part)
            page.append(f"## {title[0].strip().capitalize() if title else 'Package'}")
            page.append(f"```go\n{part.removeprefix(title[0] if title else '').rstrip()}\n```")
    return "\n\n".join(page) + "\n"


def text_of(path: str) -> Callable[[], str]:
    return (ROOT / path).read_text


# Which file of the tree is which page.
PAGES: dict[str, tuple[str, Callable[[], str]]] = {
    "README.md": ("index.md", text_of("README.md")),
    "CONTRIBUTING.md": ("contributing.md", text_of("CONTRIBUTING.md")),
    "CHANGELOG.md": ("changelog.md", text_of("CHANGELOG.md")),
    "examples/README.md": ("examples.md", text_of("examples/README.md")),
    "examples/go/README.md": ("how-to/go-kvcache.md", text_of("examples/go/README.md")),
    HEADER: ("reference/c.md", lambda: header_page((ROOT / HEADER).read_text())),
    GO_PACKAGE: ("reference/go.md", go_page),
}
SOURCES = {page: source for source, (page, _) in PAGES.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, content in PAGES.values():
        files.append(File.generated(config, page, content=content()))
    return files


# Text, target: of a link or a picture.
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links of files to the pages that these files are on the site.

    A file of the tree that is no page has no address on the site: of its link the text remains.
    """
    here = page.file.src_uri
    folder = Path(SOURCES.get(here, f"docs/{here}")).parent

    def link(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        parts = urlsplit(target)
        if parts.scheme or not parts.path:
            return found[0]
        path = os.path.normpath(folder / parts.path)
        if path in PAGES:
            destination = PAGES[path][0]
        elif path.startswith("docs/"):
            destination = path.removeprefix("docs/")
        elif (ROOT / path).exists():
            return text
        else:
            return found[0]  # mkdocs says that it leads nowhere
        relative = os.path.relpath(destination, Path(here).parent)
        return f"{mark}[{text}]({parts._replace(path=relative).geturl()})"

    return LINK.sub(link, markdown)
