"""The smallest use of a store: a conversation is kept, evicted, found by its tokens, and goes on.

In the root of kvferry:

    pip install '.[demo]'
    python examples/python/store.py
"""

import tempfile
from pathlib import Path

import anyio
import kvferry
import numpy
from kvferry.tools.libllama import Context, ContextOptions, Libllama, Model, find
from kvferry.tools.synthetic import write_model

CONVERSATION = [(7 * index + 1) % 512 for index in range(292)]
QUESTION = [(5 * index + 2) % 512 for index in range(50)]


async def keep_and_restore(context: Context) -> None:
    async with kvferry.Engine() as engine, kvferry.Store(ram="1 GiB") as store:
        # Your program has bindings of its own: pass the llama_cpp.Llama, or the address of the
        # llama_context.
        llama = engine.attach(context.address, library=context.model.library.loaded_as)

        await llama.run(context.decode, [(0, token) for token in CONVERSATION])
        print(f"kept {await store.keep(llama, 0, CONVERSATION)} tokens")

        # How the conversation goes on if nothing is kept and restored.
        await llama.run(context.decode, [(0, token) for token in QUESTION])
        before = await llama.run(context.logits)

        await llama.remove(0)  # the cells are free for others
        prompt = CONVERSATION + QUESTION
        count = await store.restore(llama, 0, prompt)
        print(f"the next prompt has {len(prompt)} tokens, of which {count} were restored")
        await llama.run(context.decode, [(0, token) for token in prompt[count:]])
        after = await llama.run(context.logits)
        same = "the same as" if after == before else "NOT those"
        token = int(numpy.frombuffer(after, numpy.float32).argmax())
        print(f"most likely next token: {token}; its logits are {same} without the store")


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
            anyio.run(keep_and_restore, context)


if __name__ == "__main__":
    main()
