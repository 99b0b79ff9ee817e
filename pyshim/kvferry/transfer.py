"""A transfer, from before its submission to its end."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import anyio

from ._bridge.arguments import integer
from ._bridge.cancellation import await_to_end
from ._bridge.claims import claim_for_transfer
from ._bridge.completion_record import Completion
from ._bridge.completions import Completions, PendingTransfer
from ._bridge.worker import Call
from ._native import ffi, lib
from .buffer import Buffer
from .errors import check, error

if TYPE_CHECKING:
    from ._native import CData

T = TypeVar("T")


class Transfer(PendingTransfer, Generic[T]):
    """A transfer, from before its submission to its end.

    It ends exactly once, whether or not a task waits for it.

    The memory that it uses is kept alive until then. For the event loop's thread.
    """

    completion: Completion | None = None
    """How it ended; None while it is in flight, or if it was never submitted."""

    def __init__(
        self,
        completions: Completions,
        buffers: Sequence[Buffer],
        source: object,
        result: Callable[[Completion], T],
        *,
        writes_buffers: bool,
    ) -> None:
        """For kvferry itself. ``source`` is an object to keep alive until the end. ``result`` makes
        the result of a transfer that has succeeded.

        Raises Busy if something else in this process uses one of the buffers.
        """
        super().__init__()
        self._completions = completions
        self._buffers = dict(enumerate(buffers))
        self._source = source
        self._make_result: Callable[[Completion], T] | None = result
        self._result: T | None = None
        self._following_call: Call | None = None
        self._cancel_requested = False
        self._nbytes = sum(buffer.nbytes for buffer in buffers)
        # The C library writes the job's handle here, so that the handle is known even if an
        # exception interrupts what follows the submitting call.
        self.job_place: CData = ffi.new("kvf_job *")
        self.token = completions.new_token()
        completions.take_unattended()
        self._claims = {
            index: claim_for_transfer(buffer.memory, buffer.nbytes, writing=writes_buffers)
            for index, buffer in self._buffers.items()
        }

    @property
    def job(self) -> int | None:
        return self.job_place[0] or None

    @property
    def done(self) -> bool:
        """True if it has ended and its completion has been taken: then ``wait`` does not sleep."""
        return self.ended

    def cancel(self) -> None:
        """Requests that it ends early, and returns at once. ``wait`` tells how it ended."""
        self._cancel_requested = True
        job = self.job
        if job is not None:
            lib.kvf_job_cancel(job)

    def stream_wait(self, stream: int) -> None:
        """Makes a CUDA stream wait until this transfer has ended, in whatever way.

        Work that the stream is given from now on begins after that. ``stream`` is a handle, such as
        PyTorch's ``Stream.cuda_stream`` or CuPy's ``Stream.ptr``; 1 and 2 are the default streams,
        at least those of the arrays' devices. Returns at once.

        Raises InvalidArgument (no device of the engine knows the stream), Busy (1,024 waits are
        outstanding), KvferryError (no CUDA device, or a driver older than 11.7).
        """
        stream = integer("stream", stream)
        if not self.ended:
            assert self.job is not None
            check(lib.kvf_job_stream_wait(self.job, stream))

    async def wait(self) -> T:
        """Waits until it has ended; returns its result, or raises the error that ended it.

        If the waiting task is cancelled, the transfer is cancelled too; the cancellation goes on
        after the transfer has ended. The same is true of KeyboardInterrupt, and of any exception
        that a signal handler raises, the first time. Several tasks may wait.

        Raises TransferCancelled after ``cancel``, EngineClosed if closing the engine has cancelled
        it.
        """
        if not self.ended:
            self._completions.check_waitable()
        await await_to_end(self._until_over, self.cancel)
        if self.completion is None:
            raise error(lib.KVF_ERR_CLOSED)
        status = self.completion.status
        by_closing = self._completions.closing and not self._cancel_requested
        if status == lib.KVF_ERR_CANCELLED and by_closing:
            status = lib.KVF_ERR_CLOSED
        if status != lib.KVF_OK:
            raise error(status, self.completion.detail)
        if self._following_call is not None and self._following_call.failure is not None:
            raise self._following_call.failure
        return cast(T, self._result)

    async def _until_over(self) -> None:
        await self._completions.until_ended(self)
        if self._following_call is not None:
            await self._completions.until_ended(self._following_call)

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

    # ---- For the submitting code ----------------------------------------------------------------

    def expect(self) -> None:
        """Call this before the submitting call, and ``after_submit`` after it in any case."""
        for buffer in self._buffers.values():
            buffer.transfers.add(self)
        self._completions.register(self)

    def after_submit(self) -> None:
        """The submitting call has ended, or will not be made. May be repeated."""
        job = self.job
        if job is None:
            self._completions.withdraw(self)
        elif self.ended:
            # `completed` may have released it before: a number is never used twice, so that this
            # is harmless.
            lib.kvf_job_release(job)
        elif self._cancel_requested:
            lib.kvf_job_cancel(job)

    async def abort(self) -> None:
        """Cancels it, and waits for its end even if this task is cancelled."""
        self.cancel()
        with anyio.CancelScope(shield=True):
            await await_to_end(self._until_over, self.cancel)

    # ---- For the bridge -------------------------------------------------------------------------

    def completed(self, completion: Completion) -> None:
        self.completion = completion
        if self.job is not None:
            lib.kvf_job_release(self.job)
        if completion.status == lib.KVF_OK and self._make_result is not None:
            self._result = self._make_result(completion)
        if self._following_call is None:
            self._following_call = self.follow_up(completion)
        if self._following_call is not None:
            # Asked for again if an exception has interrupted this; it is made only once.
            self._following_call.worker.ask_for(self._following_call, first=True)
        self._drop_memory()

    def withdrawn(self) -> None:
        self._drop_memory()

    def follow_up(self, completion: Completion) -> Call | None:
        """Returns a call, not asked for yet, whose end ``wait`` waits for too; or None."""
        return None

    def _drop_buffer(self, index: int) -> None:
        """The transfer no longer uses this buffer. May be repeated."""
        buffer = self._buffers.get(index)
        if buffer is not None:
            buffer.transfers.discard(self)
        self._claims.pop(index, None)
        self._buffers.pop(index, None)

    def _drop_memory(self) -> None:
        # A program may keep this object: then it must not keep the memory alive.
        for index in list(self._buffers):
            self._drop_buffer(index)
        self._make_result = None
        self._source = None


async def start_and_wait(start: Coroutine[Any, Any, Transfer[T]]) -> T:
    """Awaits the start of a transfer and then its end; returns its result.

    When this raises, whatever the reason, the transfer is not in flight any more.
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
