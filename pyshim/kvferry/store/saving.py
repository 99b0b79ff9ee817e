"""Saving what is not kept yet of a sequence."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .._bridge.arguments import invalid
from .._bridge.llama_cpp_object import LlmState
from .._bridge.submission import Priority
from ..blocks import Block, Checkpoint
from ..buffer import Buffer
from ..errors import BufferTooSmall
from ..llama import Llama
from .description import Description, Kind
from .identity import Kept
from .keys import Link, Tokens
from .ram import Entry, Id, Room
from .tiers import Tiers


@dataclass(frozen=True)
class Conversation:
    """What is to be kept."""

    llama: Llama
    seq: int
    tokens: Tokens
    kept: Kept
    links: Sequence[Link]
    """The blocks of the tokens; at least one."""

    def parts(self) -> list[Description]:
        """What must be there so that all tokens can be restored, without sizes and checksums."""
        kept, parts = self.kept, []
        if kept.allowed.blocks:
            parts += [self._part("block", link) for link in self.links]
        if kept.allowed.checkpoints:
            parts.append(self._part("checkpoint", self.links[-1]))
        return parts

    def _part(self, kind: Kind, link: Link) -> Description:
        begin = link.begin if kind == "block" else link.end
        return Description(kind, link.key, link.parent, begin, link.end, self.kept.root, 0, 0)


@dataclass
class _Missing:
    """A part that is to be saved, and the buffer for it."""

    part: Description
    buffer: Buffer
    room: Room
    saved: Block | Checkpoint | None = None

    def release(self) -> None:
        """Releases the buffer and its room: nothing of it is kept."""
        if self.saved is not None:
            self.saved.close()
        self.buffer.close()
        self.room.release()


class Saving:
    """What ``Store.keep`` does."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers

    async def save(
        self, conversation: Conversation, expires: float | None, priority: Priority
    ) -> tuple[int, list[Id]]:
        """Saves what is neither in RAM nor on the disk.

        Returns how many of the tokens are kept then, and what keeps them.
        """
        parts = conversation.parts()
        with contextlib.ExitStack() as held:
            there: set[Id] = set()
            for part in parts:
                # Later blocks may be there without one before them, after a file was lost.
                if entry := self._tiers.ram.renew(part.kind, part.key, expires):
                    held.enter_context(self._tiers.ram.held([entry]))
                    there.add(entry.id)
            absent = [part for part in parts if (part.kind, part.key) not in there]
            if self._tiers.behind is not None:
                there |= await self._tiers.behind.use(absent)
                absent = [part for part in parts if (part.kind, part.key) not in there]
            there |= await self._save_missing(conversation, absent, expires, priority)
            if self._tiers.away is not None:
                entries = [self._tiers.ram.entry((part.kind, part.key)) for part in parts]
                self._tiers.away.write(entry for entry in entries if entry)
        needed = [(part.kind, part.key) for part in parts]
        if conversation.kept.allowed.checkpoints:
            return (conversation.links[-1].end, needed) if there.issuperset(needed) else (0, [])
        count = next((i for i, each in enumerate(needed) if each not in there), len(needed))
        return parts[count - 1].end if count else 0, needed[:count]

    async def _save_missing(
        self,
        conversation: Conversation,
        absent: Sequence[Description],
        expires: float | None,
        priority: Priority,
    ) -> set[Id]:
        """Saves as many of these parts as there is room for; with a checkpoint all or none."""
        missing: list[_Missing] = []
        try:
            await self._take_buffers(conversation, absent, missing)
            if conversation.kept.allowed.checkpoints and len(missing) < len(absent):
                # Blocks or a checkpoint alone would be of no use.
                while missing:
                    missing.pop().release()
            # The checkpoint first: the sequence may be decoded further when it has been taken.
            for each in missing:
                if each.part.kind == "checkpoint":
                    await self._save_checkpoint(conversation, each, priority)
            for run in _runs(each for each in missing if each.part.kind == "block"):
                await self._save_blocks(conversation, run, priority)
        except BaseException:
            for each in missing:
                each.release()
            raise
        return {self._add(each, expires) for each in _last_first(missing)}

    async def _take_buffers(
        self,
        conversation: Conversation,
        absent: Sequence[Description],
        missing: list[_Missing],
    ) -> None:
        """Adds to ``missing`` the first of the absent parts, as far as there is room."""
        llama, sizes = conversation.llama, dict[int, int]()
        for part in absent:
            count = part.end - part.begin
            if count not in sizes:
                sizes[count] = await (
                    llama.block_size_async(count)
                    if part.kind == "block"
                    else llama.checkpoint_size_async(conversation.seq)
                )
        wanted = [sizes[part.end - part.begin] for part in absent]
        while taken := await self._tiers.buffers.take_first(llama, wanted[len(missing) :]):
            missing += [
                _Missing(part, *each)
                for part, each in zip(absent[len(missing) :], taken, strict=False)
            ]

    async def _save_checkpoint(
        self, conversation: Conversation, missing: _Missing, priority: Priority
    ) -> None:
        last = conversation.links[-1]
        try:
            checkpoint = await conversation.llama.save_checkpoint(
                conversation.seq, into=missing.buffer, key=last.key, priority=priority
            )
        except BufferTooSmall:
            raise invalid("the sequence has changed while it was kept") from None
        missing.saved = checkpoint
        if checkpoint.position != last.end - 1:
            raise invalid(
                f"the sequence ends with position {checkpoint.position}, not {last.end - 1}"
            )
        if not conversation.kept.allowed.blocks:
            checkpoint.llm = LlmState(conversation.tokens.copy())

    async def _save_blocks(
        self, conversation: Conversation, run: Sequence[_Missing], priority: Priority
    ) -> None:
        """Saves blocks that follow one another, as one transfer."""
        first, last = run[0].part, run[-1].part
        wrong = "the sequence does not have one token at each position from {} to {}"
        try:
            blocks = await conversation.llama.save_blocks(
                conversation.seq,
                first.begin,
                last.end,
                tokens=self._tiers.block_tokens,
                into=[each.buffer for each in run],
                keys=[each.part.key for each in run],
                parent=first.parent,
                priority=priority,
            )
        except BufferTooSmall:
            raise invalid(wrong.format(first.begin, last.end - 1)) from None
        for each, block in zip(run, blocks, strict=True):
            each.saved = block
            begin, end = each.part.begin, each.part.end
            if block.nbytes != each.buffer.nbytes:
                raise invalid(wrong.format(begin, end - 1))
            block.llm = LlmState(conversation.tokens[begin:end].copy())

    def _add(self, missing: _Missing, expires: float | None) -> Id:
        """Keeps what was saved in RAM, and has it written to the disk."""
        saved = missing.saved
        assert saved is not None
        part = dataclasses.replace(missing.part, nbytes=saved.nbytes)
        entry = Entry(part, saved, saved.capacity, expires=expires)
        if self._tiers.ram.add(entry, missing.room) is entry:
            self._tiers.counts.saved_bytes += saved.nbytes
            if self._tiers.behind is not None:
                self._tiers.behind.writes.add(entry)
        return entry.id


def _last_first(missing: Sequence[_Missing]) -> list[_Missing]:
    """The last blocks come first, so that they are evicted before the blocks that they follow."""
    return sorted(missing, key=lambda each: each.part.end, reverse=True)


def _runs(blocks: Iterable[_Missing]) -> list[list[_Missing]]:
    """Blocks that follow one another without a gap, together."""
    runs: list[list[_Missing]] = []
    for each in blocks:
        if runs and runs[-1][-1].part.end == each.part.begin:
            runs[-1].append(each)
        else:
            runs.append([each])
    return runs
