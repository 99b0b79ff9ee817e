"""Tries kvferry on each libllama, and prints the tables of docs/builds.md.

    python builds_table.py [--write | --check] FOLDER...

Each folder has one libllama. With --check it is an error if the tables of the page differ; with
--write they are written into the page.

Each folder is tried in a process of its own (`builds_table.py --one FOLDER`), because a process has
only one libllama, and because a damaged state that reaches libllama may end the process.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "builds.md"
BEGIN, END = "<!-- seen: begin -->\n", "<!-- seen: end -->\n"

CACHES = ["flash", "transposed", "streams"]
"""Of `like_contexts.CACHES`: those whose states differ in more than the width of their rows."""

Seen = dict[str, dict[str, str]]
"""What was seen, by table and row."""


# ---- In the process of one libllama --------------------------------------------------------------


def see(folder: str) -> Seen:
    os.environ["LLAMA_CPP_LIB_PATH"] = folder
    from kvferry.tools.synthetic import KINDS

    looks = {"format": _format, "moved": _moved, "damaged": _damaged}
    seen: Seen = {"library": _library(), **{table: {} for table in looks}}
    for kind in KINDS:
        for table, look in looks.items():
            outcomes = [_in_a_context(kind, cache, look) for cache in CACHES]
            seen[table][kind] = "; ".join(dict.fromkeys(outcomes))
    return seen


def _library() -> dict[str, str]:
    from kvferry.tools import libllama
    from support.llama_reference import LAYOUTS, LIBRARY_FOLDER, ContextParams, keep_log

    [layout] = [builds for builds, one in LAYOUTS.items() if one is ContextParams]
    ggml = libllama.Libllama(libllama.find(LIBRARY_FOLDER)).build.rpartition("ggml ")[2]
    keep_log()
    return {
        "ggml": ggml.split()[0],
        "context parameters as in": layout,
        "tap": _in_a_context("llama", "flash", _tap),
    }


def _in_a_context(kind: str, cache: str, look: Callable[..., Any]) -> str:
    """Returns the outcome of `look`, or that this libllama does not have the kind."""
    import anyio
    from support.llama_reference import Refused

    with _contexts(kind, cache) as make:
        try:
            make()
        except Refused as refusal:
            if "unknown model architecture" not in str(refusal):
                raise
            return "no such model"
        outcome: str = anyio.run(look, make)
        return outcome


class _contexts:
    """Makes contexts of one kind of model and cache, and frees them at the end."""

    def __init__(self, kind: str, cache: str) -> None:
        self._kind, self._cache = kind, cache

    def __enter__(self) -> Callable[[], Any]:
        import contextlib
        import tempfile

        from kvferry.tools.synthetic import write_model
        from support.like_contexts import CACHES as OPTIONS
        from support.llama_reference import Model, model_sizes

        self._stack = contextlib.ExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        path = write_model(self._kind, folder / "model.gguf", **model_sizes(self._kind))
        model: Any = None

        def make() -> Any:
            nonlocal model
            if model is None:
                model = self._stack.enter_context(Model(path))
            return self._stack.enter_context(model.context(**OPTIONS[self._cache]))

        return make

    def __exit__(self, *error: object) -> None:
        self._stack.close()


async def _tap(make: Callable[[], Any]) -> str:
    import kvferry

    async with kvferry.Engine("host") as engine:
        try:
            return "possible" if engine.attach(make().address).describe()["tap"] else "not possible"
        except kvferry.KvferryError as error:
            return f"not possible: {error}"


async def _format(make: Callable[[], Any]) -> str:
    """Returns kvferry's name for the format of a state with cells."""
    import kvferry

    context = make()
    context.decode(0, context.model.prompt(20))
    async with kvferry.Engine("host") as engine:
        said = engine.attach(context.address).describe()
    name: str = said["format"]
    return name


TARGET = 2


async def _moved(make: Callable[[], Any]) -> str:
    """Moves a sequence into two other contexts: one where the target has other content, and one
    that has never had a cell."""
    source = make()
    source.decode_in_turn([0, 1, 3], 40)
    outcomes = []
    for in_use in (True, False):
        ours, like = make(), make()
        for context in (ours, like) if in_use else ():
            context.decode_in_turn([1, TARGET], 20)
        outcome = await _moved_to(source, ours, like)
        outcomes.append(outcome if in_use else f"into a fresh context {outcome}")
    return outcomes[0] if outcomes[1].endswith(f" {outcomes[0]}") else "; ".join(outcomes)


async def _moved_to(source: Any, ours: Any, like: Any) -> str:
    import kvferry
    from support.like_contexts import by_llama_cpp

    state, before = source.state_get(0), ours.state_get(TARGET)
    async with kvferry.Engine("host") as engine:
        try:
            llama = engine.attach(source.address)
            snapshot = await llama.save(0)
        except kvferry.KvferryError as error:
            return f"no save ({type(error).__name__})"
        if by_llama_cpp(llama, snapshot) != state:
            return "WRONG BYTES SAVED"
        try:
            await engine.attach(ours.address).load(snapshot, TARGET)
        except kvferry.KvferryError as error:
            return f"no load ({type(error).__name__}), {_left(ours, before)}"
    if like.state_set(TARGET, state) != len(state):
        return "loaded, what llama.cpp refuses"
    if ours.state_get(TARGET) != like.state_get(TARGET):
        return "WRONG BYTES LOADED"
    if ours.decode(TARGET, [7]).tobytes() != like.decode(TARGET, [7]).tobytes():
        return "OTHER LOGITS"
    return "right"


async def _damaged(make: Callable[[], Any]) -> str:
    """Loads states of a wrong length into a sequence in use."""
    import kvferry

    source, ours = make(), make()
    source.decode(0, source.model.prompt(40))
    outcomes = []
    async with kvferry.Engine("host") as engine:
        llama = engine.attach(ours.address)
        state = (await engine.attach(source.address).save(0)).to_bytes()
        for damaged in (state[: len(state) // 2], state[:-1], state + bytes(4)):
            ours.seq_rm(TARGET)
            ours.decode(TARGET, ours.model.prompt(20))
            before = ours.state_get(TARGET)
            try:
                await llama.load(damaged, TARGET)
            except kvferry.KvferryError:
                outcomes.append(f"refused, {_left(ours, before)}")
            else:
                outcomes.append("LET THROUGH")
    return "; ".join(dict.fromkeys(outcomes))


def _left(context: Any, before: bytes) -> str:
    """Returns what a refused load has left of its target."""
    if context.state_get(TARGET) == before:
        return "nothing lost"
    return "sequence emptied" if context.pos_max(TARGET) == -1 else "SEQUENCE CHANGED"


# ---- All of them ---------------------------------------------------------------------------------


def see_all(folders: Sequence[str]) -> dict[str, Seen]:
    """Returns what was seen, by the name of each folder."""
    seen: dict[str, Seen] = {}
    for folder in folders:
        child = subprocess.run(
            [sys.executable, __file__, "--one", folder],
            stdout=subprocess.PIPE,
            text=True,
            timeout=600,
            check=True,
        )
        seen[Path(folder).resolve().name] = json.loads(child.stdout)
    return seen


def tables(seen: dict[str, Seen]) -> str:
    lines = []
    for table, rows in next(iter(seen.values())).items():
        title = "" if table == "library" else table
        lines += [
            f"| {title} | {' | '.join(seen)} |",
            "| -- " * (len(seen) + 1) + "|",
            *(
                f"| {row} | {' | '.join(one[table][row] for one in seen.values())} |"
                for row in rows
            ),
            "",
        ]
    return "\n".join(["", *lines, ""])


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--one"]:
        print(json.dumps(see(arguments[1])))
        return 0
    folders = [argument for argument in arguments if not argument.startswith("--")]
    now = tables(see_all(folders))
    print(now)
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    there, _, after = rest.partition(END)
    if "--write" in arguments:
        PAGE.write_text(before + BEGIN + now + END + after)
    elif "--check" in arguments and there != now:
        difference = difflib.unified_diff(
            there.splitlines(), now.splitlines(), str(PAGE), "seen now", lineterm=""
        )
        print("\n".join(difference), file=sys.stderr)
        print("make builds-table writes what is seen now into the page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
