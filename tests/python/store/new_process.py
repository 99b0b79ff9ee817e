"""A new process that restores what another one has kept."""

from __future__ import annotations

import json
from pathlib import Path

from disk_stores import BLOCK, TOKENS
from support.llama_reference import LIBRARY_FOLDER, Context
from support.programs import run_python

_PROGRAM = """
import json, sys
from pathlib import Path
import anyio, kvferry
from support.llama_reference import Model
async def main(path, tokens, options, out):
    with Model(path) as model, model.context(n_ctx=1024) as context:
        prompt = [*model.prompt(int(tokens)), 7]
        store = kvferry.Store(ram="64 MiB", **json.loads(options))
        async with kvferry.Engine("host") as engine, store:
            count = await store.restore(engine.attach(context.address), 0, prompt)
        Path(out).write_bytes(context.decode(0, prompt[count:]).tobytes())
        print(count)
anyio.run(main, *sys.argv[1:])
"""


def assert_a_new_process_goes_on(
    model: Path, like: Context, state: bytes, folder: Path, **options: str
) -> None:
    """Asserts that a Store with these options finds a prompt in a new process, and that the process
    goes on as ``like``, an empty context, does with the prompt's ``state``."""
    logits = folder / "logits"
    done = run_python(
        "-c",
        _PROGRAM,
        str(model),
        str(TOKENS),
        json.dumps({"block_tokens": BLOCK, **options}),
        str(logits),
        environment={
            "KVFERRY_LLAMA_LIB": str(LIBRARY_FOLDER),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{TOKENS}\n"
    like.state_set(0, state)
    assert logits.read_bytes() == like.decode(0, [7]).tobytes()
