"""Makes Markdown of the lists in docstrings, for the site (an extension of griffe; see mkdocs.yml).

Docstrings describe parameters in the form of a dictionary, which is easy to read in code:

    name
        What it means.

Markdown would take the second line for a part of the paragraph.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# A word alone on its line, and the lines below it that are indented.
ENTRY = re.compile(r"^(\w+)\n((?:[ ]{4}.*(?:\n|$))+)", re.MULTILINE)


def as_definition(entry: re.Match[str]) -> str:
    name, text = entry.groups()
    return f"\n`{name}`\n\n:   {text[4:]}"


class DefinitionLists(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ENTRY.sub(as_definition, obj.docstring.value)
