"""The engine: devices, threads, pinned memory, and the transfers of plain memory regions."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ._bridge.arguments import HostMemory
from ._bridge.cancellation import await_to_end
from ._bridge.open_engine import OpenEngine
from ._bridge.submission import Priority, SubmitOptions
from ._bridge.trace import TraceEvent
from ._bridge.worker import Call
from ._native import lib
from .buffer import Buffer, borrow, pinned, registered, trim
from .errors import check
from .llama import Llama
from .regions import Memory, RegionList, region_list
from .transfer import Transfer, start_and_wait

if TYPE_CHECKING:
    from ._native import CData


class Engine(OpenEngine):
    """Moves memory between devices and the host while both do other work.

    Use it as ``async with kvferry.Engine() as engine: ...``, or call ``await engine.aclose()`` in
    the end. Use an engine from one event loop at a time (asyncio, uvloop or trio), and only on the
    thread of that loop.

    devices
        ``"auto"``: every CUDA device, and the host. ``"host"``: the host alone; the CUDA driver is
        not opened. ``"cuda"``: as ``"auto"``, but NoDevice is raised if there is no CUDA device.
        ``"cuda:0"``, or ordinals such as ``[0, 2]``: these CUDA devices, by the driver's numbers,
        and the host; NoDevice is raised if one of them cannot be used. (Each CUDA device needs a
        context, some hundred MiB of its memory.)
    copy_threads
        The number of threads that copy host memory. 0: by the number of cores, at most 6.
    pinned_limit
        The most bytes that the buffer pool may have. 0: no limit.
    staging_bytes
        The most device memory used for each device and direction. 0: 32 MiB.
    trace
        Records every piece that is moved, for ``trace()``.

    The constructor blocks: it starts the engine's threads, and CUDA if the process has not used it,
    which takes a few hundred milliseconds. So make an engine before serving.
    """

    _destroyed: Call | None = None  # the last call of all

    # ---- Memory ---------------------------------------------------------------------------------

    async def allocate(self, nbytes: int) -> Buffer:
        """Returns pinned memory from the pool. Its content is undefined.

        Takes some microseconds if the pool has a free buffer. New memory takes a third of a second
        for each GiB, on a thread of the engine. Raises PinnedLimit, OutOfMemory, EngineClosed.
        """
        return await self._core.on_memory_thread(pinned, nbytes)

    async def register(self, memory: HostMemory) -> Buffer:
        """Pins memory that the caller owns, for every CUDA device, and returns it as a Buffer.

        Transfers then use it like memory from the pool. ``memory`` is writable and contiguous, and
        cannot be resized from now on. It stays pinned until the Buffer has been closed, or
        collected, and its last view is gone, also after the engine has been closed. Takes about
        30 ms a GiB, on a thread of the engine. Without a CUDA device nothing is pinned.

        Raises Busy (part of it is registered already), InvalidArgument, TypeError, OutOfMemory,
        EngineClosed.
        """
        return await self._core.on_memory_thread(registered, memory)

    async def trim(self) -> None:
        """Returns idle memory to the system now: the free buffers of the pool, and the pinned and
        device memory of the engine that no transfer uses.

        Without this call, memory returns to the system after half a minute without use.
        """
        await self._core.on_memory_thread(trim)

    # ---- llama.cpp ------------------------------------------------------------------------------

    def attach(
        self,
        llm: object,
        *,
        library: str | None = None,
        allow_blocking: bool = False,
        variant: str = "",
    ) -> Llama:
        """Attaches to a llama context. Call this while no other thread uses the context.

        llm
            A ``llama_cpp.Llama``, a ctypes pointer to a context, or its address. A
            ``llama_cpp.Llama`` is kept alive; do not close it before ``Llama.detach()``. The tokens
            that it knows go with sequence 0: a Snapshot has them, a load restores them, ``remove``
            and a load that fails reset them.
        library
            The path, or a part of the path, of the libllama to use where several are loaded. A
            whole path is never ambiguous.
        allow_blocking
            If libllama's calls cannot be recorded, use its blocking calls, on a thread of the
            engine. Then the context must not be used until the transfer has ended; calls of kvferry
            that would use it raise Busy.
        variant
            Names what states depend on and libllama does not tell, above all adapters. It becomes
            part of the ``fingerprint``, so that states of one variant are refused by another.

        Raises LibraryNotFound, TapUnavailable, ContextFreed, EngineClosed.
        """
        attachment = self._attach(
            llm, library=library, allow_blocking=allow_blocking, variant=variant
        )
        return Llama(self, self._core, attachment)

    # ---- Regions --------------------------------------------------------------------------------

    async def copy_out(
        self,
        source: Memory,
        into: HostMemory | None = None,
        *,
        priority: Priority = "background",
        after_stream: int | None = None,
    ) -> Buffer:
        """Saves device or host memory into a buffer; returns the buffer when all is moved.

        ``source`` is an array (with the buffer protocol, ``__cuda_array_interface__`` or
        ``__dlpack__``; with strides or without), a list of arrays, which are packed one after the
        other, a ``Region`` or a list of Regions. ``into`` is writable contiguous memory, or None
        for pinned memory from the pool. The source must not be written until this returns.

        The transfer can follow a CUDA stream: it begins when the work is done that the stream holds
        when the transfer is submitted. ``after_stream`` is the handle of that stream, such as
        PyTorch's ``Stream.cuda_stream`` or CuPy's ``Stream.ptr``; 1 and 2 are the default streams,
        at least those of the arrays' devices (kvferry.h says which). Without ``after_stream``:

        - The transfer follows the stream that the arrays name in ``__cuda_array_interface__``.
          Arrays of CuPy and Numba name theirs. Arrays of PyTorch and JAX name none: pass a stream,
          or synchronize first. If the arrays name several streams, this raises InvalidArgument:
          make one stream wait for the others and pass it.
        - Arrays that only have ``__dlpack__`` make the followed stream wait for the work on them.
          The followed stream is the legacy default stream if no other array names one.

        Cancelling: see ``Transfer.wait``. Raises BufferTooSmall, Unreachable, InvalidArgument,
        TypeError, PinnedLimit, Busy (a transfer in flight or a Snapshot uses ``into``),
        EngineClosed.
        """
        return await start_and_wait(
            self.start_copy_out(source, into, priority=priority, after_stream=after_stream)
        )

    async def start_copy_out(
        self,
        source: Memory,
        into: HostMemory | None = None,
        *,
        priority: Priority = "background",
        after_stream: int | None = None,
    ) -> Transfer[Buffer]:
        """As ``copy_out``, but returns when the transfer has been submitted."""
        await self._core.check_ready()
        regions = region_list(source, writable=False, after_stream=after_stream)
        if into is None:
            buffer = await self.allocate(regions.nbytes)
        else:
            buffer = borrow(into, "into", writable=True)
        return await self._submit(lib.kvf_regions_save, regions, buffer, priority)

    async def copy_in(
        self,
        target: Memory,
        data: HostMemory,
        *,
        priority: Priority = "background",
        after_stream: int | None = None,
    ) -> None:
        """Loads contiguous ``data`` into device or host memory: the reverse of ``copy_out``.

        Returns when all is moved. ``target`` and ``after_stream`` are as for ``copy_out``. Arrays
        take all of ``data``, which must have as many bytes as they have together; a Region takes
        its own part. The target must be writable, and must not be read or written until this
        returns. An array with DLPack before version 1 is refused, because it does not say whether
        it is writable. If this fails or is cancelled, part of the target may have been written.

        To give a stream its work on the target before the load has ended, see
        ``Transfer.stream_wait``. Raises as ``copy_out``.
        """
        await start_and_wait(
            self.start_copy_in(target, data, priority=priority, after_stream=after_stream)
        )

    async def start_copy_in(
        self,
        target: Memory,
        data: HostMemory,
        *,
        priority: Priority = "background",
        after_stream: int | None = None,
    ) -> Transfer[Buffer]:
        """As ``copy_in``, but returns when the transfer has been submitted."""
        await self._core.check_ready()
        regions = region_list(target, writable=True, after_stream=after_stream)
        buffer = borrow(data, "data")
        regions.check_fits(buffer.nbytes)
        return await self._submit(lib.kvf_regions_load, regions, buffer, priority)

    async def _submit(
        self,
        function: Callable[[int, CData, int, CData, int, CData, CData], int],
        regions: RegionList,
        buffer: Buffer,
        priority: Priority,
    ) -> Transfer[Buffer]:
        core = self._core
        transfer = Transfer(
            core.completions,
            [buffer],
            regions.owner,
            lambda _: buffer,
            writes_buffers=function is lib.kvf_regions_save,
        )
        try:
            submit = SubmitOptions(
                core.completions, transfer.token, priority, after_stream=regions.stream
            )
            transfer.expect()
            check(
                function(
                    core.handle,
                    regions.regions,
                    regions.count,
                    buffer.memory,
                    buffer.nbytes,
                    submit.options,
                    transfer.job_place,
                ),
                submit.text,
            )
            transfer.after_submit()
        except BaseException:
            # Refused; or a signal handler has raised, before the call or after it.
            transfer.after_submit()
            if not transfer.ended:
                await transfer.abort()
            raise
        return transfer

    # ---- Looking inside -------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Returns the devices, why a device is missing, the memory in use, the state of the tap.

        Raises EngineClosed.
        """
        return self._core.describe()

    def trace(self) -> list[TraceEvent]:
        """Takes the recorded pieces, oldest first. The engine keeps the latest 65,536.

        Needs ``Engine(trace=True)``; else there are none. Raises EngineClosed.
        """
        return self._core.trace()

    # ---- Closing --------------------------------------------------------------------------------

    async def aclose(self, *, cancel: bool = False) -> None:
        """Closes the engine, and detaches its llama contexts. Returns when all threads have ended.

        New transfers raise EngineClosed from now on. Transfers in flight go on to their end;
        ``cancel`` cancels them, as does cancelling the task that waits here. Tasks that wait for a
        transfer get its true outcome, or EngineClosed if the closing has cancelled it. Snapshots
        and buffers stay valid. Closing twice is allowed. In a forked child this does nothing: the
        engine belongs to the parent.
        """
        core = self._core
        if core.is_inherited():
            return
        if not core.closed:
            core.completions.check_waitable()
            for attachment in core.attachments:
                attachment.worker.check_awaitable()
        core.completions.closing = True
        if cancel:
            self._cancel()
        await await_to_end(self._take_down, self._cancel)

    def _cancel(self) -> None:
        lib.kvf_engine_cancel(self._core.handle)

    async def _take_down(self) -> None:
        """Waits for what is in flight, then ends all threads. May be called again after an
        interruption."""
        core = self._core
        if core.closed:
            return
        for transfer in core.completions.transfers():
            await core.completions.until_ended(transfer)
        # Each worker's last call is its own end.
        for attachment in list(core.attachments):
            await core.completions.until_ended(attachment.ask_for_detach())
        if self._destroyed is None:
            self._destroyed = core.memory_worker.make(lib.kvf_engine_destroy, core.handle)
        core.memory_worker.ask_for_last(self._destroyed)
        await core.completions.until_ended(self._destroyed)
        if core.closed:
            return
        core.completions.destroy()
        core.closed = True
        self._finalizer.detach()
        check(self._destroyed.result)

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A body that has failed does not need the transfers that it has left in flight.
        await self.aclose(cancel=exception is not None)
