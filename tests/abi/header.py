"""What the public header must be like, beside what a compiler says of it.

python header.py form HEADER                       says the same things of everything, in one form
python header.py complete HEADER NUMBERS.C MAP     nothing of it is missing there
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LABELS = ["Thread:", "May block:", "Returns:", "Errors:", "Since:"]
ENUM = re.compile(r"^typedef enum (\w+) \{\n(.*?)^\} \1;$", re.MULTILINE | re.DOTALL)
STRUCT = re.compile(r"^(?:typedef )?struct (\w+) \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
ENUMERATOR = re.compile(r"^ *(KVF_\w+) = (-?\d+),")
FIELD = re.compile(r"^ *[a-z]\w*(?: \w+)* \*?(\w+)(?:\[\d+\])?;")
FUNCTION = re.compile(r"^KVF_API [\w ]+[ *](kvf_\w+)\(", re.MULTILINE)


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def enumerators(header: str) -> list[tuple[str, int]]:
    return [
        (found[1], int(found[2]))
        for enum in ENUM.finditer(header)
        for line in without_comments(enum[2]).splitlines()
        if (found := ENUMERATOR.match(line))
    ]


def fields(header: str) -> list[tuple[str, str]]:
    return [
        (struct[1], found[1])
        for struct in STRUCT.finditer(header)
        for line in without_comments(struct[2]).splitlines()
        if (found := FIELD.match(line))
    ]


def faults_of_functions(header: str) -> list[str]:
    """Each has a comment of its own: a sentence, then the labels, each once and in order."""
    faults = []
    for function in FUNCTION.finditer(header):
        before = header[: function.start()]
        comment = before[before.rfind("/*") :]
        labels = re.findall(rf"^ \* ({'|'.join(LABELS)}) ", comment, re.MULTILINE)
        if not comment.endswith(" */\n") or labels != LABELS:
            faults.append(f"{function[1]}: its comment has {labels}, not {LABELS}")
    return faults


def faults_of_lists(header: str) -> list[str]:
    """Enumerators and fields stand one on a line, each with a comment above or behind."""
    faults = []
    for block in [*ENUM.finditer(header), *STRUCT.finditer(header)]:
        commented = False
        for line in re.sub(r"/\*.*?\*/", "//", block[2], flags=re.DOTALL).splitlines():
            alone = line.strip() == "//"
            if alone:
                commented = True
                continue
            one = ENUMERATOR.match(line) or FIELD.match(line)
            if not one or line[one.end() :].strip() not in ("", "//"):
                faults.append(f"{block[1]}: '{line.strip()}' is not one name")
            elif not commented and "//" not in line:
                faults.append(f"{block[1]}: '{line.strip()}' has no comment")
            commented = False
    names = [name for name, _ in enumerators(header)]
    faults += [f"{name} is defined twice" for name in set(names) if names.count(name) > 1]
    if re.search(r"\benum \{", header):
        faults.append("an enum has no name")
    return faults


def faults_of_contents(header: str) -> list[str]:
    """The table of contents has the sections that there are, in their order."""
    contents = header[header.index("* Contents\n") : header.index("* Quick start\n")]
    listed = re.findall(r"^ \*   (\d+ .+?)(?:  .*)?$", contents, re.MULTILINE)
    sections = re.findall(r"^ \* (\d+ [^:,\n]+).*$", header, re.MULTILINE)
    return [] if listed == sections else [f"contents: {listed}, sections: {sections}"]


def form(header: str) -> list[str]:
    return [
        *faults_of_functions(header),
        *faults_of_lists(header),
        *faults_of_contents(header),
    ]


def complete(header: str, numbers: str, symbols: str) -> list[str]:
    wanted = [f"IS({name}, {number});" for name, number in enumerators(header)]
    wanted += [f"AT({struct}, {field}, " for struct, field in fields(header)]
    faults = [f"numbers.c has no {line}" for line in wanted if line not in numbers]
    declared = set(FUNCTION.findall(header))
    exported = set(re.findall(r"^ +(kvf_\w+);", symbols, re.MULTILINE))
    return faults + [
        f"{name} is not both declared and exported" for name in sorted(declared ^ exported)
    ]


def main(check: str, *files: str) -> int:
    texts = [Path(file).read_text() for file in files]
    faults = form(*texts) if check == "form" else complete(*texts)
    print(*faults, sep="\n", end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
