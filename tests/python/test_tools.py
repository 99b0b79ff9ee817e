"""The tools that check prose and links find what they are for."""

from __future__ import annotations

from pathlib import Path

import kvferry
import pytest
from support.programs import run_python

TOOLS = Path(__file__).parents[2] / "tools"


def findings(tool: str, path: Path) -> list[str]:
    """What a tool says of one file, line by line; it fails if it says anything."""
    done = run_python(str(TOOLS / tool), str(path))
    assert done.stderr == ""
    found = done.stdout.splitlines()
    assert done.returncode == (1 if found else 0)
    return [line.removeprefix(f"{path}:") for line in found]


PLAIN = "The buffer must not change until the completion. Is it pinned? It need not be."


@pytest.mark.parametrize(
    "planted",
    [
        "The bytes land in the buffer.",
        "The bytes of a load are given\nback.",
        "The call can't fail.",
        "Was the transfer faster, there is no error.",
        "It waits. Meant are those of the context.",
        "One " + "and one " * 30 + "is two.",
    ],
)
@pytest.mark.parametrize(
    ("suffix", "begin", "end"),
    [
        (".md", "", ""),
        (".h", "/* ", " */\n"),
        (".cpp", "int i; /* ", " */"),
        (".py", '"""', '"""\n'),
    ],
)
def test_prose_finds_what_is_not_plain(
    tmp_path: Path, planted: str, suffix: str, begin: str, end: str
) -> None:
    path = tmp_path / f"planted{suffix}"
    path.write_text(f"{begin}{PLAIN}{end}")
    assert findings("prose.py", path) == []

    path.write_text(f"{begin}{planted}{end}")
    assert len(findings("prose.py", path)) == 1


@pytest.mark.parametrize(
    ("name", "line", "text"),
    [
        ("a.md", "5", "# Title\n\n| a | b |\n| -- | -- |\n| it lands | b |\n"),
        ("a.go", "3", "package a\n// The pool.\n// It lands\n// here.\nvar x = `lands`\n"),
        ("a.cpp", "4", 'auto x = "lands"; // the bytes,\n\n// which\n// lands\n'),
        ("a.py", "4", 'x = "lands"\n\n# which\n# lands\n'),
        ("a.py", "4", 'x: int\n"""What\n\nlands."""\n'),
        ("a.cpp", "4", "void f();\n\n\nint give_back();"),
    ],
)
def test_prose_reads_comments_docstrings_and_names_of_code(
    tmp_path: Path, name: str, line: str, text: str
) -> None:
    path = tmp_path / name
    path.write_text(text)

    found = findings("prose.py", path)

    assert [each.split(":")[0] for each in found] == [line]


def test_prose_leaves_code_in_prose_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("Call `give_back` or `can't`.\n\n```\nlands: it's\n```\n\n    arrive\n")

    assert findings("prose.py", path) == []


def test_links_to_missing_files_and_headings_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Say `what()`, twice\n\n# Say `what()`, twice\n")
    path = tmp_path / "page.md"
    path.write_text(
        "# A heading\n\n"
        "[a](#a-heading) [b](other.md#say-what-twice-1) [c](https://example.org/none)\n\n"
        "[e](#another)\n\n[f](other.md#say-what-twice-2)\n\n[g](missing.md) ![h](missing.png)\n"
    )

    assert [line.split(": ")[0:2] for line in findings("check_pages.py", path)] == [
        ["5", "'#another'"],
        ["7", "'other.md#say-what-twice-2'"],
        ["9", "'missing.md'"],
        ["9", "'missing.png'"],
    ]


def test_names_and_paths_that_are_gone_are_found(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "`kvf_llama_save` takes `KVF_SAVE_AUTO`: `include/kvferry.h`, `Job::cancel`, `*.gone`.\n\n"
        "`kvf_gone()`\n\n`KVF_GONE`\n\n`cabi/gone.cpp`\n\n`Job::gone_for_ever`\n\n`KVF_SAVE_*`\n"
    )

    assert [line.split(": ")[0:2] for line in findings("check_pages.py", path)] == [
        ["3", "`kvf_gone`"],
        ["5", "`KVF_GONE`"],
        ["7", "`cabi/gone.cpp`"],
        ["9", "`Job::gone_for_ever`"],
    ]


def test_the_reference_has_every_public_name() -> None:
    page = (TOOLS.parent / "docs" / "reference" / "python.md").read_text().splitlines()

    described = {line.removeprefix("::: kvferry.") for line in page if line.startswith(":::")}
    further = {
        "metrics.StoreCollector",
        "store.Explanation",
        "store.Listed",
        "store.Share",
        "store.mooncake.MooncakeObjects",
        "store.objects.Objects",
    }

    assert described == set(kvferry.__all__) - {"__version__"} | further
