"""One transfer in flight, as a Python program sees it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import anyio

from ._bridge.arguments import integer
from ._bridge.cancellation import see_through
from ._bridge.claims import claim_for_transfer
from ._bridge.completion import Completion
from ._bridge.completions import Completions, PendingTransfer
from ._bridge.worker import Call
from ._native import ffi, lib
from .buffer import Buffer
from .errors import check, error

if TYPE_CHECKING:
    from ._native import CData

T = TypeVar("T")


class Transfer(PendingTransfer, Generic[T]):
    """A transfer that has been submitted. It ends exactly once, whoever waits for it, or nobody.

    The memory that it uses is kept alive until then. For use from the event loop's thread.
    """

    completion: Completion | None = None
    """How it ended; None while it is in flight."""

    def __init__(
        self,
        completions: Completions,
        buffer: Buffer,
        source: object,
        result: Callable[[Completion], T],
        *,
        writes_buffer: bool,
    ) -> None:
        """``source`` is kept alive too. ``result`` is made when the transfer has succeeded.

        Raises Busy where something else in this process uses the buffer.
        """
        super().__init__()
        self._completions = completions
        self._buffer: Buffer | None = buffer
        self._source = source
        self._make_result: Callable[[Completion], T] | None = result
        self._result: T | None = None
        self._aftermath: Call | None = None
        self._cancel_requested = False
        self._nbytes = buffer.nbytes
        # The C library writes the handle here: that a job was made is known also where an exception
        # breaks in between the call and whatever follows it.
        self.job_place: CData = ffi.new("kvf_job *")
        self.token = completions.new_token()
        completions.pick_up()
        self._claim: object = claim_for_transfer(
            buffer.memory, buffer.nbytes, writing=writes_buffer
        )

    @property
    def job(self) -> int | None:
        return self.job_place[0] or None

    @property
    def done(self) -> bool:
        """True once it has ended, and a task of this program has seen it: ``wait`` won't sleep."""
        return self.ended

    def cancel(self) -> None:
        """Asks it to end early. A request: ``wait`` tells how it really ended."""
        self._cancel_requested = True
        job = self.job
        if job is not None:
            lib.kvf_job_cancel(job)

    def stream_wait(self, stream: int) -> None:
        """Makes a CUDA stream wait: what it is given from now on begins when this has ended.

        Ended in whatever way: ``wait`` tells. ``stream`` is a handle, such as PyTorch's
        ``Stream.cuda_stream`` or CuPy's ``Stream.ptr``; 1 and 2 are the default streams, of
        the arrays' devices at least. Returns at once. Raises InvalidArgument (no device of the
        engine knows the stream), Busy (1,024 waits are outstanding), KvferryError (no CUDA device,
        or a driver older than 11.7).
        """
        stream = integer("stream", stream)
        if not self.ended:
            assert self.job is not None
            check(lib.kvf_job_stream_wait(self.job, stream))

    async def wait(self) -> T:
        """Waits until it has ended; returns its result, or raises what went wrong.

        Cancelling a task that waits here cancels the transfer, waits for its true end, and then
        lets the cancellation go on. So does KeyboardInterrupt, and whatever else a signal handler
        raises, the first time. Several tasks may wait.

        Raises TransferCancelled after ``cancel``, EngineClosed if the engine was closed around it.
        """
        if not self.ended:
            self._completions.check_waitable()
        await see_through(self._until_over, self.cancel)
        if self.completion is None:
            raise error(lib.KVF_ERR_CLOSED)
        status = self.completion.status
        by_closing = self._completions.closing and not self._cancel_requested
        if status == lib.KVF_ERR_CANCELLED and by_closing:
            status = lib.KVF_ERR_CLOSED
        if status != lib.KVF_OK:
            raise error(status, self.completion.detail)
        if self._aftermath is not None and self._aftermath.failure is not None:
            raise self._aftermath.failure
        return cast(T, self._result)

    async def _until_over(self) -> None:
        await self._completions.until_ended(self)
        if self._aftermath is not None:
            await self._completions.until_ended(self._aftermath)

    def __repr__(self) -> str:
        return f"<Transfer {self._subject()}{self._condition()}>"

    def _subject(self) -> str:
        return f"of {self._nbytes} bytes"

    def _condition(self) -> str:
        if not self.ended:
            return ", in flight, to be cancelled" if self._cancel_requested else ", in flight"
        if self.completion is None:
            return ", never submitted"
        if self.completion.status == lib.KVF_OK:
            return ", done"
        return f": {error(self.completion.status, self.completion.detail)}"

    # ---- Called by whoever submits it -----------------------------------------------------------

    def expect(self) -> None:
        """Makes ready for a submitting call. Whatever comes of it, ``submitted`` must follow."""
        assert self._buffer is not None
        self._buffer.transfers.add(self)
        self._completions.expect(self)

    def submitted(self) -> None:
        """The submitting call has ended, or won't be made. May be repeated."""
        job = self.job
        if job is None:
            self._completions.withdraw(self)
        elif self.ended:
            lib.kvf_job_release(job)
        elif self._cancel_requested:
            lib.kvf_job_cancel(job)

    async def abort(self) -> None:
        """Cancels it, and waits for its end whatever cancellation says."""
        self.cancel()
        with anyio.CancelScope(shield=True):
            await see_through(self._until_over, self.cancel)

    # ---- Called by the bridge -------------------------------------------------------------------

    def completed(self, completion: Completion) -> None:
        self.completion = completion
        if self.job is not None:
            lib.kvf_job_release(self.job)
        if completion.status == lib.KVF_OK and self._make_result is not None:
            self._result = self._make_result(completion)
        if self._aftermath is None:
            self._aftermath = self.follow_up(completion)
        if self._aftermath is not None:
            # Asked for again where an exception has broken in, and made once all the same.
            self._aftermath.worker.ask_for(self._aftermath, first=True)
        self._let_go()

    def withdrawn(self) -> None:
        self._let_go()

    def follow_up(self, completion: Completion) -> Call | None:
        """A call, not yet asked for, that has to end too before ``wait`` returns."""
        return None

    def _let_go(self) -> None:
        # A transfer that is kept must not keep the memory of what it has moved.
        if self._buffer is not None:
            self._buffer.transfers.discard(self)
        self._make_result = None
        self._buffer = None
        self._source = None
        self._claim = None


async def carried_out(start: Coroutine[Any, Any, Transfer[T]]) -> T:
    """Awaits the start of a transfer, and then its end.

    Whatever breaks this off, it isn't in flight any more when this raises.
    """
    transfer = await start
    try:
        return await transfer.wait()
    except GeneratorExit:
        transfer.cancel()
        raise
    except BaseException:
        if not transfer.ended:
            await transfer.abort()
        raise
