"""A conversation that outlives its process.

One process decodes a prompt, keeps it in a store with a folder, and ends. A new process finds the
prompt by its tokens, restores it, and decodes what follows. Its logits must be those of the first
process, bit for bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

import anyio

from ... import Devices, Engine, KvferryError, Llama, Store
from ..libllama import Context, ContextOptions, Found, Libllama, LlamaError, Model
from ..table import Progress
from ..workload import SAVED, Items, decoding_threads, prompt

_QUESTION = 16
"""Tokens that follow the prompt."""


@dataclass(frozen=True)
class Conversation:
    """What both processes are told."""

    library: str
    """The path of the libllama."""
    model: str
    gpu: bool
    device: Devices
    tokens: int
    """The length of the prompt."""
    folder: str
    """The store's."""
    kept_bytes: int = 0
    """What the first process has kept."""

    def items(self, vocabulary: int) -> Items:
        """The prompt, and the question after it."""
        return prompt("alone", self.tokens + _QUESTION, vocabulary)


async def restart_process(conversation: Conversation, progress: Progress) -> dict[str, Any] | None:
    """Runs both processes; returns their figures. None if the cache allows nothing to be kept.

    Raises LlamaError if a process fails.
    """
    progress.say(f"restart: a process decodes {conversation.tokens} tokens, keeps them, and ends")
    before = await _process("keep", conversation)
    if "refused" in before:
        progress.say(f"restart: not with this model: {before['refused']}")
        return None
    progress.say("restart: a new process finds them and goes on")
    conversation = dataclasses.replace(conversation, kept_bytes=before["state_bytes"])
    after = await _process("answer", conversation)
    equal = before.pop("logits") == after.pop("logits")
    progress.say("restart: bit-identical" if equal else "restart: the logits DIFFER")
    return {"tokens": conversation.tokens, **before, **after, "bit_identical": equal}


async def _process(part: str, conversation: Conversation) -> dict[str, Any]:
    """Runs a part in a process of its own."""
    command = [sys.executable, "-m", __name__, part, json.dumps(dataclasses.asdict(conversation))]
    done = await anyio.run_process(command, check=False)
    if done.returncode != 0:
        [*_, reason] = done.stderr.decode(errors="replace").splitlines() or ["it said nothing"]
        raise LlamaError(f"the process that should {part} has failed: {reason}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


# ---- In the processes ----------------------------------------------------------------------------


async def _keep(conversation: Conversation, context: Context, llama: Llama) -> dict[str, Any]:
    items = conversation.items(context.model.vocabulary)
    known, question = items[: conversation.tokens], items[conversation.tokens :]
    prefill = await llama.run(context.decode, known)
    nbytes = await llama.size_async(SAVED)
    async with _store(conversation, nbytes) as store:
        begin = time.monotonic()
        try:
            kept = await store.keep(llama, SAVED, [token for _, token in known])
        except KvferryError as refusal:
            if refusal.name != "KVF_ERR_UNSUPPORTED":
                raise
            return {"refused": str(refusal)}
        await store.flush()
        keep_seconds = time.monotonic() - begin
    answer = await llama.run(context.decode, question)
    return {
        "kept_tokens": kept,
        "state_bytes": nbytes,
        "keep_ms": keep_seconds * 1e3,
        "prefill_ms": prefill.ms + answer.ms,
        "logits": await _logits(context, llama),
    }


async def _answer(conversation: Conversation, context: Context, llama: Llama) -> dict[str, Any]:
    items = conversation.items(context.model.vocabulary)
    begin = time.monotonic()
    async with _store(conversation, conversation.kept_bytes) as store:
        restored = await store.restore(llama, SAVED, [token for _, token in items])
        restore_seconds = time.monotonic() - begin
        await llama.run(context.decode, items[restored:])
        answer_seconds = time.monotonic() - begin
        return {
            "restored_tokens": restored,
            "restore_ms": restore_seconds * 1e3,
            "answer_ms": answer_seconds * 1e3,
            "logits": await _logits(context, llama),
        }


def _store(conversation: Conversation, nbytes: int) -> Store:
    room = 2 * nbytes + (64 << 20)
    return Store(ram=room, disk=conversation.folder, disk_limit=room)


async def _logits(context: Context, llama: Llama) -> str:
    """Returns a hash of the logits."""
    return hashlib.blake2b(await llama.run(context.logits)).hexdigest()


async def _run(part: str, conversation: Conversation) -> dict[str, Any]:
    library = Libllama(Found(conversation.library, "kvferry demo"))
    options = ContextOptions(
        n_ctx=conversation.tokens + 2 * _QUESTION, n_seq_max=1, threads=decoding_threads()
    )
    with (
        Model(library, conversation.model, gpu=conversation.gpu) as model,
        Context(model, options) as context,
    ):
        async with (
            Engine(conversation.device) as engine,
            engine.attach(context.address, library=library.loaded_as) as llama,
        ):
            return await (_keep if part == "keep" else _answer)(conversation, context, llama)


if __name__ == "__main__":
    print(json.dumps(anyio.run(_run, sys.argv[1], Conversation(**json.loads(sys.argv[2])))))
