"""Divides a state into its fields, so that tests can damage each of them.

This description of the format is made from llama.cpp's `state_write` functions and from the kinds
of synthetic models, not from kvferry's code, so that it does not repeat kvferry's mistakes.
"""

from __future__ import annotations

import dataclasses
import itertools
import struct

LAST_POSITION = 2**24
"""The last position that kvferry accepts, because decoding can continue after it: 2**24, and more
only for models that were trained on, or contexts of, more than 2**20 tokens."""


@dataclasses.dataclass(frozen=True)
class StateField:
    """A run of bytes of a state."""

    name: str
    """For instance "attention.cell.position". Names of tensor bytes end in ".data"."""
    begin: int
    size: int
    signed: bool = False

    @property
    def end(self) -> int:
        return self.begin + self.size

    @property
    def is_data(self) -> bool:
        return self.name.endswith(".data")

    def read(self, state: bytes) -> int:
        return int.from_bytes(state[self.begin : self.end], "little", signed=self.signed)

    def replaced(self, state: bytes, value: int) -> bytes:
        """Returns the state with another value in this field, modulo what the field can hold."""
        new = (value % (1 << (8 * self.size))).to_bytes(self.size, "little")
        return state[: self.begin] + new + state[self.end :]


SECTIONS: dict[str, list[str]] = {
    "llama": ["attention"],
    "qwen2vl": ["attention with coordinates"],
    "gemma3": ["attention", "attention"],
    "mamba": ["recurrent"],
    "hybrid": ["attention", "recurrent"],
    "hybrid-iswa": ["attention", "attention", "recurrent"],
    "deepseek2": ["attention of keys"],
    "deepseek32": ["attention of keys", "attention of keys"],
}
"""The sections of each kind's state, after its header."""


MAGIC = 0xAF143CD8


def state_fields(kind: str, state: bytes) -> list[StateField]:
    """Returns all fields, in order and without gaps.

    Releases differ. Early ones have no header, the earliest no coordinates of cells; later ones
    have a token with each cell, and the rotation of keys and values. Of the known formats, the one
    that accounts for every byte is right.
    """
    ways = []
    for coordinates, has_rotation in itertools.product(
        ([], ["x", "y"], ["x", "y", "token"]), (False, True)
    ):
        walk = _Walk(state, coordinates, has_rotation)
        try:
            walk.all(SECTIONS[kind])
        except struct.error:  # beyond the end
            continue
        if walk.at == len(state):
            ways.append(walk.fields)
    assert ways, kind
    return ways[0]


class _Walk:
    def __init__(self, state: bytes, coordinates: list[str], has_rotation: bool) -> None:
        self.state = state
        self.coordinates = coordinates
        self.has_rotation = has_rotation
        self.at = 0
        self.fields: list[StateField] = []

    def all(self, sections: list[str]) -> None:
        if int.from_bytes(self.state[:4], "little") == MAGIC:
            self.take("header.magic", "I")
            self.take("header.sequence", "i")
        for section in sections:
            if section == "recurrent":
                self.recurrent()
            else:
                self.attention(
                    has_values=section != "attention of keys",
                    has_coordinates=section == "attention with coordinates",
                )

    def take(self, name: str, code: str) -> int:
        (value,) = struct.unpack_from("<" + code, self.state, self.at)
        size = struct.calcsize("<" + code)
        self.fields.append(StateField(name, self.at, size, signed=code.islower()))
        self.at += size
        return int(value)

    def data(self, name: str, size: int) -> None:
        if size > len(self.state) - self.at:
            raise struct.error("beyond the end")
        if size:
            self.fields.append(StateField(name + ".data", self.at, size))
            self.at += size

    def rows(self, name: str, cells: int) -> None:
        self.take(name + ".type", "i")
        self.data(name, self.take(name + ".row", "Q") * cells)

    def attention(self, *, has_values: bool, has_coordinates: bool) -> None:
        streams = self.take("attention.streams", "I")
        if streams == 0:
            raise struct.error("no stream")
        for _ in range(streams):
            cells = self.take("attention.cells", "I")
            if cells:
                self.stream(cells, has_values, has_coordinates)

    def stream(self, cells: int, has_values: bool, has_coordinates: bool) -> None:
        for _ in range(cells):
            self.take("attention.cell.position", "i")
            self.take("attention.cell.sequences", "I")
            for name in self.coordinates if has_coordinates else ():
                self.take(f"attention.cell.{name}", "i")
            self.take("attention.cell.sequence", "i")
        transposed = self.take("attention.transposed", "I")
        layers = self.take("attention.layers", "I")
        if self.has_rotation:
            self.take("attention.keys_rotated", "I")
            self.take("attention.values_rotated", "I")
        for _ in range(layers):
            self.rows("attention.key", cells)
        for _ in range(layers if has_values else 0):
            if not transposed:
                self.rows("attention.value", cells)
                continue
            self.take("attention.value.type", "i")
            element = self.take("attention.value.element", "I")
            self.data("attention.value", element * self.take("attention.value.rows", "I") * cells)

    def recurrent(self) -> None:
        """Reads the last section. Only its length tells how many of its layers have tensors."""
        cells = self.take("recurrent.cells", "I")
        for _ in range(cells):
            self.take("recurrent.cell.position", "i")
            self.take("recurrent.cell.sequences", "I")
        self.take("recurrent.transposed", "I")
        self.take("recurrent.layers", "I")
        while self.at < len(self.state):
            self.rows("recurrent.tensor", cells)
