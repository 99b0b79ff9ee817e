"""Checks that prose is plain: Markdown, and the comments and docstrings of code.

    python tools/prose.py              every file that tools/prose.toml names
    python tools/prose.py FILE...      these files, whether it names them or not

Prints one line for each finding. Fails if there is one.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
CODE_SPAN = re.compile(r"``.+?``|`[^`\n]*`", re.DOTALL)


@dataclass(frozen=True)
class Passage:
    """One block of prose: a paragraph, a table's cell, a comment."""

    line: int
    """Where it begins in its file."""
    text: str
    """Line breaks are those of the file; code in backticks is left out."""


# ---- Prose in files ------------------------------------------------------------------------------


def paragraphs(text: str, first_line: int = 1) -> Iterator[Passage]:
    """The prose of Markdown, without code."""
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "inline" and token.map and token.children:
            parts = {"softbreak": "\n", "hardbreak": "\n", "code_inline": "`code`"}
            words = "".join(
                child.content if child.type == "text" else parts.get(child.type, "")
                for child in token.children
            )
            yield Passage(first_line + token.map[0], words)


def blocks(comment: str, line: int) -> Iterator[Passage]:
    """The paragraphs of a comment without its marks, and the entries of its lists of words.

    A line that is indented by four is code. An entry is a word, two blanks or more, and a text.
    """
    paragraph: list[str] = []
    begin = line
    for number, text in enumerate([*comment.splitlines(), ""], line):
        content = text.strip()
        is_code = text.startswith("    ") or content.startswith(("|", "---", "==="))
        starts_entry = re.match(r"\S.{,30}?\S {2,}\S", content)
        if paragraph and (starts_entry or is_code or not content):
            yield Passage(begin, CODE_SPAN.sub("`code`", "\n".join(paragraph)))
            paragraph = []
        if content and not is_code:
            begin = begin if paragraph else number
            paragraph.append(content)


def c_comments(text: str) -> Iterator[tuple[int, int]]:
    """Where the comments of C, C++ and Go begin and end. Successive // comments are one."""
    token = re.compile(
        r'"(?:\\.|[^"\\\n])*"|`[^`]*`|\'(?:\\.|[^\'\\\n])+\''
        r"|/\*.*?\*/|//[^\n]*(?:\n[ \t]*//[^\n]*)*",
        re.DOTALL,
    )
    for found in token.finditer(text):
        if found[0].startswith(("/*", "//")):
            yield found.span()


def c_prose(text: str) -> Iterator[Passage]:
    for begin, end in c_comments(text):
        comment = re.sub(r"^[ \t]*(/\*|\*/|\*|//) ?", "", text[begin:end], flags=re.MULTILINE)
        yield from blocks(comment.removesuffix("*/"), text.count("\n", 0, begin) + 1)


def python_prose(text: str) -> Iterator[Passage]:
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.append((token.start[0], token.string.removeprefix("#").removeprefix(" ")))
    while comments:
        count = 1
        while count < len(comments) and comments[count][0] == comments[0][0] + count:
            count += 1
        yield from blocks("\n".join(words for _, words in comments[:count]), comments[0][0])
        del comments[:count]
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(docstring))):
                indent = " " * node.col_offset
                lines = [line.removeprefix(indent) for line in docstring.splitlines()]
                yield from blocks("\n".join(lines), node.lineno)


def c_names(text: str) -> str:
    """The code without its comments, which become blanks."""
    for begin, end in reversed(list(c_comments(text))):
        blanks = re.sub(r"[^\n]", " ", text[begin:end])
        text = text[:begin] + blanks + text[end:]
    return text


def python_names(text: str) -> str:
    lines = text.splitlines()
    kept = [""] * len(lines)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NAME:
            kept[token.start[0] - 1] += f"{token.string} "
    return "\n".join(kept)


# ---- Findings ------------------------------------------------------------------------------------


class Rules:
    def __init__(self, table: dict[str, object]) -> None:
        self.words = self._compiled(table["words"], re.IGNORECASE)
        self.names = self._compiled(table["names"], 0)
        first_words = table["first_words"]
        assert isinstance(first_words, list)
        self.first_words = re.compile(rf"(?:{'|'.join(first_words)})\b")
        self.longest_sentence = int(str(table["longest_sentence"]))

    @staticmethod
    def _compiled(table: object, flags: int) -> list[tuple[re.Pattern[str], str]]:
        assert isinstance(table, dict)
        return [(re.compile(rf"\b(?:{word})\b", flags), say) for word, say in table.items()]

    def of_prose(self, passage: Passage) -> Iterator[tuple[int, str]]:
        flat = passage.text.replace("\n", " ")

        def line_of(position: int) -> int:
            return passage.line + passage.text.count("\n", 0, position)

        for word, say in self.words:
            for found in word.finditer(flat):
                yield line_of(found.start()), f"'{found[0]}': {say}"
        begin = 0
        for sentence in re.split(r"(?<=[.!?;:])\s", flat):
            where = line_of(begin + 1)
            if not sentence.endswith("?") and self.first_words.match(sentence):
                yield where, f"'{sentence[:40]}...': put the subject first"
            count = len(sentence.split())
            if count > self.longest_sentence:
                yield where, f"'{sentence[:40]}...': {count} words: divide the sentence"
            begin += len(sentence) + 1

    def of_names(self, code: str) -> Iterator[tuple[int, str]]:
        for name, say in self.names:
            for found in name.finditer(code):
                yield code.count("\n", 0, found.start()) + 1, f"'{found[0]}': {say}"


READERS: dict[str, tuple[Callable[[str], Iterator[Passage]], Callable[[str], str] | None]] = {
    ".md": (paragraphs, None),
    ".py": (python_prose, python_names),
    ".pyi": (python_prose, python_names),
    **dict.fromkeys((".h", ".hpp", ".c", ".cpp", ".cu", ".go"), (c_prose, c_names)),
}


def findings(path: Path, rules: Rules) -> list[tuple[int, str]]:
    text = path.read_text()
    prose, names = READERS[path.suffix]
    found = [each for passage in prose(text) for each in rules.of_prose(passage)]
    if names:
        found += rules.of_names(names(text))
    return sorted(found)


def shown(path: Path) -> Path:
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def main() -> int:
    table = tomllib.loads((ROOT / "tools" / "prose.toml").read_text())
    rules = Rules(table)
    paths = [Path(name) for name in sys.argv[1:]]
    for pattern in [] if paths else [*table["pages"], *table["code"]]:
        matching = [path for path in sorted(ROOT.glob(pattern)) if path.suffix in READERS]
        if not matching:
            raise SystemExit(f"tools/prose.toml: '{pattern}' names no file")
        paths += matching
    count = 0
    for path in paths:
        for line, text in findings(path, rules):
            print(f"{shown(path)}:{line}: {text}")
            count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
