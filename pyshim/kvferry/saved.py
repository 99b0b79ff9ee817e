"""What saves return: bytes that nobody overwrites while they are kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._bridge.claims import claim_for_saved
from ._bridge.completion_record import Completion
from ._bridge.llama_cpp_object import LlmState
from .buffer import Buffer

if TYPE_CHECKING:
    from ._native import CData


class Saved(Buffer):
    """A state of a sequence, or a part of one: a read-only Buffer.

    While it lives, its memory is refused as a target with Busy.
    """

    _writable = False

    def __init__(
        self,
        memory: CData,
        nbytes: int,
        *,
        fingerprint: str | None = None,
        completion: Completion | None = None,
        llm: LlmState | None = None,
    ) -> None:
        super().__init__(memory, nbytes)
        self._claim: object = claim_for_saved(memory, nbytes, type(self).__name__)
        self.fingerprint = fingerprint
        """The ``Llama.fingerprint`` of the attachment that saved it. None if it is unknown: then
        a load does not check it."""
        self.completion = completion
        """How the save ended; None for bytes that this process has not saved."""
        self.llm = llm
        """What the attached ``llama_cpp.Llama`` knew of these bytes' tokens when they were saved;
        None if the attachment was made with something else. A load into an attachment to such an
        object gives it that knowledge."""

    def close(self) -> None:
        super().close()
        self._claim = None
