"""A random walk in two equal contexts: one for llama.cpp's own calls, the other for kvferry.

Each step does the same in both: decode, copy, remove, shift, divide, keep, save, load, load a
damaged state, cancel, attach, detach. Transfers of kvferry stay in flight for some steps. Many of
them follow a stream that is held, which guarantees that, and some of these move all their bytes
while llama.cpp's graph is halted after one of its operations. After each step the states of all
sequences without a transfer are equal bit for bit, and after each decode the logits.

A kind of model, a cache and a seed determine a walk.
"""

from __future__ import annotations

from collections.abc import Callable

from support.abilities import Abilities
from support.llama_reference import Context
from support.random_walk.block_transfers import BlockTransfers
from support.random_walk.caches import KINDS, SEQUENCES, cache_options
from support.random_walk.decoding import Decoding
from support.random_walk.edits import Edits
from support.random_walk.failing import FailingTransfers
from support.random_walk.state import Unequal, WalkState
from support.random_walk.transfers import Transfers
from support.simulated_cuda import SimulatedCuda

__all__ = ["KINDS", "Unequal", "Walk", "cache_options"]


class Walk:
    """A walk. Use it in a ``with`` statement, and call `step` for each step."""

    def __init__(
        self,
        cuda: SimulatedCuda,
        ours: Context,
        like: Context,
        abilities: Abilities,
        seed: int,
        *,
        blocks: bool = False,
    ) -> None:
        self._walk = walk = WalkState(cuda, ours, like, abilities, seed)
        self.steps = 0
        self.done = walk.done
        """How often each operation was done, and how many decodes began beside a transfer."""
        self.history = walk.history
        """The last operations, newest at the end."""
        decoding = Decoding(walk)
        transfers = Transfers(walk, decoding)
        edits = Edits(walk, transfers, decoding)
        failing = FailingTransfers(walk)
        weights: dict[Callable[[], None], float] = {
            decoding.decode: 14,
            transfers.save: 7,
            transfers.load: 9,
            transfers.end: 4,
            edits.remove: 3,
            edits.copy: 2,
            edits.keep: 0.2,
            edits.clear: 0.1,
            failing.refused: 1,
            failing.damaged: 0.5,
            failing.cancel: 1,
            walk.attach: 0.7,
            transfers.detach: 0.5,
            transfers.load_by_llama_cpp: 1,
        }
        if abilities.shifts:
            weights |= {edits.shift: 5, edits.divide: 0.5}
        if abilities.windows:
            weights[transfers.load_a_window] = 2
        if not abilities.recurs:
            weights[edits.remove_a_part] = 2
        if blocks:
            weights |= self._with_blocks(BlockTransfers(walk, transfers))
        self._operations, self._weights = list(weights), list(weights.values())

    @staticmethod
    def _with_blocks(moves: BlockTransfers) -> dict[Callable[[], None], float]:
        weights: dict[Callable[[], None], float] = {
            moves.load_blocks: 8,
            moves.load_damaged_blocks: 1,
        }
        if moves.has_blocks:
            weights[moves.save_blocks] = 7
        if moves.has_checkpoints:
            weights[moves.save_checkpoint] = 4
        return weights

    def __enter__(self) -> Walk:
        self._walk.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        self._walk.__exit__(*failure)

    def step(self) -> None:
        [operation] = self._walk.random.choices(self._operations, self._weights)
        name = operation.__name__
        self.history.append(name)
        operation()
        self.done[name] += 1
        self.steps += 1
        self._compare_states()

    def _compare_states(self) -> None:
        walk = self._walk
        held = any(transfer.held for transfer in walk.in_flight.values())
        if held and walk.can.interleaves and walk.random.random() < 0.8:
            return  # llama.cpp's own calls would wait, and little would stay in flight
        with walk.not_for_ever():
            for seq in SEQUENCES:
                moved = walk.in_flight.get(seq)
                if seq in walk.copy_pending or (moved and moved.direction == "load"):
                    continue
                if walk.ours.state_get(seq) != walk.like.state_get(seq):
                    raise Unequal(f"the state of sequence {seq}")
