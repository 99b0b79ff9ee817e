# Types of the extension module that build_native.py makes. include/kvferry.h documents it all.
from collections.abc import Callable
from typing import Any

CData = Any  # a C object: pointers, structs and arrays alike

class _FFI:
    NULL: CData
    def new(self, cdecl: str, init: object = ...) -> CData: ...
    def cast(self, cdecl: str, value: object) -> CData: ...
    def string(self, cdata: CData, maxlen: int = ...) -> bytes: ...
    def sizeof(self, cdecl: str | CData) -> int: ...
    def buffer(self, cdata: CData, size: int = ...) -> Any: ...
    def from_buffer(self, cdecl: str, data: object, require_writable: bool = ...) -> CData: ...
    def gc(self, cdata: CData, destructor: Callable[[CData], object], size: int = ...) -> CData: ...

class _Lib:
    KVF_VERSION_MAJOR: int
    KVF_VERSION_MINOR: int
    KVF_VERSION_PATCH: int
    KVF_ABI_VERSION: int

    KVF_OK: int
    KVF_ERR_INVALID_ARGUMENT: int
    KVF_ERR_INVALID_HANDLE: int
    KVF_ERR_STRUCT_SIZE: int
    KVF_ERR_OUT_OF_MEMORY: int
    KVF_ERR_PINNED_LIMIT: int
    KVF_ERR_BUFFER_TOO_SMALL: int
    KVF_ERR_BUSY: int
    KVF_ERR_CLOSED: int
    KVF_ERR_CANCELLED: int
    KVF_ERR_TIMEOUT: int
    KVF_ERR_FORKED: int
    KVF_ERR_UNSUPPORTED: int
    KVF_ERR_NO_DEVICE: int
    KVF_ERR_DEVICE: int
    KVF_ERR_DEVICE_LOST: int
    KVF_ERR_UNREACHABLE: int
    KVF_ERR_SYSTEM: int
    KVF_ERR_LIBRARY_NOT_FOUND: int
    KVF_ERR_LIBRARY_AMBIGUOUS: int
    KVF_ERR_TAP: int
    KVF_ERR_CONTEXT_FREED: int
    KVF_ERR_SEQUENCE_RANGE: int
    KVF_ERR_SEQUENCE_EMPTY: int
    KVF_ERR_STATE_DAMAGED: int
    KVF_ERR_STATE_MISMATCH: int
    KVF_ERR_CACHE_FULL: int
    KVF_ERR_LLAMA: int
    KVF_ERR_INTERNAL: int

    KVF_DEVICES_AUTO: int
    KVF_DEVICES_HOST: int
    KVF_DEVICES_CUDA: int
    KVF_ENGINE_TRACE: int
    KVF_PRIORITY_BACKGROUND: int
    KVF_PRIORITY_URGENT: int
    KVF_SUBMIT_FOLLOW_STREAM: int
    KVF_SUBMIT_TRUST_STATE: int
    KVF_SUBMIT_EACH_BLOCK: int
    KVF_COMPLETION_JOB: int
    KVF_COMPLETION_BLOCK: int
    KVF_LLAMA_ALLOW_BLOCKING: int
    KVF_LLAMA_FORCE_BLOCKING: int
    KVF_SAVE_AUTO: int
    KVF_SAVE_IN_PLACE: int
    KVF_SAVE_SNAPSHOT: int
    KVF_LOAD_AUTO: int
    KVF_LOAD_IN_PLACE: int
    KVF_LOAD_AHEAD: int
    KVF_BLOCKS_UNSEEN: int
    KVF_BLOCKS_NONE: int
    KVF_BLOCKS_CHECKPOINTS_ALONE: int
    KVF_BLOCKS_WITH_CHECKPOINTS: int
    KVF_BLOCKS_ALONE: int
    KVF_DIRECTION_SAVE: int
    KVF_DIRECTION_LOAD: int

    def kvf_version(self) -> CData: ...
    def kvf_abi_version(self) -> int: ...
    def kvf_status_name(self, status: int) -> CData: ...
    def kvf_strerror(self, status: int) -> CData: ...
    def kvf_engine_create(self, options: CData, engine: CData) -> int: ...
    def kvf_engine_describe(
        self, engine: int, json: CData, capacity: int, needed: CData
    ) -> int: ...
    def kvf_engine_cancel(self, engine: int) -> int: ...
    def kvf_engine_destroy(self, engine: int) -> int: ...
    def kvf_engine_trace(
        self, engine: int, events: CData, event_size: int, capacity: int
    ) -> int: ...
    def kvf_buffer_alloc(self, engine: int, bytes: int, buffer: CData) -> int: ...
    def kvf_buffer_alloc_with_error(
        self, engine: int, bytes: int, buffer: CData, error: CData, error_size: int
    ) -> int: ...
    def kvf_buffer_capacity(self, buffer: CData, bytes: CData) -> int: ...
    def kvf_buffer_free(self, buffer: CData) -> int: ...
    def kvf_buffer_register(self, engine: int, buffer: CData, bytes: int) -> int: ...
    def kvf_buffer_unregister(self, engine: int, buffer: CData) -> int: ...
    def kvf_buffer_trim(self, engine: int) -> int: ...
    def kvf_queue_create(self, queue: CData) -> int: ...
    def kvf_queue_fd(self, queue: int) -> int: ...
    def kvf_queue_take(
        self, queue: int, completions: CData, completion_size: int, capacity: int, timeout_ns: int
    ) -> int: ...
    def kvf_queue_wake(self, queue: int) -> int: ...
    def kvf_queue_destroy(self, queue: int) -> int: ...
    def kvf_job_poll(self, job: int, completion: CData, completion_size: int) -> int: ...
    def kvf_job_wait(
        self, job: int, timeout_ns: int, completion: CData, completion_size: int
    ) -> int: ...
    def kvf_job_cancel(self, job: int) -> int: ...
    def kvf_job_stream_wait(self, job: int, stream: int) -> int: ...
    def kvf_job_release(self, job: int) -> int: ...
    def kvf_regions_size(self, regions: CData, count: int, bytes: CData) -> int: ...
    def kvf_regions_save(
        self,
        engine: int,
        regions: CData,
        count: int,
        buffer: CData,
        bytes: int,
        options: CData,
        job: CData,
    ) -> int: ...
    def kvf_regions_load(
        self,
        engine: int,
        regions: CData,
        count: int,
        buffer: CData,
        bytes: int,
        options: CData,
        job: CData,
    ) -> int: ...
    def kvf_llama_attach(
        self, engine: int, context: CData, options: CData, llama: CData
    ) -> int: ...
    def kvf_llama_describe(self, llama: int, json: CData, capacity: int, needed: CData) -> int: ...
    def kvf_llama_size(self, llama: int, sequence: int, bytes: CData) -> int: ...
    def kvf_llama_save(
        self, llama: int, sequence: int, buffer: CData, bytes: int, options: CData, job: CData
    ) -> int: ...
    def kvf_llama_load(
        self, llama: int, sequence: int, buffer: CData, bytes: int, options: CData, job: CData
    ) -> int: ...
    def kvf_llama_remove(self, llama: int, sequence: int) -> int: ...
    def kvf_llama_settle(self, llama: int) -> int: ...
    def kvf_llama_detach(self, llama: int) -> int: ...
    def kvf_llama_blocks_allowed(self, llama: int, reason: CData, capacity: int) -> int: ...
    def kvf_llama_block_size(self, llama: int, tokens: int, bytes: CData) -> int: ...
    def kvf_llama_save_blocks(
        self,
        llama: int,
        sequence: int,
        blocks: CData,
        block_size: int,
        count: int,
        options: CData,
        job: CData,
    ) -> int: ...
    def kvf_llama_checkpoint_size(self, llama: int, sequence: int, bytes: CData) -> int: ...
    def kvf_llama_save_checkpoint(
        self, llama: int, sequence: int, buffer: CData, bytes: int, options: CData, job: CData
    ) -> int: ...
    def kvf_llama_load_blocks(
        self,
        llama: int,
        sequence: int,
        blocks: CData,
        block_size: int,
        count: int,
        checkpoint: CData,
        checkpoint_bytes: int,
        options: CData,
        job: CData,
    ) -> int: ...
    def kvf_state_cut(
        self,
        state: CData,
        bytes: int,
        blocks: CData,
        block_size: int,
        count: int,
        checkpoint: CData,
        checkpoint_bytes: CData,
        options: CData,
    ) -> int: ...
    def kvf_state_join(
        self,
        blocks: CData,
        block_size: int,
        count: int,
        checkpoint: CData,
        checkpoint_bytes: int,
        state: CData,
        state_bytes: CData,
        options: CData,
    ) -> int: ...

ffi: _FFI
lib: _Lib
