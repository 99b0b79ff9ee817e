/* SPDX-License-Identifier: MIT
 *
 * kvferry: moves the KV cache of a running language model between the accelerator and host memory,
 * fast, without stopping the model.
 *
 * This header is the whole public interface of libkvferry. It is C11 and C++17 clean.
 *
 * The shortest useful program
 * ---------------------------
 *     kvf_engine engine;  kvf_llama llama;  kvf_queue queue;  kvf_job job;
 *     kvf_queue_create(&queue);
 *     kvf_engine_create(NULL, &engine);
 *     kvf_llama_attach(engine, ctx, NULL, &llama);          // ctx: your llama_context *
 *
 *     uint64_t bytes;
 *     kvf_llama_size(llama, 0, &bytes);                     // sequence 0; moves no tensor byte
 *     void *state;
 *     kvf_buffer_alloc(engine, bytes, &state);              // or any memory of yours
 *
 *     kvf_submit_options submit = KVF_SUBMIT_OPTIONS_INIT;
 *     submit.queue = queue;
 *     kvf_llama_save(llama, 0, state, bytes, &submit, NULL);
 *     ... llama_decode() other sequences, or this one ...
 *     kvf_completion done;
 *     kvf_queue_take(queue, &done, sizeof done, 1, KVF_FOREVER);
 *
 * Words
 * -----
 * state       the bytes that llama_state_seq_get_data() writes for a sequence, bit for bit
 * save, load  device to host, host to device
 * region      rows of bytes in the memory of a device, and their place in a buffer
 * job         one submitted transfer. It ends with exactly one completion, whatever happens
 * queue       where completions arrive; it has a pollable file descriptor
 *
 * Rules that hold everywhere
 * --------------------------
 * Errors      Functions return KVF_OK (0), a count (> 0) where they say so, or a negative kvf_status.
 *             No error state is kept per thread: where more can be said than the status, it is
 *             written into the caller's `error` buffer or into the completion's `detail`.
 *             A function that returns an error has submitted nothing and will complete nothing.
 * Handles     Are numbers, not addresses; 0 is none. A stale, foreign or made-up handle is answered
 *             with KVF_ERR_INVALID_HANDLE, never followed. Numbers are not used twice.
 * Threads     Every function may be called from any thread at any time, unless its comment names a
 *             thread. The kvf_llama_* functions that touch a llama_context must be called by the
 *             thread that owns it, between its calls of llama_decode().
 * Structs     Start with `size`: set it to sizeof (the *_INIT macros do). A shorter struct of an older
 *             program gets defaults for what it lacks; a longer one is accepted while its unknown
 *             tail is zero, and refused with KVF_ERR_STRUCT_SIZE otherwise.
 * Times       Are nanoseconds of CLOCK_MONOTONIC. Sizes are bytes.
 * fork        After fork() the child may not use handles made by its parent: they are answered with
 *             KVF_ERR_FORKED. It may create engines of its own.
 */
#ifndef KVFERRY_H
#define KVFERRY_H

#ifndef KVF_CDEF /* the cffi build reads what follows through the C preprocessor, without includes */
#include <stddef.h>
#include <stdint.h>
#endif

#if defined(__GNUC__)
#define KVF_API __attribute__((visibility("default")))
#else
#define KVF_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------
 * Version and status
 * --------------------------------------------------------------------------------------------- */

#define KVF_VERSION_MAJOR 0
#define KVF_VERSION_MINOR 1
#define KVF_VERSION_PATCH 0
/* Major number of the ABI, and of the SONAME. It changes when a program must be built again. */
#define KVF_ABI_VERSION 0

/* The release that was loaded, such as "0.1.0". Static; never NULL. */
KVF_API const char *kvf_version(void);
/* KVF_ABI_VERSION of the library that was loaded. */
KVF_API uint32_t kvf_abi_version(void);

/* One table gives every status its number, its name and its text. Numbers are never reused. */
#define KVF_STATUS_MAP(X)                                                                          \
    X(OK, 0, "success")                                                                            \
    X(ERR_INVALID_ARGUMENT, -1, "invalid argument")                                                \
    X(ERR_INVALID_HANDLE, -2, "unknown handle, or its object has been destroyed")                  \
    X(ERR_STRUCT_SIZE, -3, "struct size is wrong, or fields this version does not know are set")   \
    X(ERR_OUT_OF_MEMORY, -4, "out of memory")                                                      \
    X(ERR_PINNED_LIMIT, -5, "the engine's limit of pinned memory is reached")                      \
    X(ERR_BUFFER_TOO_SMALL, -6, "the buffer is too small")                                         \
    X(ERR_BUSY, -7, "in use by a job in flight or by another object")                              \
    X(ERR_CLOSED, -8, "the engine is closing")                                                     \
    X(ERR_CANCELLED, -9, "the job was cancelled")                                                  \
    X(ERR_TIMEOUT, -10, "timed out")                                                               \
    X(ERR_FORKED, -11, "the handle was made before fork() in the parent process")                  \
    X(ERR_UNSUPPORTED, -12, "not supported here")                                                  \
    X(ERR_NO_DEVICE, -13, "no such device")                                                        \
    X(ERR_DEVICE, -14, "the device reported an error")                                             \
    X(ERR_DEVICE_LOST, -15, "the device is lost; the engine is broken, make a new one")            \
    X(ERR_UNREACHABLE, -16, "memory that no device of the engine can reach")                       \
    X(ERR_SYSTEM, -17, "the operating system refused")                                             \
    X(ERR_LIBRARY_NOT_FOUND, -18, "no libllama is loaded in this process")                         \
    X(ERR_LIBRARY_AMBIGUOUS, -19, "several libllama are loaded: name one")                         \
    X(ERR_TAP, -20, "libllama's calls cannot be recorded")                                         \
    X(ERR_CONTEXT_FREED, -21, "the llama_context has been freed")                                  \
    X(ERR_SEQUENCE_RANGE, -22, "sequence id out of the context's range")                           \
    X(ERR_SEQUENCE_EMPTY, -23, "the sequence is empty")                                            \
    X(ERR_STATE_DAMAGED, -24, "the state is truncated or its structure is damaged")                \
    X(ERR_STATE_MISMATCH, -25, "the state belongs to another model or another kind of cache")      \
    X(ERR_CACHE_FULL, -26, "the cache has not enough free cells")                                  \
    X(ERR_LLAMA, -27, "libllama refused")                                                          \
    X(ERR_INTERNAL, -28, "internal error")

typedef enum kvf_status {
#define KVF_STATUS_ENUM(name, value, text) KVF_##name = value,
    KVF_STATUS_MAP(KVF_STATUS_ENUM)
#undef KVF_STATUS_ENUM
} kvf_status;

/* "KVF_ERR_BUSY" for KVF_ERR_BUSY. Static; "KVF_?" for a number that is none. */
KVF_API const char *kvf_status_name(int32_t status);
/* What it means, in lower case, without a full stop. Static; never NULL. */
KVF_API const char *kvf_strerror(int32_t status);

/* ------------------------------------------------------------------------------------------------
 * Engine: devices, threads, memory
 * --------------------------------------------------------------------------------------------- */

typedef uint64_t kvf_engine;
typedef uint64_t kvf_queue;
typedef uint64_t kvf_job;
typedef uint64_t kvf_llama;

enum {
    KVF_DEVICES_AUTO =
        0, /* every CUDA device that the driver shows, or those of cuda_devices; and the host */
    KVF_DEVICES_HOST = 1, /* the host alone; the CUDA driver is not touched */
    KVF_DEVICES_CUDA = 2, /* as AUTO, but KVF_ERR_NO_DEVICE where no CUDA device can be used */
};

enum {
    KVF_ENGINE_TRACE = 1, /* record every piece moved, for kvf_engine_trace() */
};

typedef struct kvf_engine_options {
    uint32_t size;          /* sizeof(kvf_engine_options) */
    uint32_t devices;       /* KVF_DEVICES_* */
    uint32_t flags;         /* KVF_ENGINE_* */
    uint32_t copy_threads;  /* threads that copy host memory; 0: by the number of cores */
    uint64_t pinned_limit;  /* most bytes of the buffer pool, free ones included; 0: no limit */
    uint64_t staging_bytes; /* most device memory used per device and direction; 0: 32 MiB */
    char *error;            /* where to write one line of text when this call fails, or NULL */
    uint64_t error_size;    /* its capacity, terminating 0 included */
    /* Which CUDA devices: bit i is that of ordinal i, as the driver counts them (CUDA_VISIBLE_DEVICES changes that).
     * 0: every one that can be used. Others are not touched: no context is made there. KVF_ERR_NO_DEVICE where one
     * that is named cannot be used; with KVF_DEVICES_HOST none may be named. */
    uint64_t cuda_devices;
} kvf_engine_options;
#define KVF_ENGINE_OPTIONS_INIT {sizeof(kvf_engine_options), 0, 0, 0, 0, 0, 0, 0, 0}

/* Creates an engine. `options` may be NULL. Starts its threads; takes no pinned memory yet.
 * Errors: KVF_ERR_NO_DEVICE, KVF_ERR_STRUCT_SIZE, KVF_ERR_OUT_OF_MEMORY, KVF_ERR_SYSTEM. */
KVF_API int32_t kvf_engine_create(const kvf_engine_options *options, kvf_engine *engine);

/* Describes the engine as JSON text (devices, why a device is missing, memory in use, the tap).
 * Writes at most `capacity` bytes with the terminating 0 into `json`, and the bytes the whole
 * text needs, terminating 0 included, into `needed` (may be NULL).
 * Errors: KVF_ERR_BUFFER_TOO_SMALL (with `needed` set). `json` may be NULL when capacity is 0. */
KVF_API int32_t kvf_engine_describe(kvf_engine engine, char *json, uint64_t capacity,
                                    uint64_t *needed);

/* Asks every job in flight to end early; each still ends with its one completion. Returns at once. */
KVF_API int32_t kvf_engine_cancel(kvf_engine engine);

/* Waits for every job in flight, then ends the engine's threads and gives its memory back. New
 * submissions are refused with KVF_ERR_CLOSED from the moment of the call. Blocks: call
 * kvf_engine_cancel() first where that would take too long. Buffers that are still allocated stay
 * valid until kvf_buffer_free(); queues keep what they hold.
 * Errors: KVF_ERR_BUSY while a kvf_llama is attached, or when called from a completion callback. */
KVF_API int32_t kvf_engine_destroy(kvf_engine engine);

/* ------------------------------------------------------------------------------------------------
 * Memory. Any host memory serves as a buffer; pinned memory is what a GPU copies to at full speed.
 * --------------------------------------------------------------------------------------------- */

/* Takes a buffer of at least `bytes` from the engine's pool: page-aligned; pinned for every CUDA
 * device of the engine. Its content is undefined. A pool buffer that is used again costs
 * microseconds; a new one costs the time to map and pin it. So sizes are rounded up, by a sixteenth
 * and a page at most; and where the engine has no `pinned_limit`, a free buffer that is larger than
 * that by a quarter at most is used again. The caller owns the buffer until kvf_buffer_free().
 * Errors: KVF_ERR_OUT_OF_MEMORY, KVF_ERR_PINNED_LIMIT. */
KVF_API int32_t kvf_buffer_alloc(kvf_engine engine, uint64_t bytes, void **buffer);

/* As kvf_buffer_alloc(). When it fails, it writes one line of text into `error` (NULL: nowhere), which has room for
 * `error_size` bytes, terminating 0 included: how much is taken of how much, for instance. */
KVF_API int32_t kvf_buffer_alloc_with_error(kvf_engine engine, uint64_t bytes, void **buffer,
                                            char *error, uint64_t error_size);

/* How many bytes a buffer has in truth, from its start: what it takes of the engine's `pinned_limit`. All of
 * them may be used. Also after the engine is gone.
 * Errors: KVF_ERR_INVALID_ARGUMENT for an address that is not an allocated buffer. */
KVF_API int32_t kvf_buffer_capacity(const void *buffer, uint64_t *bytes);

/* Gives a buffer back to its pool, also after the engine is gone. NULL is allowed.
 * Errors: KVF_ERR_BUSY while a job uses it; KVF_ERR_INVALID_ARGUMENT for an address that is not an
 * allocated buffer, such as one that has been freed before. */
KVF_API int32_t kvf_buffer_free(void *buffer);

/* Pins memory of the caller's for every CUDA device, so that jobs use it like a pool buffer. The
 * memory stays the caller's, and must stay mapped until kvf_buffer_unregister(). Without a CUDA
 * device nothing is pinned. Errors: KVF_ERR_BUSY where it overlaps a registered range,
 * KVF_ERR_DEVICE, KVF_ERR_INVALID_ARGUMENT. */
KVF_API int32_t kvf_buffer_register(kvf_engine engine, void *buffer, uint64_t bytes);
/* Also after the engine has been destroyed.
 * Errors: KVF_ERR_BUSY while a job uses it; KVF_ERR_INVALID_ARGUMENT if it is not registered;
 * KVF_ERR_DEVICE_LOST where a copy did not end that may name it: it remains registered, and should remain mapped. */
KVF_API int32_t kvf_buffer_unregister(kvf_engine engine, void *buffer);

/* Returns the pool's free buffers to the system, all of them and now, and what the engine has pinned and
 * allocated for its own use and does not use at the moment (for each CUDA device up to 63 MiB of pinned memory,
 * and `staging_bytes` of device memory for each direction). What has lain idle for half a minute goes by
 * itself. */
KVF_API int32_t kvf_buffer_trim(kvf_engine engine);

/* ------------------------------------------------------------------------------------------------
 * Completions
 * --------------------------------------------------------------------------------------------- */

typedef struct kvf_completion {
    uint64_t job;       /* the job; its handle may have been released already */
    uint64_t user_data; /* as submitted */
    int32_t status;     /* KVF_OK, KVF_ERR_CANCELLED, or what went wrong */
    uint32_t mode;      /* of a llama transfer, as it was done: KVF_SAVE_* or KVF_LOAD_*; else 0 */
    uint64_t
        bytes; /* size of the state or of the regions; how much of it moved if status is not OK is undefined */
    uint64_t fragments;    /* separate pieces of tensor memory it consists of */
    uint64_t segments;     /* what remained of them after joining runs and rows into blocks */
    uint64_t submitted_ns; /* when the submitting call was entered */
    uint64_t started_ns;   /* when the first piece began to move; 0 if none did */
    uint64_t finished_ns;  /* when the job ended */
    char detail[128];      /* one line on what went wrong, or "" */
    /* Of a llama transfer, else 0. From submitted_ns to listed_ns libllama took cells and listed what to
     * move, from then on it named fragment after fragment; at recorded_ns the last one was known. */
    uint64_t listed_ns;
    uint64_t recorded_ns;
} kvf_completion;

/* Called on the engine's own dispatch thread, one at a time, in order of completion: keep it short.
 * It may call any kvf function but kvf_engine_destroy(), kvf_llama_detach() and those that wait. */
typedef void (*kvf_completion_callback)(const kvf_completion *completion);

#define KVF_FOREVER INT64_C(-1)

/* A queue belongs to no engine: it may serve several and outlive them. */
KVF_API int32_t kvf_queue_create(kvf_queue *queue);

/* A file descriptor that polls readable while the queue holds completions (level-triggered) or has
 * been woken. Wait for it in poll, epoll, an event loop; never read or close it: kvf_queue_take()
 * does, and kvf_queue_destroy(). Returns the descriptor, or a negative status. */
KVF_API int32_t kvf_queue_fd(kvf_queue queue);

/* Takes up to `capacity` completions, oldest first, each written at a stride of `completion_size`
 * (pass sizeof(kvf_completion)). Waits at most `timeout_ns` for the first one: 0 does not wait,
 * KVF_FOREVER waits until there is one. Several threads may take: each completion goes to one.
 * Returns how many were taken; 0 after a timeout, a wake or a destroy. */
KVF_API int32_t kvf_queue_take(kvf_queue queue, kvf_completion *completions,
                               uint64_t completion_size, uint32_t capacity, int64_t timeout_ns);

/* Makes one kvf_queue_take() return 0 that waits, or else one that will find the queue empty. Wakes are
 * counted: so many calls return 0 as there were wakes. One that takes completions uses up no wake. */
KVF_API int32_t kvf_queue_wake(kvf_queue queue);

/* Drops what it holds and closes its descriptor. Errors: KVF_ERR_BUSY while jobs in flight would
 * complete into it. */
KVF_API int32_t kvf_queue_destroy(kvf_queue queue);

/* ------------------------------------------------------------------------------------------------
 * Jobs
 * --------------------------------------------------------------------------------------------- */

/* On each device, urgent jobs go before background jobs. Within a priority, the job that was submitted first goes
 * first: a small one behind a large one waits for it. A job that still follows a stream, or that is still being
 * recorded, lets later ones pass until it can move. */
enum {
    KVF_PRIORITY_BACKGROUND = 0, /* paced, so that decoding beside it hardly notices */
    KVF_PRIORITY_URGENT = 1,     /* as fast as the link; goes before background jobs */
};

enum {
    /* The transfer begins when the work that `stream` holds at the time of the call has been done. A save by
     * snapshot copies aside during the call, which therefore waits for that work; so does kvf_llama_load() where the
     * stream may be writing the state: it reads the state's metadata in a buffer of pinned memory, and all of a state
     * with an envelope. (A stream that fills pageable memory, by a host function, must be waited for before the
     * call.) (Of the default streams, 0,
     * CU_STREAM_LEGACY and CU_STREAM_PER_THREAD, every context has one. Followed are that of the calling
     * thread's current context and those of the devices whose memory is moved; where no device of the engine
     * has its primary context current, those of all its devices.) A stream that is being captured into a CUDA
     * graph is refused with KVF_ERR_INVALID_ARGUMENT, and the capture goes on unharmed; so is a default stream
     * while a stream that it waits for is captured. */
    KVF_SUBMIT_FOLLOW_STREAM = 1,
    /* kvf_llama_load() alone. Hands libllama a state that nothing vouches for: one without an envelope, for a cache
     * whose format is not known (see kvf_llama_size()). libllama trusts what it loads: a damaged state may end the
     * process, or leave cells that only llama_memory_clear() frees. */
    KVF_SUBMIT_TRUST_STATE = 2,
};

/* How and whom to tell. Queue and callback may both be set, or neither (then poll or wait). */
typedef struct kvf_submit_options {
    uint32_t size;                    /* sizeof(kvf_submit_options) */
    uint32_t priority;                /* KVF_PRIORITY_* */
    kvf_queue queue;                  /* gets the completion; 0: none */
    kvf_completion_callback callback; /* gets it too, on the dispatch thread; NULL: none */
    uint64_t user_data;               /* yours; comes back in the completion */
    uint32_t mode;                    /* KVF_SAVE_* of a llama save, KVF_LOAD_* of a load */
    uint32_t flags;                   /* KVF_SUBMIT_* */
    char *error;         /* where to write one line of text when the call fails, or NULL */
    uint64_t error_size; /* its capacity, terminating 0 included */
    uint64_t stream;     /* a CUstream or cudaStream_t; read with KVF_SUBMIT_FOLLOW_STREAM only */
} kvf_submit_options;
#define KVF_SUBMIT_OPTIONS_INIT {sizeof(kvf_submit_options), 0, 0, 0, 0, 0, 0, 0, 0, 0}

/* 1 if the job has ended (then `completion`, if not NULL, is filled in), 0 if not. Never waits. */
KVF_API int32_t kvf_job_poll(kvf_job job, kvf_completion *completion, uint64_t completion_size);

/* Waits until the job has ended and fills in `completion` (may be NULL).
 * Returns KVF_OK whatever the job's own status; KVF_ERR_TIMEOUT. */
KVF_API int32_t kvf_job_wait(kvf_job job, int64_t timeout_ns, kvf_completion *completion,
                             uint64_t completion_size);

/* Asks the job to end early. A request: the job still ends exactly once, with KVF_ERR_CANCELLED or,
 * if it was faster, with its true outcome. Returns at once; cancelling twice or too late is allowed. */
KVF_API int32_t kvf_job_cancel(kvf_job job);

/* Makes a CUDA stream (a CUstream or cudaStream_t) wait: what it is given from now on begins when the job
 * has ended, in whatever way. Returns at once. Destroying the engine waits for streams that still wait.
 * A default stream means several, as KVF_SUBMIT_FOLLOW_STREAM says; all of them wait.
 * Errors: KVF_ERR_UNSUPPORTED (no CUDA device, or a driver older than 11.7), KVF_ERR_INVALID_ARGUMENT
 * (a stream that no device of the engine knows, or that is being captured into a CUDA graph), KVF_ERR_BUSY (1,024 waits are outstanding). */
KVF_API int32_t kvf_job_stream_wait(kvf_job job, uint64_t stream);

/* Lets go of the handle. The job itself goes on, and its completion still arrives. Every handle that
 * a submitting call gave out must be released once; a call that was given no place for a handle
 * (NULL) makes none. */
KVF_API int32_t kvf_job_release(kvf_job job);

/* ------------------------------------------------------------------------------------------------
 * Regions: any memory of the engine's devices
 * --------------------------------------------------------------------------------------------- */

/* `rows` rows of `width` bytes, each `pitch` bytes after the one before, in device or host memory; and
 * their place in the buffer. A plain run has one row; pitches are then not read. Any alignment. */
typedef struct kvf_region {
    uint64_t address;      /* of the first row */
    uint64_t width;        /* bytes of a row, at least 1 */
    uint64_t rows;         /* at least 1 */
    uint64_t pitch;        /* from row to row at `address`, at least width */
    uint64_t offset;       /* of the first row in the buffer */
    uint64_t buffer_pitch; /* from row to row in the buffer, at least width */
} kvf_region;

/* The buffer that these regions need: the end of the one that reaches furthest. Moves nothing.
 * Errors: KVF_ERR_INVALID_ARGUMENT for a malformed region or an overflow. */
KVF_API int32_t kvf_regions_size(const kvf_region *regions, uint64_t count, uint64_t *bytes);

/* Saves regions into, or loads them from, `buffer`, asynchronously. The regions are copied by the
 * call; the memory they name and the buffer must stay valid, and what is written must not be touched,
 * until the completion. Regions of one load must not overlap. A load or save of 0 regions completes
 * at once. `options` and `job` may be NULL. Never blocks on a transfer. Where a device is lost, the call
 * is refused, or accepted and ended, with KVF_ERR_DEVICE_LOST.
 * Errors: KVF_ERR_BUFFER_TOO_SMALL, KVF_ERR_UNREACHABLE, KVF_ERR_INVALID_ARGUMENT (also for memory that would be
 * written, and is read-only), KVF_ERR_CLOSED. */
KVF_API int32_t kvf_regions_save(kvf_engine engine, const kvf_region *regions, uint64_t count,
                                 void *buffer, uint64_t bytes, const kvf_submit_options *options,
                                 kvf_job *job);
KVF_API int32_t kvf_regions_load(kvf_engine engine, const kvf_region *regions, uint64_t count,
                                 const void *buffer, uint64_t bytes,
                                 const kvf_submit_options *options, kvf_job *job);

/* ------------------------------------------------------------------------------------------------
 * llama.cpp sequences
 *
 * Works on the libllama that the program has loaded, unmodified. While libllama serialises a sequence
 * on behalf of one of these functions, its calls that move tensor bytes are recorded instead of made
 * (the "tap"); the job moves the bytes later. Other threads and other callers of libllama are not
 * affected.
 *
 * Every function here but kvf_llama_describe() must be called by the thread that owns the
 * llama_context, between its calls of llama_decode(), as for llama.cpp's own functions.
 *
 * A context may have several attachments, of several engines too. They know of each other's transfers:
 * what is said of a sequence's transfers in flight holds for all of them.
 * --------------------------------------------------------------------------------------------- */

struct llama_context;

enum {
    /* Where libllama's calls cannot be recorded (a statically linked llama.cpp), use its blocking
     * calls on a thread of the engine's. The context must then rest until the completion: functions that
     * touch it return KVF_ERR_BUSY meanwhile. */
    KVF_LLAMA_ALLOW_BLOCKING = 1,
    /* Use them even where recording would work: to compare, or to get round a fault. */
    KVF_LLAMA_FORCE_BLOCKING = 2,
};

typedef struct kvf_llama_options {
    uint32_t size;  /* sizeof(kvf_llama_options) */
    uint32_t flags; /* KVF_LLAMA_* */
    /* Which libllama to use when several are loaded: its path, or a part of its path; or NULL. The path
     * of one of them, or of a link to it, names that one alone, whatever else has it in its path. */
    const char *library;
    char *error;         /* where to write one line of text when this call fails, or NULL */
    uint64_t error_size; /* its capacity, terminating 0 included */
} kvf_llama_options;
#define KVF_LLAMA_OPTIONS_INIT {sizeof(kvf_llama_options), 0, 0, 0, 0}

/* Attaches to a context; `options` may be NULL. The context stays the caller's and must outlive the
 * attachment: detach first. (A context that is freed all the same is noticed as libllama frees its
 * cache: jobs in flight are cancelled and waited for, later calls return KVF_ERR_CONTEXT_FREED.)
 * Errors: KVF_ERR_LIBRARY_NOT_FOUND, KVF_ERR_LIBRARY_AMBIGUOUS, KVF_ERR_UNSUPPORTED (a libllama is
 * loaded that is too old: it lacks a function), KVF_ERR_TAP, KVF_ERR_DEVICE_LOST (of any device of the
 * engine). */
KVF_API int32_t kvf_llama_attach(kvf_engine engine, struct llama_context *context,
                                 const kvf_llama_options *options, kvf_llama *llama);

/* Describes the attachment as JSON text: library and build, model, kind of cache, default save mode,
 * a fingerprint of the model and what that covers, counters of the tap. As kvf_engine_describe(). Any thread.
 *
 * The fingerprint is a hash of the model's description, size, number of parameters and metadata: of what
 * libllama tells. It does not cover what libllama has no public function for: the weights (two models that
 * differ in nothing else have one fingerprint), adapters and control vectors, and the context's own settings of
 * RoPE. Nor does it cover types, streams and layout of the cache (flash attention decides on the latter): a
 * state says these itself, and kvf_llama_load() refuses one of another cache with KVF_ERR_STATE_MISMATCH. */
KVF_API int32_t kvf_llama_describe(kvf_llama llama, char *json, uint64_t capacity,
                                   uint64_t *needed);

/* The size of a sequence's state in bytes, without moving any of it. An empty sequence has a state
 * too, of a few bytes.
 *
 * A state is what llama_state_seq_get_data() writes, bit for bit. Where kvferry does not know the format in which this
 * libllama writes this cache (kvf_llama_describe() says "format": "opaque"), 64 bytes follow: the envelope, with length,
 * checksum and the model's fingerprint. kvf_llama_load() verifies it there, since nothing else can tell a damaged state
 * from a whole one. Such a cache is saved and loaded while the caller waits.
 *
 * These checks guard against damage, not against forgery: the checksum (XXH64) has no key, so anybody can seal a state;
 * and of a state without an envelope the structure is checked, not the tensor bytes. A program that takes states from
 * strangers must authenticate them itself before each load: by a keyed MAC or a signature over all bytes, made by whoever
 * saved the state. Otherwise a stranger decides what libllama reads, and what the model is made to remember.
 * Errors: KVF_ERR_SEQUENCE_RANGE, KVF_ERR_CONTEXT_FREED. */
KVF_API int32_t kvf_llama_size(kvf_llama llama, int32_t sequence, uint64_t *bytes);

/* What may be done while a transfer is in flight
 * ----------------------------------------------
 * From a submitting call's return to the completion, by the context's thread. "This" is the sequence that is moved.
 * A save by snapshot (and of an opaque cache) has read everything when its call returns: then all is allowed. Loads in
 * place and ahead are alike.
 *
 * | operation                                       | load in flight | save in place in flight |
 * |-------------------------------------------------|----------------|-------------------------|
 * | llama_decode of other sequences                 | yes, 1         | yes, 1                  |
 * | llama_decode of this one                        | yes, 3         | yes, 3                  |
 * | llama_memory_seq_add, _div of another           | yes, 2         | yes, 2                  |
 * | llama_memory_seq_add, _div of this one          | yes, 2         | yes, 2                  |
 * | llama_memory_seq_cp between others              | yes, 2         | yes, 2                  |
 * | llama_memory_seq_cp of this one onto another    | no             | yes, 2                  |
 * | llama_memory_seq_cp onto this one               | yes, 3         | yes, 3                  |
 * | llama_memory_seq_rm of another                  | yes            | yes                     |
 * | llama_memory_seq_rm of this one                 | yes, 3         | yes, 3                  |
 * | llama_memory_seq_keep of this one               | yes            | yes                     |
 * | llama_memory_seq_keep of another                | yes, 3         | yes, 3                  |
 * | llama_memory_clear                              | yes, 3         | yes, 3                  |
 * | llama_state_seq_get_data of another             | yes, 1         | yes                     |
 * | llama_state_seq_get_data of this one            | waits          | yes                     |
 * | llama_state_get_data                            | waits          | yes                     |
 * | llama_state_seq_set_data into another           | yes, 1         | yes, 1                  |
 * | llama_state_seq_set_data into this one          | yes, 3         | yes, 3                  |
 * | kvf_llama_load of another                       | yes, 1         | yes, 1                  |
 * | kvf_llama_save, _remove of another              | yes            | yes                     |
 * | kvf_llama_save of this one                      | KVF_ERR_BUSY   | yes                     |
 * | kvf_llama_load, _remove of this one             | KVF_ERR_BUSY   | KVF_ERR_BUSY            |
 * | llama_free                                      | ends it first  | ends it first           |
 *
 * 1: waits for the transfer where llama.cpp would read or write its memory: a recurrent cache may move this sequence's
 *    cell; a transfer that follows a stream keeps decoding and loads off a sliding window; llama.cpp's own state calls
 *    wait where cells of both lie between each other.
 * 2: the next llama_decode waits for the transfer, because it rewrites keys of all sequences, or a whole stream.
 * 3: the next llama_decode, kvf_llama_save or kvf_llama_load waits for the transfer if this sequence is no longer what it
 *    was: its first or its last position is another one; or (from llama.cpp v0.5.0 on, in a cache with one kind of
 *    attention cells and no sliding window) the decode is about to write cells that the transfer moves. Two changes are
 *    not noticed elsewhere, and then bytes are lost: cells removed from the middle of the sequence, and cells removed
 *    and decoded anew by one batch that ends at the same position. libllama does not tell of them.
 * "no": the copy shares its cells with this sequence where the cache is unified, and libllama does not tell which
 *    sequences share cells. A decode of the copy reads cells that have not been loaded yet.
 *
 * Waiting is in the call itself (of 2 in llama_decode), on the context's thread. A transfer that follows a stream must
 * therefore not depend on what that thread does later. */

enum {
    /* SNAPSHOT where the next decode of the sequence would overwrite what is being saved (recurrent
     * states, sliding-window caches, kinds of cache this version does not know); else IN_PLACE. */
    KVF_SAVE_AUTO = 0,
    /* Straight from the cache, with no memory beside the buffer. The table above says what may be done until the
     * completion. */
    KVF_SAVE_IN_PLACE = 1,
    /* The call copies the sequence aside first, on the device; anything may be done to the sequence as
     * soon as it returns. Host memory is copied straight into the buffer, during the call. */
    KVF_SAVE_SNAPSHOT = 2,
};

/* Saves a sequence into `buffer`, which needs kvf_llama_size() bytes and must not be touched until the
 * completion. The call takes the time to record the layout; in place, what libllama has named moves meanwhile.
 * `options` and `job` may be NULL.
 * Errors: KVF_ERR_SEQUENCE_RANGE, KVF_ERR_SEQUENCE_EMPTY, KVF_ERR_BUFFER_TOO_SMALL, KVF_ERR_BUSY
 * (a load into this sequence is in flight), KVF_ERR_CLOSED, KVF_ERR_CONTEXT_FREED, KVF_ERR_DEVICE_LOST,
 * KVF_ERR_LLAMA, KVF_ERR_TAP (libllama's calls go past the tap, since somebody has overwritten its slots). */
KVF_API int32_t kvf_llama_save(kvf_llama llama, int32_t sequence, void *buffer, uint64_t bytes,
                               const kvf_submit_options *options, kvf_job *job);

enum {
    KVF_LOAD_AUTO = 0, /* IN_PLACE */
    /* Straight to the cache, with no device memory beside it. Bytes move as soon as libllama has taken cells and
     * listed all fragments. */
    KVF_LOAD_IN_PLACE = 1,
    /* Bytes move at once: to device memory of their own, while libllama still takes cells and lists; and from there to
     * their places. How much sooner that is done is what libllama takes (docs/performance.md). The memory, as much as the
     * state has bytes, is kept for the next such load for half a minute, or until kvf_buffer_trim(). In place where
     * there is not as much; where the cache is not in the memory of one CUDA device, or its driver refuses the kernels;
     * and without the tap: the completion's `mode` tells. */
    KVF_LOAD_AHEAD = 2,
};

/* Loads a state into a sequence, replacing what it held. `bytes` must be the state's exact size; the
 * buffer must not change until the completion. The sequence's cells are taken during the call; the
 * sequence must not be used until the completion.
 *
 * The state is checked before libllama sees it. A state that is refused then costs nothing: the sequence is as it was.
 * That are KVF_ERR_STATE_DAMAGED (truncated, damaged, or without an envelope where it needs one) and
 * KVF_ERR_STATE_MISMATCH (of another model, kind of cache, or release of llama.cpp); likewise KVF_ERR_SEQUENCE_RANGE,
 * KVF_ERR_BUSY (a transfer of this sequence is in flight), KVF_ERR_CLOSED, KVF_ERR_CONTEXT_FREED,
 * KVF_ERR_INVALID_ARGUMENT, KVF_ERR_DEVICE_LOST.
 *
 * What fails or is cancelled later leaves the sequence empty: KVF_ERR_LLAMA (libllama did not take the state),
 * KVF_ERR_CACHE_FULL (unless the state has more cells than a sequence may have at all: that is refused before),
 * KVF_ERR_TAP (as of kvf_llama_save()), KVF_ERR_DEVICE_LOST during the call. If the call itself fails, the sequence is empty when it returns; if the job does,
 * the sequence is emptied by the next kvf_llama_* call on an attachment to this context: call kvf_llama_settle() after a
 * completion that is not KVF_OK and before decoding. */
KVF_API int32_t kvf_llama_load(kvf_llama llama, int32_t sequence, const void *buffer,
                               uint64_t bytes, const kvf_submit_options *options, kvf_job *job);

/* Empties a sequence, as llama_memory_seq_rm() does, but not under a transfer.
 * Errors: KVF_ERR_BUSY (a transfer of this sequence is in flight), KVF_ERR_SEQUENCE_RANGE,
 * KVF_ERR_CONTEXT_FREED. */
KVF_API int32_t kvf_llama_remove(kvf_llama llama, int32_t sequence);

/* Empties the context's sequences whose loads failed or were cancelled after submission. Returns how many.
 * Errors: KVF_ERR_BUSY (there are some, and a transfer by blocking calls is in flight). */
KVF_API int32_t kvf_llama_settle(kvf_llama llama);

/* Waits for the attachment's jobs, settles, and detaches; with the last one libllama is as it was.
 * Blocks while jobs are in flight. Errors: KVF_ERR_BUSY when called from a completion callback. */
KVF_API int32_t kvf_llama_detach(kvf_llama llama);

/* ------------------------------------------------------------------------------------------------
 * Trace: what moved when, for pictures and tuning
 * --------------------------------------------------------------------------------------------- */

typedef struct kvf_trace_event {
    uint64_t job;       /* as in the completion */
    uint64_t user_data; /* as submitted */
    uint64_t begin_ns;
    uint64_t end_ns;
    uint64_t bytes;
    uint32_t device;    /* index into the devices of kvf_engine_describe() */
    uint32_t direction; /* 0: save, 1: load */
} kvf_trace_event;

/* Takes up to `capacity` recorded pieces, oldest first; returns how many. The engine keeps the last
 * 65,536. Needs KVF_ENGINE_TRACE. Errors: KVF_ERR_UNSUPPORTED without it. */
KVF_API int32_t kvf_engine_trace(kvf_engine engine, kvf_trace_event *events, uint64_t event_size,
                                 uint32_t capacity);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* KVFERRY_H */
