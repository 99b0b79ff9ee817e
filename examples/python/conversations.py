"""Many conversations over few sequences: the one that was used least recently waits in host memory.

In the root of kvferry:

    pip install '.[demo]'
    python examples/python/conversations.py

Seven users talk to a context that has three sequences. A conversation whose turn it is needs a
sequence. If none is free, the conversation that has been idle for longest is saved, and its
sequence changes hands. When a saved conversation goes on, it is loaded into whichever sequence is
free then. Other conversations are decoded meanwhile.

One user leaves in the middle of an answer. The task is then cancelled, and that may happen at any
`await` below. So at each of them the records are right: a sequence belongs to one conversation or
to none, and a conversation is in a sequence, in a snapshot, or (before its first turn) empty.
"""

import random
import struct
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import kvferry
from kvferry.tools.libllama import Context, ContextOptions, Libllama, Model, find
from kvferry.tools.synthetic import write_model

CONVERSATIONS, SEQUENCES, TURNS = 7, 3, 4
QUESTION, ANSWER = 20, 8  # tokens
LEAVES = 2  # the user who leaves in the middle of an answer, and comes back


class Conversation:
    def __init__(self, name: int) -> None:
        self.name = name
        self.seq: int | None = None
        self.snapshot: kvferry.Snapshot | None = None
        self.lock = anyio.Lock()  # held by a turn, and while the conversation is being saved
        self.loads = 0


class Sequences:
    """Gives sequences to conversations.

    Use it on one event loop. A turn needs one sequence, and there are never more turns at a time
    than sequences. So a turn that begins finds a sequence that is free, or one that is idle.
    """

    def __init__(self, llama: kvferry.Llama, count: int) -> None:
        self._llama = llama
        self._turns = anyio.Semaphore(count)
        self._free = list(range(count))
        self._idle: list[Conversation] = []  # in sequences; the least recently used is the first

    @asynccontextmanager
    async def turn(self, conversation: Conversation) -> AsyncIterator[int]:
        """Waits until the conversation is in a sequence, which belongs to it in the block."""
        async with self._turns, conversation.lock:
            if conversation.seq is None:
                await self._bring_back(conversation)
            else:
                self._idle.remove(conversation)
            assert conversation.seq is not None
            try:
                yield conversation.seq
            finally:
                self._idle.append(conversation)

    async def _bring_back(self, conversation: Conversation) -> None:
        seq = await self._take_sequence()
        try:
            if conversation.snapshot is None:
                await self._llama.remove(seq)
            else:
                # Somebody waits for this transfer, so it goes before the background ones. It
                # replaces what the sequence holds.
                await self._llama.load(conversation.snapshot, seq, priority="urgent")
                conversation.loads += 1
        except BaseException:
            # Cancelled, or failed. The content of the sequence belongs to nobody now; the snapshot
            # is as it was.
            self._free.append(seq)
            raise
        conversation.seq, conversation.snapshot = seq, None

    async def _take_sequence(self) -> int:
        """A sequence that belongs to nobody."""
        if self._free:
            return self._free.pop()
        # A locked conversation is about to begin a turn, or is being saved for another turn.
        victim = next(each for each in self._idle if not each.lock.locked())
        victim.lock.acquire_nowait()
        try:
            self._idle.remove(victim)
            assert victim.seq is not None
            try:
                # In the background: decoding of others beside it hardly notices.
                victim.snapshot = await self._llama.save(victim.seq)
            except kvferry.SequenceEmpty:
                pass  # its first turn was cancelled before anything was decoded
            except BaseException:
                self._idle.insert(0, victim)  # a save leaves the sequence as it is
                raise
            seq, victim.seq = victim.seq, None
            return seq
        finally:
            victim.lock.release()


class User:
    """Says something, waits for the answer, and says something more."""

    def __init__(
        self, name: int, llama: kvferry.Llama, context: Context, sequences: Sequences
    ) -> None:
        self.conversation = Conversation(name)
        self.transcript: list[tuple[str, list[int]]] = []
        self._llama, self._context, self._sequences = llama, context, sequences
        self._random = random.Random(name)

    async def talk(self) -> None:
        for number in range(TURNS):
            with anyio.CancelScope() as scope:
                leaves = self.conversation.name == LEAVES and number == 1
                await self.take_turn(cancel_in_the_middle=scope if leaves else None)
            await anyio.sleep(self._random.uniform(0, 0.02))  # reads the answer

    async def take_turn(self, cancel_in_the_middle: anyio.CancelScope | None = None) -> None:
        vocabulary = self._context.model.vocabulary
        question = [self._random.randrange(vocabulary) for _ in range(QUESTION)]
        async with self._sequences.turn(self.conversation) as seq:
            token = await self._llama.run(self._decode, seq, question, "user")
            for index in range(ANSWER):
                if cancel_in_the_middle is not None and index == ANSWER // 2:
                    cancel_in_the_middle.cancel()
                token = await self._llama.run(self._decode, seq, [token], "answer")

    def _decode(self, seq: int, tokens: list[int], who: str) -> int:
        """Runs on the context's thread. Returns the most likely next token.

        This writes the transcript, rather than the task, which may be cancelled as soon as this
        has begun. So the transcript always says what the sequence holds.
        """
        self._context.decode([(seq, token) for token in tokens])
        if self.transcript and self.transcript[-1][0] == who:
            self.transcript[-1][1].extend(tokens)
        else:
            self.transcript.append((who, list(tokens)))
        logits = struct.unpack(f"{self._context.model.vocabulary}f", self._context.logits())
        return max(range(len(logits)), key=logits.__getitem__)


async def converse(context: Context) -> None:
    async with kvferry.Engine() as engine:
        llama = engine.attach(context.address, library=context.model.library.loaded_as)
        sequences = Sequences(llama, SEQUENCES)
        users = [User(name, llama, context, sequences) for name in range(CONVERSATIONS)]
        async with anyio.create_task_group() as tasks:
            for user in users:
                tasks.start_soon(user.talk)
    for user in users:
        conversation = user.conversation
        print(f"conversation {conversation.name}: loaded {conversation.loads} times")
        for who, tokens in user.transcript:
            print(f"  {who}:", *tokens)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # A small model with random weights. Its text is noise; its KV cache is like any other.
        path = write_model("llama", Path(folder) / "model.gguf")
        library = Libllama(find())  # $KVFERRY_LLAMA_LIB, or one that pip has installed
        # One cache for all sequences: cells for the conversations that are in it, and for loads.
        cells = 2 * SEQUENCES * TURNS * (QUESTION + ANSWER)
        options = ContextOptions(n_ctx=cells, n_seq_max=SEQUENCES, threads=1)
        with (
            Model(library, path, gpu=library.offloads) as model,
            Context(model, options) as context,
        ):
            anyio.run(converse, context)


if __name__ == "__main__":
    main()
