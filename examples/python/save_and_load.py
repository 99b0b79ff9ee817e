"""The smallest save and load: a sequence of llama.cpp leaves the KV cache, and comes back.

In the root of kvferry:

    pip install '.[demo]'
    python examples/python/save_and_load.py
"""

import tempfile
from pathlib import Path

import anyio
import kvferry
import numpy
from kvferry.tools.libllama import Context, ContextOptions, Libllama, Model, find
from kvferry.tools.synthetic import write_model

PROMPT = [(7 * index + 1) % 512 for index in range(200)]
NEXT = 42


async def save_and_load(context: Context) -> None:
    async with kvferry.Engine() as engine:  # CUDA where there is a device, and host memory
        # Your program has bindings of its own: pass the llama_cpp.Llama, or the address of the
        # llama_context.
        llama = engine.attach(context.address, library=context.model.library.loaded_as)

        # From here on a thread of kvferry's owns the context, and llama.run runs your code on that
        # thread. So nothing is decoded while kvferry reads the context.
        await llama.run(context.decode, [(0, token) for token in PROMPT])
        snapshot = await llama.save(0)
        print(f"saved {len(PROMPT)} tokens: {snapshot.nbytes} bytes")

        # How the conversation goes on if nothing is saved and loaded.
        await llama.run(context.decode, [(0, NEXT)])
        before = await llama.run(context.logits)

        await llama.remove(0)  # the cells are free for others
        print(f"removed: {llama.size(0)} bytes are left")

        await llama.load(snapshot, 0)
        await llama.run(context.decode, [(0, NEXT)])
        after = await llama.run(context.logits)
        print(f"loaded: {llama.size(0)} bytes with the next token")
        same = "the same as" if after == before else "NOT those"
        print(
            f"most likely next token: {most_likely(after)}; its logits are {same} without the save"
        )


def most_likely(logits: bytes) -> int:
    return int(numpy.frombuffer(logits, numpy.float32).argmax())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # A small model with random weights. Its text is noise; its KV cache is like any other.
        path = write_model("llama", Path(folder) / "model.gguf")
        library = Libllama(find())  # $KVFERRY_LLAMA_LIB, or one that pip has installed
        options = ContextOptions(n_ctx=1024, n_seq_max=2, threads=1)
        with (
            Model(library, path, gpu=library.offloads) as model,
            Context(model, options) as context,
        ):
            anyio.run(save_and_load, context)


if __name__ == "__main__":
    main()
