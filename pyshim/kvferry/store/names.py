"""The names of conversations, for pinning, evicting and listing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .ram import Id, Ram


@dataclass(frozen=True)
class Listed:
    """A conversation that was kept under a name."""

    name: str
    tokens: int
    nbytes: int
    """The bytes of it that are in RAM. Others may share them."""
    pinned: bool
    key: bytes
    """Stands for all of its tokens. ``kvferry store`` calls the conversation by the first 16
    hexadecimal digits."""


@dataclass
class _Named:
    tokens: int
    ids: Sequence[Id]
    pinned: bool = False


class Names:
    """The conversations that have a name. Methods raise KeyError for an unknown name."""

    def __init__(self, ram: Ram) -> None:
        self._ram = ram
        self._named: dict[str, _Named] = {}

    def give(self, name: str, tokens: int, ids: Sequence[Id]) -> None:
        """Gives a name to blocks and checkpoints. If others had the name, they lose it, and a pin
        of the name now holds the new ones."""
        was_pinned = name in self._named and self._named[name].pinned
        if was_pinned:
            self.unpin(name)
        self._named[name] = _Named(tokens, ids)
        if was_pinned:
            self.pin(name)

    def pin(self, name: str) -> None:
        named = self._named[name]
        if not named.pinned:
            named.pinned = True
            self._ram.pin(named.ids)

    def unpin(self, name: str) -> None:
        named = self._named[name]
        if named.pinned:
            named.pinned = False
            self._ram.unpin(named.ids)

    def drop(self, name: str) -> Sequence[Id]:
        """Removes a name and its pin. Returns the parts that had the name."""
        self.unpin(name)
        return self._named.pop(name).ids

    def drop_all(self) -> None:
        for name in list(self._named):
            self.drop(name)

    def list(self) -> list[Listed]:
        return [
            Listed(
                name,
                named.tokens,
                sum(part.nbytes for each in named.ids if (part := self._ram.find(*each))),
                named.pinned,
                named.ids[-1][1],
            )
            for name, named in self._named.items()
        ]
