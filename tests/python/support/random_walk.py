"""A random walk in two equal contexts: one for llama.cpp's own calls, the other for kvferry.

Each step does the same in both: decode, copy, remove, shift, divide, keep, save, load, load a
damaged state, cancel, attach, detach. Transfers of kvferry stay in flight for some steps. Many of
them follow a stream that is held, which guarantees that, and some of these move all their bytes
while llama.cpp's graph is halted after one of its operations. After each step the states of all
sequences without a transfer are equal bit for bit, and after each decode the logits.

A kind of model, a cache and a seed determine a walk.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import random
import threading
from typing import Any, Literal

from support import c_interface
from support.devices import ON_GPU
from support.holds import ByStream, ByUrgentCopies, Hold, NoHold, released_after, wait_until
from support.in_flight import at_node, moves_at_once
from support.like_contexts import CACHES, RECURRENT
from support.llama_reference import Context, Refused, llama
from support.simulated_cuda import SimulatedCuda, Stream

KINDS = (
    "llama",
    "gemma3",
    "mamba",
    "hybrid",
    "hybrid-iswa",
    "deepseek2",
    "deepseek32",
    "qwen2vl",
)
"""The kinds of models. States of other kinds are opaque, and differ from those of llama.cpp."""

SEQUENCES = range(4)
STATES_KEPT = 6
LOAD_MODES = tuple(c_interface.LoadMode)

IN_PLACE, SNAPSHOT = c_interface.SaveMode.IN_PLACE, c_interface.SaveMode.SNAPSHOT

PATIENCE = 0.03
"""Seconds after which held transfers are released, because a call may be waiting for them."""


class Unequal(AssertionError):
    """The two contexts differ."""


@dataclasses.dataclass
class InFlight:
    """A transfer of a sequence in flight."""

    direction: Literal["save", "load"]
    job: c_interface.Job
    attachment: c_interface.Attachment
    buffer: Any
    expected: bytes
    hold: Hold
    held: bool
    """Whether it is certainly still in flight."""
    in_place: bool

    def release(self) -> None:
        """Releases it."""
        self.held = False
        self.hold.release()


@dataclasses.dataclass(frozen=True)
class Abilities:
    """What llama.cpp can do with a kind of model and cache."""

    recurs: bool
    """It has recurrent cells, so that only whole sequences can be removed."""
    shifts: bool
    appends: bool
    """A sequence may be decoded while it is saved in place."""
    streams: bool
    """Each sequence has a stream of its own, and shares no cells."""
    windows: bool
    """Other sequences may take cells that have left a sliding window."""
    interleaves: bool
    """Bytes of different sequences alternate in memory."""

    @classmethod
    def of(cls, kind: str, cache: str) -> Abilities:
        """Returns them by names in `kvferry.tools.synthetic.KINDS` and `like_contexts.CACHES`."""
        recurs = kind in RECURRENT
        # Quantised latent rows end the process.
        shiftable = kind in ("llama", "gemma3") or (kind == "deepseek2" and "_0" not in cache)
        return cls(
            recurs=recurs,
            shifts=shiftable,
            appends=not recurs and kind != "gemma3",
            streams="streams" in cache,
            windows=kind in ("gemma3", "hybrid-iswa"),
            interleaves="transposed" in cache,
        )


def cache_options(cache: str) -> dict[str, Any]:
    """Returns options for a cache so small that the sequences of a walk compete for its cells."""
    options = {"n_ctx": 256, "n_ubatch": 32} | CACHES[cache]
    if "streams" in cache:
        options["n_ctx"] = 256 * len(SEQUENCES)
    return options


class Walk:
    """A walk. Use it in a ``with`` statement, and call `step` for each step."""

    def __init__(
        self, cuda: SimulatedCuda, ours: Context, like: Context, abilities: Abilities, seed: int
    ) -> None:
        self.ours = ours
        self.like = like
        self.can = abilities
        self.steps = 0
        self.done: collections.Counter[str] = collections.Counter()
        """How often each operation was done, and how many decodes began beside a transfer."""
        self.history: collections.deque[str] = collections.deque(maxlen=40)
        """The last operations, newest at the end."""
        self._random = random.Random(seed)
        self._cuda = cuda
        self._library = c_interface.Library(c_interface.LIBRARY)
        self._closing = contextlib.ExitStack()
        self._engines: list[c_interface.Engine] = []
        self._attachments: list[c_interface.Attachment] = []
        self._streams: list[Stream] = []
        self._in_flight: dict[int, InFlight] = {}
        self._states: list[bytes] = []
        # Sequences that share cells with others, since a copy in a unified cache.
        self._shared: set[int] = set()
        # Sequences whose shift is applied by the next decode.
        self._shift_pending: set[int] = set()
        # Sequences onto which the next decode copies another stream. Until then their states have
        # old bytes, which a cancelled load may have left.
        self._copy_pending: set[int] = set()
        # The sequences of the streams that it reads.
        self._copy_sources: set[int] = set()

    def __enter__(self) -> Walk:
        try:
            for _ in SEQUENCES:
                self._streams.append(self._closing.enter_context(self._cuda.stream()))
            for _ in range(2):
                engine = self._library.engine(copy_threads=1)
                self._engines.append(self._closing.enter_context(engine))
            self._attach()
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._release_all()
        for transfer in self._in_flight.values():
            transfer.job.wait()
        for attachment in self._attachments:
            attachment.detach()
        self._closing.close()

    # ---- A step

    def step(self) -> None:
        operations = [
            (self._decode, 14),
            (self._save, 7),
            (self._load, 9),
            (self._end, 4),
            (self._remove, 3),
            (self._copy, 2),
            (self._keep, 0.2),
            (self._clear, 0.1),
            (self._refused, 1),
            (self._damaged, 0.5),
            (self._cancel, 1),
            (self._attach, 0.7),
            (self._detach, 0.5),
            (self._load_by_llama_cpp, 1),
            *([(self._shift, 5), (self._divide, 0.5)] if self.can.shifts else []),
            *([(self._load_a_window, 2)] if self.can.windows else []),
            *([(self._remove_a_part, 2)] if not self.can.recurs else []),
        ]
        functions = [function for function, _ in operations]
        [function] = self._random.choices(functions, [weight for _, weight in operations])
        name = function.__name__.strip("_")
        self.history.append(name)
        function()
        self.done[name] += 1
        self.steps += 1
        self._compare_states()

    def _note(self, text: str) -> None:
        self.history[-1] += f" {text}"

    def _compare_states(self) -> None:
        held = any(transfer.held for transfer in self._in_flight.values())
        if held and self.can.interleaves and self._random.random() < 0.8:
            return  # llama.cpp's own calls would wait, and little would stay in flight
        with self._not_for_ever():
            for seq in SEQUENCES:
                moved = self._in_flight.get(seq)
                if seq in self._copy_pending or (moved and moved.direction == "load"):
                    continue
                if self.ours.state_get(seq) != self.like.state_get(seq):
                    raise Unequal(f"the state of sequence {seq}")

    # ---- Which sequences

    def _any(self, seqs: list[int]) -> int | None:
        return self._random.choice(seqs) if seqs else None

    def _resting(self) -> list[int]:
        """The sequences without a transfer in flight."""
        return [seq for seq in SEQUENCES if seq not in self._in_flight]

    def _loadable(self) -> list[int]:
        """Resting sequences whose stream the next decode neither reads nor overwrites.

        llama.cpp copies a stream as it finds it at the next decode: a state that was loaded into
        the target meanwhile is lost, and one that was loaded into the source is copied instead.
        """
        pending = self._copy_pending | self._copy_sources
        return [seq for seq in self._resting() if seq not in pending]

    def _holding_cells(self, seqs: list[int]) -> list[int]:
        return [seq for seq in seqs if self.like.pos_max(seq) >= 0]

    def _decodable(self) -> list[int]:
        def saved(seq: int) -> bool:
            transfer = self._in_flight[seq]
            return transfer.direction == "save" and (self.can.appends or not transfer.in_place)

        return [seq for seq in SEQUENCES if seq not in self._in_flight or saved(seq)]

    # ---- Waiting

    def _not_for_ever(self) -> contextlib.AbstractContextManager[threading.Event]:
        """Releases all held transfers if the ``with`` block waits for one of them."""
        return released_after(PATIENCE, *self._in_flight.values())

    def _release_all(self) -> None:
        for transfer in list(self._in_flight.values()):
            transfer.release()

    def _move_all(self) -> None:
        jobs = [transfer.job for transfer in self._in_flight.values()]
        self._release_all()
        wait_until(lambda: all(job.done for job in jobs))

    # ---- Decoding

    def _decode(self) -> None:
        seqs = self._decodable()
        chosen = self._random.sample(seqs, min(len(seqs), self._random.choice((1, 1, 2, 3, 3))))
        turns = [seq for seq in chosen for _ in range(self._tokens(seq))]
        if self._random.random() < 0.5:
            self._random.shuffle(turns)
        if turns:
            self._decode_tokens(turns)

    def _tokens(self, seq: int) -> int:
        """Chooses how many tokens to decode."""
        count = self._random.choice((1, 1, 2, 8, 30, 50))
        # llama.cpp clears a recurrent cell by multiplying it by 0. After few tokens the state still
        # has the signs of these zeros.
        return max(count, 4) if self.can.recurs and self.like.pos_max(seq) < 0 else count

    def _decode_tokens(self, turns: list[int]) -> None:
        tokens = [self._random.randrange(self.like.model.vocabulary) for _ in turns]
        items = list(zip(turns, tokens, strict=True))
        self._note(f"{dict(collections.Counter(turns))}")
        with contextlib.ExitStack() as stack:
            often = 0.8 if self._shift_pending else 0.4
            if self._in_flight and not ON_GPU and self._random.random() < often:
                node = self._random.choice((1, 2, 3, self._random.randrange(1, 60)))
                self._note(f"node {node}")
                stack.enter_context(at_node(self.ours, node, self._move_all))
            stack.enter_context(self._not_for_ever())
            if not all(transfer.job.done for transfer in self._in_flight.values()):
                self.done["decode beside"] += 1
            try:
                ours = self.ours.decode_batch(items)
            except Refused:
                ours = {}
        try:
            like = self.like.decode_batch(items)
        except Refused:
            like = {}
        self._shift_pending.clear()
        self._copy_pending.clear()
        self._copy_sources.clear()
        if not like:
            self._note("refused")
        if ours.keys() != like.keys():
            raise Unequal(f"decoding was refused by one: {ours.keys()}, {like.keys()}")
        for seq in like:
            if ours[seq].tobytes() != like[seq].tobytes():
                raise Unequal(f"the logits of sequence {seq}")

    # ---- Editing

    def _both(self) -> tuple[Context, Context]:
        return self.ours, self.like

    def _forget_edits(self, seq: int) -> None:
        self._shared.discard(seq)
        self._shift_pending.discard(seq)

    def _remove(self) -> None:
        seq = self._any(self._resting())
        if seq is None:
            return
        self._note(f"{seq}")
        if self._attachments and self._random.random() < 0.5:
            self._random.choice(self._attachments).remove(seq)
        else:
            self.ours.seq_rm(seq)
        self.like.seq_rm(seq)
        self._forget_edits(seq)

    def _remove_a_part(self) -> None:
        seq = self._any(self._holding_cells(self._resting()))
        if seq is None:
            return
        start = self._random.randrange(self.like.pos_max(seq) + 1)
        stop = self._random.choice((-1, -1, start + 5))
        self._note(f"{seq} [{start}, {stop})")
        for context in self._both():
            assert context.seq_rm(seq, start, stop)

    def _copy(self) -> None:
        def may_be_read(seq: int) -> bool:
            return seq not in self._in_flight or self._in_flight[seq].direction == "save"

        source = self._any(self._holding_cells([seq for seq in SEQUENCES if may_be_read(seq)]))
        target = self._any([seq for seq in self._resting() if seq != source])
        if source is None or target is None:
            return
        self._note(f"{source} onto {target}")
        for context in self._both():
            context.seq_rm(target)
            context.seq_cp(source, target)
        self._forget_edits(target)
        if self.can.streams:
            self._copy_pending.add(target)
            self._copy_sources.add(source)
        else:
            self._shared |= {source, target}
        if source in self._shift_pending:
            self._shift_pending.add(target)

    def _alone(self) -> list[int]:
        """The sequences that share no cells with others."""
        return [seq for seq in self._holding_cells(self._resting()) if seq not in self._shared]

    def _shift(self) -> None:
        seq = self._any(self._alone())
        if seq is None:
            return
        removed = self._random.choice((1, 4, 8))
        self._note(f"{seq} by {-removed}")
        for context in self._both():
            assert context.seq_rm(seq, 0, removed)
            context.seq_add(seq, removed, -1, -removed)
        self._shift_pending.add(seq)
        # So that a load often meets a pending shift.
        if self._random.random() < 0.7:
            self._note("then load")
            self._load()
            self._decode()

    def _divide(self) -> None:
        seq = self._any(self._alone())
        if seq is None:
            return
        start = self._random.randrange(self.like.pos_max(seq) + 1)
        self._note(f"{seq} from {start}")
        for context in self._both():
            llama.llama_memory_seq_div(context.memory, seq, start, -1, 2)
        self._shift_pending.add(seq)

    def _keep(self) -> None:
        seq = self._any(list(SEQUENCES))
        if seq is None or any(other != seq for other in self._in_flight):
            return
        self._note(f"{seq}")
        for context in self._both():
            context.seq_keep(seq)
        self._shared.clear()
        self._shift_pending &= {seq}

    def _clear(self) -> None:
        if self._in_flight:
            return
        for context in self._both():
            context.clear()
        self._shared.clear()
        self._shift_pending.clear()

    # ---- Transfers

    def _start(
        self, direction: Literal["save", "load"], seq: int, state: bytes, buffer: Any, mode: int
    ) -> c_interface.Failure | None:
        """Begins a transfer; returns the status if it was refused."""
        attachment = self._random.choice(self._attachments)
        chosen = SNAPSHOT if mode == SNAPSHOT or not self.can.appends else IN_PLACE
        snapshot = direction == "save" and (mode or chosen) == SNAPSHOT
        hold = self._hold(seq, attachment, may_be_held=not snapshot)
        held = hold.holds(len(state))
        self._note(f"{seq} mode {mode}{' held' if held else ''}")
        submit = attachment.save if direction == "save" else attachment.load
        try:
            with released_after(PATIENCE, *self._in_flight.values(), hold) as waited:
                job = submit(seq, buffer, mode=mode, **hold.options)
        except BaseException as failure:
            hold.release()
            if isinstance(failure, c_interface.Failure):
                return failure
            raise
        self._in_flight[seq] = InFlight(
            direction,
            job,
            attachment,
            buffer,
            state,
            hold,
            held=held and not waited.is_set(),
            in_place=not snapshot,
        )
        return None

    def _hold(self, seq: int, attachment: c_interface.Attachment, may_be_held: bool) -> Hold:
        priority = self._random.randrange(2)
        if not may_be_held or self._random.random() > 0.7:
            return NoHold(priority)
        if moves_at_once(self.ours) and not ON_GPU and self._random.random() < 0.7:
            return ByUrgentCopies(attachment.engine)
        return ByStream(self._streams[seq], priority)

    def _save(self) -> None:
        resting = [seq for seq in self._resting() if seq not in self._copy_pending]
        seq = self._any(self._holding_cells(resting))
        if seq is None or not self._attachments:
            return
        state = self.like.state_get(seq)
        buffer = ctypes.create_string_buffer(len(state))
        mode = self._random.choice((0, IN_PLACE, SNAPSHOT))
        if failure := self._start("save", seq, state, buffer, mode):
            raise failure

    def _load(self) -> None:
        seq = self._any(self._loadable())
        if seq is None or not self._attachments or not self._states:
            return
        self._load_state(seq, self._random.choice(self._states))

    def _load_state(self, seq: int, state: bytes) -> None:
        buffer = ctypes.create_string_buffer(state, len(state))
        failure = self._start("load", seq, state, buffer, self._random.choice(LOAD_MODES))
        read = self.like.state_set(seq, state)
        self._forget_edits(seq)
        if (read == len(state)) != (failure is None):
            raise Unequal(f"a load was refused by one: {read} of {len(state)} bytes, {failure}")
        if failure:
            self._note(failure.name)
            for context in self._both():
                context.seq_rm(seq)

    def _load_a_window(self) -> None:
        """Loads a state after free cells, and decodes another sequence: llama.cpp looks for cells
        there, and finds those of the load.
        """
        free = self._loadable()
        if len(free) < 3 or not self._attachments:
            return
        first, loaded, other = self._random.sample(free, 3)
        self._note(f"{loaded} behind {first}, then {other}")
        for context in self._both():
            context.seq_rm(first)
            context.seq_rm(loaded)
        self._forget_edits(first)
        self._forget_edits(loaded)
        few = self._random.choice((2, 8))
        self._decode_tokens([first] * few)
        self._decode_tokens([loaded] * self._random.choice((33, 40, 60)))
        if self.like.pos_max(loaded) < 32:
            return  # the cache is full
        self._states.append(self.like.state_get(loaded))
        self._load_state(loaded, self._states[-1])
        if first in self._resting() and other in self._resting():
            for context in self._both():
                context.seq_rm(first)
            self._decode_tokens([other] * (few + self._random.choice((1, 4, 20))))

    def _load_by_llama_cpp(self) -> None:
        seq = self._any(self._loadable())
        if seq is None or not self._states:
            return
        self._note(f"{seq}")
        state = self._random.choice(self._states)
        with self._not_for_ever():
            ours = self.ours.state_set(seq, state)
        if ours != self.like.state_set(seq, state):
            raise Unequal("a load by llama.cpp was refused by one")
        self._forget_edits(seq)
        if not ours:
            for context in self._both():
                context.seq_rm(seq)

    def _end(self) -> None:
        """Waits for a transfer."""
        seq = self._any(list(self._in_flight))
        if seq is not None:
            self._note(f"{seq}")
            self._collect(seq, self._in_flight[seq])

    def _collect(self, seq: int, transfer: InFlight) -> None:
        # All of them, because one hold may hold several transfers.
        self._release_all()
        status = transfer.job.wait()
        del self._in_flight[seq]
        if status != "KVF_OK":
            raise Unequal(f"a {transfer.direction} of sequence {seq} ended with {status}")
        if transfer.direction == "save":
            if transfer.buffer.raw != transfer.expected:
                raise Unequal(f"what was saved of sequence {seq}")
            self._states.append(transfer.expected)
            if len(self._states) > STATES_KEPT:
                self._states.pop(self._random.randrange(STATES_KEPT))

    def _cancel(self) -> None:
        """Cancels a transfer; a sequence that was loaded is empty afterwards."""
        seq = self._any(list(self._in_flight))
        if seq is None:
            return
        transfer = self._in_flight.pop(seq)
        self._note(f"{transfer.direction} of {seq}")
        transfer.job.cancel()
        status = transfer.job.wait()
        transfer.release()
        if status not in ("KVF_OK", "KVF_ERR_CANCELLED"):
            raise Unequal(f"a cancelled {transfer.direction} ended with {status}")
        if transfer.direction == "save":
            return
        if status == "KVF_OK":
            self.ours.seq_rm(seq)
        else:
            transfer.attachment.settle()
        if self.ours.pos_max(seq) != -1:
            raise Unequal(f"sequence {seq} is not empty after a cancelled load")
        self.like.seq_rm(seq)

    def _refused(self) -> None:
        """Makes calls of kvferry that are refused while a transfer is in flight."""
        seq = self._any([seq for seq, transfer in self._in_flight.items() if transfer.held])
        if seq is None or not self._states:
            return
        self._note(f"{seq}")
        state = self._states[0]
        buffer = ctypes.create_string_buffer(state, len(state))
        attachment = self._random.choice(self._attachments)
        attempts = [lambda: attachment.load(seq, buffer), lambda: attachment.remove(seq)]
        if self._in_flight[seq].direction == "load":
            attempts.append(lambda: attachment.save(seq, buffer))
        for attempt in attempts:
            try:
                attempt()
            except c_interface.Failure as failure:
                if failure.name != "KVF_ERR_BUSY":
                    raise
            else:
                raise Unequal(f"a call on sequence {seq}, which is in flight, was not refused")

    def _damaged(self) -> None:
        """Loads a truncated or too long state: it is refused, and the sequence is empty or as it
        was."""
        seq = self._any(self._resting())
        if seq is None or not self._attachments or not self._states:
            return
        state = self._random.choice(self._states)
        damaged = self._random.choice(
            (state[: self._random.randrange(1, len(state))], state + bytes(16), b"?" + state[1:])
        )
        self._note(f"{seq} {len(damaged)} of {len(state)} bytes")
        buffer = ctypes.create_string_buffer(damaged, len(damaged))
        try:
            self._random.choice(self._attachments).load(seq, buffer)
        except c_interface.Failure as failure:
            if failure.name not in ("KVF_ERR_STATE_DAMAGED", "KVF_ERR_STATE_MISMATCH"):
                raise
        else:
            raise Unequal("a damaged state was accepted")
        # A window that has lost all its cells has no last position, though other layers hold cells.
        if self.ours.pos_max(seq) == -1 and self.like.pos_max(seq) != -1:
            self.like.seq_rm(seq)
            self._forget_edits(seq)

    # ---- Attachments

    def _attach(self) -> None:
        if len(self._attachments) < 3:
            engine = self._random.choice(self._engines)
            self._attachments.append(engine.attach(self.ours.address))

    def _detach(self) -> None:
        if len(self._attachments) < 2:
            return
        gone = self._attachments.pop(self._random.randrange(len(self._attachments)))
        for transfer in self._in_flight.values():
            if transfer.attachment is gone:
                self._release_all()
        gone.detach()
        for seq, transfer in list(self._in_flight.items()):
            if transfer.attachment is gone:
                self._collect(seq, transfer)
