"""A libllama that writes its states in an unknown format.

It is a copy of the real one with another number at the beginning of every state. It writes and
requires that number, so that it reads its own states and refuses those of others.
"""

from __future__ import annotations

from pathlib import Path

MAGIC = (0xAF143CD8).to_bytes(4, "little")
"""`io_magic` in llama-context.cpp: the number at the beginning of the known formats."""

NUMBERS = {
    # No known format begins like this, so that an empty sequence already shows it.
    "nothing-parses": 0x5EED5EED,
    # States of builds before b9842 begin with no such number. Read as one of those, the state of an
    # empty sequence 0 has two attention caches; only a sequence with cells shows the difference.
    "empty-parses": 1,
}


class NoMagic(Exception):
    """This libllama begins its states with no number."""


def write_libllama(folder: Path, real: Path, number: int, *, everywhere: bool = True) -> None:
    """Fills `folder` with a changed copy of the libllama in `real`, and links to what it needs.

    If the number is not replaced `everywhere`, it is replaced only in its last place, which is the
    data that is written. The code before it still requires the old number, so that this libllama
    refuses its own states. Raises NoMagic.
    """
    library = (real / "libllama.so").resolve()
    code = library.read_bytes()
    if MAGIC not in code:
        raise NoMagic(library)
    folder.mkdir(parents=True)
    kept = 0 if everywhere else code.rindex(MAGIC)
    replaced = code[kept:].replace(MAGIC, number.to_bytes(4, "little"))
    (folder / library.name).write_bytes(code[:kept] + replaced)
    for path in real.iterdir():
        if path.resolve() != library:
            (folder / path.name).symlink_to(path.resolve())
        elif path.name != library.name:
            (folder / path.name).symlink_to(library.name)
