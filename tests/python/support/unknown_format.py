"""A libllama that writes its states in a format that nobody has seen.

A copy of the real one in which the number that begins every state is another. It writes that number
and demands it, so that it goes on reading what it writes, and refuses what others write.
"""

from __future__ import annotations

from pathlib import Path

MAGIC = (0xAF143CD8).to_bytes(4, "little")
"""`io_magic` in llama-context.cpp: how the known formats begin, since there is such a number."""

NUMBERS = {
    # No format of kvferry's begins like this: an empty sequence tells already.
    "nothing-parses": 0x5EED5EED,
    # Read without a frame, an empty sequence 0 is one of two attention caches. That there is
    # something else tells only a sequence with cells.
    "empty-parses": 1,
}


class NoMagic(Exception):
    """This libllama has no number to replace."""


def write_libllama(folder: Path, real: Path, number: int, *, everywhere: bool = True) -> None:
    """Fills `folder` with a copy of the libllama in `real`, and with links to what it needs.

    Unless the number is replaced `everywhere`, it is in the last place alone: data, which is
    written, while the code before demands the old number. Such a libllama refuses its own states.
    Raises NoMagic.
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
