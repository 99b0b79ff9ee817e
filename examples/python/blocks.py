"""The smallest use of blocks: a conversation is saved as it grows, and loaded from its blocks.

In the root of kvferry:

    pip install '.[demo]'
    python examples/python/blocks.py
"""

import tempfile
from pathlib import Path

import anyio
import kvferry
import numpy
from kvferry.tools.libllama import Context, ContextOptions, Libllama, Model, find
from kvferry.tools.synthetic import write_model

BLOCK = 64  # tokens of a block
PROMPT = [(7 * index + 1) % 512 for index in range(3 * BLOCK)]
TURN = [(5 * index + 2) % 512 for index in range(100)]
NEXT = 42


async def save_and_load(context: Context) -> None:
    async with kvferry.Engine() as engine:  # CUDA where there is a device, and host memory
        # Your program has bindings of its own: pass the llama_cpp.Llama, or the address of the
        # llama_context.
        llama = engine.attach(context.address, library=context.model.library.loaded_as)

        await llama.run(context.decode, [(0, token) for token in PROMPT])
        allowed, reason = llama.blocks_allowed()
        if not allowed.blocks:
            raise SystemExit(f"no blocks of this cache: {reason}")
        blocks = await llama.save_blocks(0, tokens=BLOCK)
        print(f"prompt: {describe(blocks)}")

        # After a turn only what is new is saved.
        await llama.run(context.decode, [(0, token) for token in TURN])
        new = await llama.save_blocks(0, begin=blocks[-1].end, tokens=BLOCK)
        print(f"turn: {describe(new)}")
        blocks += new

        # Sliding windows and recurrent layers are not in blocks: they are in a checkpoint.
        checkpoint = await llama.save_checkpoint(0) if allowed.checkpoints else None

        # How the conversation goes on if nothing is saved and loaded.
        await llama.run(context.decode, [(0, NEXT)])
        before = await llama.run(context.logits)

        await llama.remove(0)  # the cells are free for others
        await llama.load_blocks(blocks, 0, checkpoint=checkpoint)
        await llama.run(context.decode, [(0, NEXT)])
        after = await llama.run(context.logits)
        same = "the same as" if after == before else "NOT those"
        print(
            f"most likely next token: {most_likely(after)}; its logits are {same} without the save"
        )


def describe(blocks: list[kvferry.Block]) -> str:
    spans = ", ".join(f"{block.begin} to {block.end - 1}" for block in blocks)
    nbytes = sum(block.nbytes for block in blocks)
    return f"saved {len(blocks)} blocks, positions {spans}: {nbytes} bytes"


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
