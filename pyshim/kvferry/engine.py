"""The engine: devices, threads, pinned memory, and the transfers of plain memory regions."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ._bridge.arguments import HostMemory
from ._bridge.cancellation import see_through
from ._bridge.devices import Devices
from ._bridge.open_engine import OpenEngine
from ._bridge.submission import Priority, SubmitOptions
from ._bridge.trace import TraceEvent
from ._bridge.worker import Call
from ._native import lib
from .buffer import Buffer, borrow, pinned, registered, trim
from .errors import check
from .llama import Llama
from .regions import Memory, RegionList, region_list
from .transfer import Transfer, carried_out

if TYPE_CHECKING:
    from ._native import CData


class Engine(OpenEngine):
    """Moves memory between devices and the host beside whatever else they do.

    ``async with kvferry.Engine() as engine: ...``, or ``await engine.aclose()`` at the end. Use an
    engine from one event loop at a time, and from that loop's thread; asyncio, uvloop and trio.

    devices
        ``"auto"``: every CUDA device, and the host. ``"host"``: the CUDA driver is not touched.
        ``"cuda"``: NoDevice is raised where there is none. ``"cuda:0"``, or ordinals such as
        ``[0, 2]``: the host and these CUDA devices, as the driver counts them; others are not
        touched, and NoDevice is raised where one of these can't be used. (Each CUDA device costs a
        context, some hundred MiB of its memory.)
    copy_threads
        Threads that copy host memory; 0: by the number of cores, 6 at most.
    pinned_limit
        Most bytes of the buffer pool; 0: no limit.
    staging_bytes
        Most device memory used per device and direction; 0: 32 MiB.
    trace
        Record every piece moved, for ``trace()``.

    Making one starts its threads at once, and CUDA if the process hasn't: then it takes a few
    hundred milliseconds, so make it before serving.
    """

    def __init__(
        self,
        devices: Devices = "auto",
        *,
        copy_threads: int = 0,
        pinned_limit: int = 0,
        staging_bytes: int = 0,
        trace: bool = False,
    ) -> None:
        super().__init__(
            devices,
            copy_threads=copy_threads,
            pinned_limit=pinned_limit,
            staging_bytes=staging_bytes,
            trace=trace,
        )
        self._destroyed: Call | None = None  # the last call of all

    # ---- Memory ---------------------------------------------------------------------------------

    async def allocate(self, nbytes: int) -> Buffer:
        """Takes pinned memory from the pool. Its content is undefined.

        Microseconds where the pool has some to use again; new memory takes a third of a second for
        each GiB, on a thread of the engine's own. Raises PinnedLimit.
        """
        return await self._core.on_memory_thread(pinned, nbytes)

    async def register(self, memory: HostMemory) -> Buffer:
        """Pins memory of the caller's for every CUDA device, so that transfers use it like the
        pool's.

        ``memory`` is writable and contiguous, and can't be resized from now on. The Buffer that
        this returns is that memory; it stays pinned until the Buffer has been closed, or dropped,
        and whatever uses it is gone, after the engine has been closed too. Takes about 30 ms a GiB,
        on a thread of the engine's own. Without a CUDA device nothing is pinned.

        Raises Busy where it overlaps what is registered already, InvalidArgument, OutOfMemory.
        """
        return await self._core.on_memory_thread(registered, memory)

    async def trim(self) -> None:
        """Gives idle memory back to the system now: the pool's free buffers, and what the engine
        has pinned and allocated on devices for its own use and does not need at the moment.

        What has lain idle for half a minute goes by itself.
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
        """Attaches to a llama context: a ``llama_cpp.Llama``, a ctypes pointer, or its address.

        A Llama object is kept alive; don't close it before ``Llama.detach()``. What it knows of its
        conversation goes with the sequence: a Snapshot carries it, a load restores it, and
        ``remove`` and a load that fails reset it. Attach while no other thread uses the context.
        ``library`` is the path, or part of it, of the libllama to use when several are loaded; a
        whole path is never ambiguous. ``allow_blocking``: where libllama's calls can't be recorded,
        use its blocking calls on a thread of the engine's; the context must then rest until the
        transfer has ended, and what would touch it meanwhile raises Busy. ``variant`` names what
        states depend on and libllama doesn't tell, adapters above all: it becomes part of the
        ``fingerprint``, so that states go only between attachments of the same variant.

        Raises LibraryNotFound, TapUnavailable, ContextFreed.
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
        """Saves device or host memory into a buffer, and returns the buffer.

        ``source`` is an array (the buffer protocol, ``__cuda_array_interface__`` or
        ``__dlpack__``; with strides or without), a list of arrays, which are packed one after the
        other, a ``Region`` or a list of those. ``into`` is writable contiguous memory, or None for
        pinned memory.

        What writes the source must have been done. The transfer sees to it by following a CUDA
        stream: it begins when the work has been done that the stream holds when the transfer is
        submitted. ``after_stream`` is that stream's handle, such as PyTorch's
        ``Stream.cuda_stream`` or CuPy's ``Stream.ptr``; 1 and 2 are the default streams, of
        the arrays' devices at least (kvferry.h says which). Without one,
        - the stream that arrays name in ``__cuda_array_interface__`` is followed. CuPy's and
          Numba's name theirs; PyTorch's and JAX's none, so pass one or synchronize before. If
          arrays name several this raises InvalidArgument: make one wait for the others and pass
          it;
        - arrays that have ``__dlpack__`` alone make the stream that is followed wait for the work
          on them; it is the legacy default stream where no other array names one.

        The source must not be written meanwhile. Cancelling: see ``Transfer.wait``.
        Raises BufferTooSmall, Unreachable, InvalidArgument, TypeError.
        """
        return await carried_out(
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
        """As ``copy_out``, but returns as soon as the transfer has been submitted."""
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
        """Loads contiguous ``data`` into device or host memory: the way back from ``copy_out``.

        ``data`` has as many bytes as arrays have together; a Region takes its part of it.
        ``target`` and ``after_stream`` are as for ``copy_out``; the target must be writable, and
        what reads or writes it must have been done. DLPack before version 1 doesn't tell whether an
        array is writable, so that it is refused. If this fails or is cancelled, part of the
        target may have been written. To give a stream its work on the target before the load has
        ended, see ``Transfer.stream_wait``.
        """
        await carried_out(
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
        """As ``copy_in``, but returns as soon as the transfer has been submitted."""
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
            buffer,
            regions.owner,
            lambda _: buffer,
            writes_buffer=function is lib.kvf_regions_save,
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
            transfer.submitted()
        except BaseException:
            # Refused; or a signal handler has raised, before the call or after it.
            transfer.submitted()
            if not transfer.ended:
                await transfer.abort()
            raise
        return transfer

    # ---- Looking inside -------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Devices, why a device is missing, memory in use, the tap."""
        return self._core.describe()

    def trace(self) -> list[TraceEvent]:
        """Takes the recorded pieces, oldest first; the engine keeps the last 65,536.

        Needs ``Engine(trace=True)``.
        """
        return self._core.trace()

    # ---- Closing --------------------------------------------------------------------------------

    async def aclose(self, *, cancel: bool = False) -> None:
        """Closes the engine, and detaches its llama contexts.

        From now on, new transfers raise EngineClosed. Those in flight end as they would, or are
        cancelled if ``cancel`` is set or the task that waits here is; the tasks that wait for them
        learn their true outcome (EngineClosed if the closing cut them short). Snapshots and buffers
        stay valid. Closing twice is allowed. In a forked child it does nothing: the parent closes.
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
        await see_through(self._take_down, self._cancel)

    def _cancel(self) -> None:
        lib.kvf_engine_cancel(self._core.handle)

    async def _take_down(self) -> None:
        """Waits for what is in flight, then ends all threads. May be broken off and begun again."""
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
        # A body that failed has no use for what it left in flight.
        await self.aclose(cancel=exception is not None)
