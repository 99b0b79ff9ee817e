"""Transfers that do not end well, and calls that are refused."""

from __future__ import annotations

import ctypes

from support import c_interface
from support.block_reference import PARTS_IN_BLOCKS
from support.c_interface import Block, Blocks
from support.random_walk.state import Unequal, WalkState


class FailingTransfers:
    def __init__(self, walk: WalkState) -> None:
        self._walk = walk

    def cancel(self) -> None:
        """Cancels a transfer; a sequence that was loaded is empty afterwards."""
        walk = self._walk
        seq = walk.choose(list(walk.in_flight))
        if seq is None:
            return
        transfer = walk.in_flight.pop(seq)
        walk.note(f"{transfer.direction} of {seq}")
        transfer.job.cancel()
        status = transfer.job.wait()
        transfer.release()
        if status not in ("KVF_OK", "KVF_ERR_CANCELLED"):
            raise Unequal(f"a cancelled {transfer.direction} ended with {status}")
        if transfer.direction == "save":
            return
        if status == "KVF_OK":
            walk.ours.seq_rm(seq)
        else:
            transfer.attachment.settle()
        if walk.ours.pos_max(seq) != -1:
            raise Unequal(f"sequence {seq} is not empty after a cancelled load")
        walk.like.seq_rm(seq)

    def refused(self) -> None:
        """Makes calls of kvferry that are refused while a transfer is in flight."""
        walk = self._walk
        seq = walk.choose([seq for seq, transfer in walk.in_flight.items() if transfer.held])
        if seq is None or not walk.states:
            return
        walk.note(f"{seq}")
        state = walk.states[0]
        buffer = ctypes.create_string_buffer(state, len(state))
        attachment = walk.random.choice(walk.attachments)
        attempts = [lambda: attachment.load(seq, buffer), lambda: attachment.remove(seq)]
        if walk.in_flight[seq].direction == "load":
            attempts.append(lambda: attachment.save(seq, buffer))
            attempts.append(lambda: attachment.save_blocks(seq, Blocks.with_room([(0, 1)], 1)))
        if walk.can.kind in PARTS_IN_BLOCKS:
            block = Blocks.of([Block(0, 1, state)])
            attempts.append(lambda: attachment.load_blocks(seq, block))
        for attempt in attempts:
            try:
                attempt()
            except c_interface.Failure as failure:
                if failure.name != "KVF_ERR_BUSY":
                    raise
            else:
                raise Unequal(f"a call on sequence {seq}, which is in flight, was not refused")

    def damaged(self) -> None:
        """Loads a truncated or too long state: it is refused, and the sequence is empty or as it
        was."""
        walk = self._walk
        seq = walk.choose(walk.resting())
        if seq is None or not walk.attachments or not walk.states:
            return
        state = walk.random.choice(walk.states)
        damaged = walk.random.choice(
            (
                state[: walk.random.randrange(1, len(state))],
                state + bytes(16),
                b"?" + state[1:],
            )
        )
        walk.note(f"{seq} {len(damaged)} of {len(state)} bytes")
        buffer = ctypes.create_string_buffer(damaged, len(damaged))
        try:
            walk.random.choice(walk.attachments).load(seq, buffer)
        except c_interface.Failure as failure:
            if failure.name not in ("KVF_ERR_STATE_DAMAGED", "KVF_ERR_STATE_MISMATCH"):
                raise
        else:
            raise Unequal("a damaged state was accepted")
        # A window that has lost all its cells has no last position, though other layers hold cells.
        if walk.ours.pos_max(seq) == -1 and walk.like.pos_max(seq) != -1:
            walk.like.seq_rm(seq)
            walk.forget_edits(seq)
