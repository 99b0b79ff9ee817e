"""What llama.cpp itself says about blocks: the states of sequences that hold their tokens alone.

Where it cannot be asked, since copies between streams are of whole sequences and recurrent layers
cannot lose a part, the block is cut out of a whole state by a description of the format that is not
kvferry's own (support/state_fields.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from support.block_histories import SEQ, SPARE
from support.like_contexts import RECURRENT
from support.llama_reference import Context
from support.state_fields import MAGIC, SECTIONS, StateField, state_fields

PARTS_IN_BLOCKS = {
    "llama": 1,
    "qwen2vl": 1,
    "gemma3": 1,
    "hybrid": 1,
    "hybrid-iswa": 1,
    "deepseek2": 1,
    "deepseek32": 2,
}
"""How many sections of a state keep every token; kinds without any are missing."""

WITH_CHECKPOINTS = {"gemma3", "hybrid", "hybrid-iswa"}
"""Kinds with sections that keep a window or one cell."""


def blocks_by_llama_cpp(
    like: Context, kind: str, history: Callable[[Context], None], ranges: Sequence[tuple[int, int]]
) -> list[bytes]:
    """Returns the state of SEQ with the positions of each range alone; for kinds with checkpoints
    the beginning of that state.

    `like` has the history, and has it again afterwards.
    """
    if like.options.kv_unified:
        states = _by_copies(like, ranges)
    elif kind not in RECURRENT:
        states = _by_removal(like, history, ranges)
    else:
        state = like.state_get(SEQ)
        return [cut_by_format(kind, state, begin, end) for begin, end in ranges]
    return [beginning_of(kind, state) for state in states]


def _by_copies(like: Context, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    states = []
    like.seq_cp(SEQ, SPARE)
    for begin, end in ranges:
        like.seq_rm(SEQ)
        like.seq_cp(SPARE, SEQ, begin, end)
        states.append(like.state_get(SEQ))
    like.seq_rm(SEQ)
    like.seq_cp(SPARE, SEQ)
    like.seq_rm(SPARE)
    return states


def _by_removal(
    like: Context, history: Callable[[Context], None], ranges: Sequence[tuple[int, int]]
) -> list[bytes]:
    states = []
    for begin, end in ranges:
        if begin > 0:
            assert like.seq_rm(SEQ, 0, begin)
        assert like.seq_rm(SEQ, end, -1)
        states.append(like.state_get(SEQ))
        like.clear()
        history(like)
    return states


# ---- By the format -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _sections(kind: str, state: bytes) -> list[list[StateField]]:
    """Returns the fields of each section. A state is cut many times."""
    sections: list[list[StateField]] = []
    for field in state_fields(kind, state):
        if field.name.startswith("header."):
            continue
        if field.name in ("attention.streams", "recurrent.cells"):
            sections.append([])
        sections[-1].append(field)
    assert len(sections) == len(SECTIONS[kind])
    return sections


def frame_of(state: bytes) -> bytes:
    """Returns the bytes before the first section."""
    framed = int.from_bytes(state[:4], "little") == MAGIC
    return state[:8] if framed else b""


def beginning_of(kind: str, state: bytes) -> bytes:
    """Returns the frame and the sections that keep every token."""
    if kind not in WITH_CHECKPOINTS:
        return state
    return state[: _sections(kind, state)[PARTS_IN_BLOCKS[kind] - 1][-1].end]


def rest_of(kind: str, state: bytes) -> bytes:
    """Returns the frame and the other sections."""
    return frame_of(state) + state[len(beginning_of(kind, state)) :]


def _positions(section: list[StateField], state: bytes) -> list[int]:
    return [field.read(state) for field in section if field.name.endswith(".cell.position")]


def positions_in_order(kind: str, state: bytes) -> list[int]:
    """Returns the positions of the cells of the first section, in the order of the state."""
    return _positions(_sections(kind, state)[0], state)


def rest_ends_at(kind: str, state: bytes, position: int) -> bool:
    """Whether this is the last position of each section that does not keep every token."""
    rest = _sections(kind, state)[PARTS_IN_BLOCKS[kind] :]
    return all(max(_positions(each, state), default=-1) == position for each in rest)


def cut_by_format(kind: str, state: bytes, begin: int, end: int) -> bytes:
    """Returns the block of the cells at the positions [begin, end)."""
    block = frame_of(state)
    for section in _sections(kind, state)[: PARTS_IN_BLOCKS[kind]]:
        block += _cut_section(section, state, begin, end)
    return block


def _cut_section(section: list[StateField], state: bytes, begin: int, end: int) -> bytes:
    """Returns a section with some of its cells."""
    positions = [f.read(state) for f in section if f.name == "attention.cell.position"]
    chosen = [index for index, position in enumerate(positions) if begin <= position < end]
    cells = len(positions)
    cut, index, rows = b"", -1, 1
    for field in section:
        piece = state[field.begin : field.end]
        if field.name == "attention.cell.position":
            index += 1
        if field.name == "attention.value.rows":
            rows = field.read(state)
        elif field.name in ("attention.key.row", "attention.value.row"):
            rows = 1
        if field.name == "attention.cells" and field.read(state):
            piece = len(chosen).to_bytes(4, "little")
        elif ".cell." in field.name and index not in chosen:
            piece = b""
        elif field.is_data:
            width = field.size // rows // cells
            piece = b"".join(
                piece[(row * cells + cell) * width :][:width]
                for row in range(rows)
                for cell in chosen
            )
        cut += piece
    return cut


def content(kind: str, state: bytes) -> list[bytes]:
    """Returns the cells of the sections that blocks hold, each with its rows, in the order of their
    positions; then the other sections. Equal for states whose cells are in different orders.
    """
    end = max(positions_in_order(kind, state)) + 1
    cells = [cut_by_format(kind, state, position, position + 1) for position in range(end)]
    return [*cells, rest_of(kind, state)]
