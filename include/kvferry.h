/* SPDX-License-Identifier: MIT
 *
 * kvferry moves the KV cache of a running language model between an accelerator and host memory,
 * asynchronously, while the model goes on decoding.
 *
 * This header is the whole public interface of libkvferry. It is C11 and C++17 clean.
 *
 * Contents
 * --------
 *     Quick start
 *     Words
 *     Rules that hold for every function
 *     Lifetimes
 *   1 Engine                kvf_engine_create, _describe, _cancel, _destroy
 *   2 llama.cpp sequences   kvf_llama_attach, _size, _save, _load, _remove, _settle, _describe,
 *                           _detach
 *   2a Blocks, checkpoints  kvf_llama_blocks_allowed, _block_size, _save_blocks, _checkpoint_size,
 *                           _save_checkpoint, _load_blocks; kvf_state_cut, _join
 *   3 Jobs and completions  kvf_submit_options, kvf_completion, kvf_queue_*, kvf_job_*
 *   4 Memory                kvf_buffer_alloc, _alloc_with_error, _capacity, _free, _register,
 *                           _unregister, _trim
 *   5 Version and status    kvf_version, kvf_abi_version, kvf_status_name, kvf_strerror, the
 *                           statuses
 *   Advanced
 *   6 Regions               kvf_regions_size, _save, _load: any memory, without llama.cpp
 *   7 CUDA streams          KVF_SUBMIT_FOLLOW_STREAM, kvf_job_stream_wait
 *   8 Trace                 kvf_engine_trace
 *
 * Sections 1 to 5 are enough for a program that saves and loads sequences of llama.cpp.
 *
 * Quick start
 * -----------
 * Saves sequence 0 of a context while the context decodes, and loads the state into sequence 1.
 * Each call returns a status, which this excerpt does not look at. Complete programs:
 * examples/c/conversation.c handles every error and frees everything on every path;
 * examples/c/sequences.c waits with poll(2) and with a callback.
 *
 *     kvf_engine engine;
 *     kvf_llama llama;
 *     kvf_queue queue;
 *     kvf_engine_create(NULL, &engine);
 *     kvf_llama_attach(engine, context, NULL, &llama);  // context: your llama_context *
 *     kvf_queue_create(&queue);
 *
 *     uint64_t bytes;
 *     void *state;
 *     kvf_llama_size(llama, 0, &bytes);                 // of sequence 0
 *     kvf_buffer_alloc(engine, bytes, &state);          // or any memory of yours
 *
 *     kvf_submit_options submit = KVF_SUBMIT_OPTIONS_INIT;
 *     submit.queue = queue;
 *     kvf_llama_save(llama, 0, state, bytes, &submit, NULL);
 *     // Here llama_decode() may go on, with other sequences and with this one.
 *     kvf_completion done;
 *     kvf_queue_take(queue, &done, sizeof done, 1, KVF_FOREVER);
 *     // done.status is KVF_OK: `state` holds what llama_state_seq_get_data() would have written.
 *
 *     kvf_llama_load(llama, 1, state, bytes, &submit, NULL);
 *     kvf_queue_take(queue, &done, sizeof done, 1, KVF_FOREVER);
 *     // done.status is KVF_OK: sequence 1 may be decoded.
 *
 *     kvf_llama_detach(llama);
 *     kvf_buffer_free(state);
 *     kvf_queue_destroy(queue);
 *     kvf_engine_destroy(engine);
 *
 * Words
 * -----
 * state       the bytes that llama_state_seq_get_data() writes for a sequence, bit for bit. For an
 *             opaque cache an envelope follows, and counts (see kvf_llama_size()).
 * save, load  a transfer from the device to host memory, and one from host memory to the device.
 * buffer      the host memory that a save writes and a load reads.
 * pinned      host memory that a GPU copies from and to directly, at full speed (page-locked).
 * in place    a transfer between the cache and the buffer, without device memory beside the cache.
 * snapshot    a copy of a sequence, made during the call of a save; the job moves that copy.
 * opaque      a cache whose states have a format that kvferry does not know: see kvf_llama_size().
 * block       the state of a run of tokens, in the layers that keep every token: section 2a.
 * checkpoint  the state of sliding windows and recurrent layers at one position: section 2a.
 * envelope    64 bytes behind the state of an opaque cache, which tell damage.
 * attachment  what kvf_llama_attach() makes of an engine and a context: a kvf_llama.
 * fragment    a run of tensor bytes that libllama would move with one call.
 * piece       the part of a transfer that a device moves at once.
 * job         one submitted transfer. It ends with exactly one completion, whatever happens.
 * completion  the report on how a job ended, or on request the report that a block is whole.
 * queue       a list of completions with a file descriptor for poll(2).
 * tap         the functions of kvferry that libllama calls in place of ggml's own while kvferry
 *             records which bytes belong to a sequence.
 * region      rows of bytes in the memory of a device or of the host, and their place in a buffer.
 *
 * Rules that hold for every function
 * ----------------------------------
 * Returns     Functions return KVF_OK (0) or a negative kvf_status. Some return a count or another
 *             number of 0 or more instead of KVF_OK; their comments say so.
 *             If a submitting call returns an error, no job remains and no completion follows.
 * Errors      The line `Errors` lists the errors that are particular to a function. Every function
 *             may return these errors, too:
 *             KVF_ERR_INVALID_HANDLE    a handle is stale, made up, or of another kind;
 *             KVF_ERR_FORKED            a handle was made by the parent process, before fork();
 *             KVF_ERR_INVALID_ARGUMENT  a pointer that is needed is NULL; an option or a flag has a
 *                                       value that the field does not have;
 *             KVF_ERR_STRUCT_SIZE       a struct has an impossible size, or fields are set that
 *                                       this version does not know;
 *             KVF_ERR_OUT_OF_MEMORY, KVF_ERR_SYSTEM, KVF_ERR_INTERNAL.
 *             No error state is kept per thread. Where more can be said than the status, one line
 *             of text is written into the caller's `error` buffer, or into the completion's
 *             `detail`.
 * Threads     `Thread: any` means any thread, at any time, also while other threads use the handle.
 *             `Thread: the context's` means the thread that owns the llama_context, between its
 *             calls of llama_decode(). llama.cpp demands the same of its own functions.
 * Blocking    `May block: no` means that the call waits for no transfer, no device and no other
 *             thread that waits for one.
 * Handles     are numbers, not addresses; 0 is none. A number is never used twice, so that a stale
 *             handle is refused instead of followed.
 * Structs     of options begin with `size`, which the *_INIT macros set to sizeof. A shorter struct
 *             of an older program gets defaults for the fields that it lacks. A longer struct of a
 *             newer program is accepted if the fields that this version does not know are 0. In
 *             every field 0 means the default.
 * Units       Times are nanoseconds of CLOCK_MONOTONIC. Sizes are bytes.
 * fork        A child process may create engines of its own. It may not use its parent's handles.
 *
 * Lifetimes
 * ---------
 * | what                     | begins with         | ends with             | must outlive         |
 * |--------------------------|---------------------|-----------------------|----------------------|
 * | kvf_engine               | kvf_engine_create   | kvf_engine_destroy    | its kvf_llama, 1     |
 * | kvf_llama                | kvf_llama_attach    | kvf_llama_detach      | -                    |
 * | llama_context            | llama.cpp           | llama_free            | its kvf_llama, 2     |
 * | kvf_queue                | kvf_queue_create    | kvf_queue_destroy     | jobs that name it, 1 |
 * | kvf_job                  | a submitting call   | kvf_job_release       | -, 3                 |
 * | buffer of the pool       | kvf_buffer_alloc    | kvf_buffer_free       | jobs that use it, 1  |
 * | registered memory, 4     | kvf_buffer_register | kvf_buffer_unregister | jobs that use it, 1  |
 * | other memory as buffer   | the caller          | the caller            | jobs that use it     |
 * | memory that regions name | the caller          | the caller            | jobs that use it     |
 * | callback function        | the caller          | the caller            | jobs that name it    |
 * | options, error, regions  | the caller          | the caller            | the call             |
 * | CUDA stream              | the caller          | the caller            | the call             |
 * | static texts, 5          | the library         | never                 | -                    |
 *
 * 1: The function that would end it too early returns KVF_ERR_BUSY instead. An engine's jobs do not
 *    count: kvf_engine_destroy() waits for them.
 * 2: Detach first. If a context is freed before that, kvferry notices: it cancels the context's
 *    jobs and waits for them, and later calls return KVF_ERR_CONTEXT_FREED.
 * 3: A job goes on when its handle has been released. A handle stays valid when its job has ended
 *    and the engine has been destroyed.
 * 4: The memory stays the caller's, who frees it after kvf_buffer_unregister().
 * 5: What kvf_version(), kvf_status_name() and kvf_strerror() return.
 *
 * Queues, buffers of the pool and registered memory may outlive their engine.
 */
#ifndef KVFERRY_H
#define KVFERRY_H

#ifndef KVF_CDEF /* the cffi build preprocesses this header without includes */
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
 * 1 Engine: devices, threads
 * --------------------------------------------------------------------------------------------- */

/* Handles. 0 is none. */
typedef uint64_t kvf_engine;
typedef uint64_t kvf_llama;
typedef uint64_t kvf_queue;
typedef uint64_t kvf_job;

/* Values of kvf_engine_options.devices. */
typedef enum kvf_devices {
    /* The host, and every CUDA device that the driver shows (or those of `cuda_devices`). */
    KVF_DEVICES_AUTO = 0,
    /* The host alone. The CUDA driver is not opened. */
    KVF_DEVICES_HOST = 1,
    /* As AUTO, but KVF_ERR_NO_DEVICE where no CUDA device can be used. */
    KVF_DEVICES_CUDA = 2,
} kvf_devices;

/* Bits of kvf_engine_options.flags. */
typedef enum kvf_engine_flags {
    /* Record each piece that is moved, for kvf_engine_trace(). */
    KVF_ENGINE_TRACE = 1,
} kvf_engine_flags;

typedef struct kvf_engine_options {
    /* sizeof(kvf_engine_options); KVF_ENGINE_OPTIONS_INIT sets it. */
    uint32_t size;
    /* A value of kvf_devices. */
    uint32_t devices;
    /* Bits of kvf_engine_flags. */
    uint32_t flags;
    /* How many threads copy host memory, 256 at most. 0: the library decides by the number of
     * cores. */
    uint32_t copy_threads;
    /* The most bytes that the buffer pool may have, free buffers included. 0: no limit. */
    uint64_t pinned_limit;
    /* The most device memory for staging buffers, per device and direction. 0: 32 MiB. */
    uint64_t staging_bytes;
    /* Where one line of text is written if the call fails; NULL: nowhere. */
    char *error;
    /* The bytes that `error` has room for, terminating 0 included. */
    uint64_t error_size;
    /* Which CUDA devices: bit i is for ordinal i, as the driver counts them (CUDA_VISIBLE_DEVICES
     * changes that). 0: every device that can be used. No context is made on other devices. */
    uint64_t cuda_devices;
} kvf_engine_options;
#define KVF_ENGINE_OPTIONS_INIT {sizeof(kvf_engine_options), 0, 0, 0, 0, 0, 0, 0, 0}

/* Creates an engine and starts its threads.
 *
 * `options` may be NULL. The engine takes no pinned memory yet.
 *
 * Thread:    any
 * May block: for some hundred milliseconds, where the CUDA driver is opened first
 * Returns:   KVF_OK; `*engine` is the handle.
 * Errors:    KVF_ERR_NO_DEVICE (KVF_DEVICES_CUDA was asked for and no CUDA device can be used, or a
 *            device of `cuda_devices` cannot), KVF_ERR_INVALID_ARGUMENT (`cuda_devices` with
 *            KVF_DEVICES_HOST; too many `copy_threads`)
 * Since:     0.1 */
KVF_API int32_t kvf_engine_create(const kvf_engine_options *options, kvf_engine *engine);

/* Describes the engine as JSON: its devices, why a device is missing, the memory in use.
 *
 * Writes the text with its terminating 0 into `json`, cut to `capacity` bytes, and the bytes that
 * the whole needs into `*needed`. `needed` may be NULL; so may `json` when `capacity` is 0.
 *
 * The members of the object; later versions may add some:
 *     "version", "abi"        as kvf_version() and kvf_abi_version()
 *     "jobs_in_flight"        how many jobs have not ended
 *     "pool"                  an object: "limit" (`pinned_limit`), "mapped" (bytes of all buffers),
 *                             "free" (bytes of free buffers), "lost" (bytes that are never used
 *                             again, since a lost device may still touch them), "pinned" (false if
 *                             the engine has no CUDA device)
 *     "no_cuda"               why CUDA devices are missing, or ""
 *     "devices"               a list of objects: the host first, then the CUDA devices
 * The host has "kind" ("host"), "name" and "copy_threads". A CUDA device has:
 *     "kind"                  "cuda"
 *     "name", "pci_bus_id", "ordinal", "compute_capability", "memory" (bytes), "copy_engines"
 *     "staging"               the most bytes of device memory for staging, for each direction
 *     "pinned_bytes"          host memory that the library has pinned for the device's own use
 *     "broken"                true if the device is lost
 *     "kernels", "no_kernels" whether the driver takes kvferry's kernels; why not, or ""
 *     "background_pace"       "save" and "load", each with "runs", "rows" and "gathered", each with
 *                             "bytes" and "queued": the size of background copies, and how many are
 *                             queued at once
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK; `json` holds the whole text.
 * Errors:    KVF_ERR_BUFFER_TOO_SMALL (`*needed` is set then, too)
 * Since:     0.1 */
KVF_API int32_t kvf_engine_describe(kvf_engine engine, char *json, uint64_t capacity,
                                    uint64_t *needed);

/* Asks every job in flight to end early.
 *
 * Each job still ends with its one completion, as after kvf_job_cancel().
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK.
 * Errors:    none of its own
 * Since:     0.1 */
KVF_API int32_t kvf_engine_cancel(kvf_engine engine);

/* Waits for every job in flight, then ends the engine's threads and frees its memory.
 *
 * From the moment of the call new submissions are refused with KVF_ERR_CLOSED. Buffers that are
 * still allocated stay valid until kvf_buffer_free(). Queues keep the completions that they hold.
 *
 * Thread:    any but the one that runs completion callbacks
 * May block: until the jobs in flight have ended, and until the CUDA streams that wait for them
 *            have gone on; kvf_engine_cancel() shortens that
 * Returns:   KVF_OK; the handle is gone.
 * Errors:    KVF_ERR_BUSY (a kvf_llama is attached, or a completion callback makes the call;
 *            nothing has changed)
 * Since:     0.1 */
KVF_API int32_t kvf_engine_destroy(kvf_engine engine);

/* ------------------------------------------------------------------------------------------------
 * 2 llama.cpp sequences
 *
 * kvferry works with the libllama that the program has loaded, unmodified. While libllama
 * serialises a sequence on behalf of one of these functions, the tap records the calls that would
 * move tensor bytes; the job moves the bytes later. Other threads and other callers of libllama are
 * not affected.
 *
 * A context may have several attachments, of several engines too. What is said below of a
 * sequence's transfers in flight counts the transfers of all attachments.
 * --------------------------------------------------------------------------------------------- */

struct llama_context;

/* Bits of kvf_llama_options.flags, for programs where the tap does not work. */
typedef enum kvf_llama_flags {
    /* Where libllama's calls cannot be recorded (llama.cpp is linked statically), let a thread of
     * the engine make libllama's blocking calls. Until the completion the context must not be used,
     * and functions that would touch it return KVF_ERR_BUSY. */
    KVF_LLAMA_ALLOW_BLOCKING = 1,
    /* Make the blocking calls even where recording works: to compare, or to avoid a fault. */
    KVF_LLAMA_FORCE_BLOCKING = 2,
} kvf_llama_flags;

typedef struct kvf_llama_options {
    /* sizeof(kvf_llama_options); KVF_LLAMA_OPTIONS_INIT sets it. */
    uint32_t size;
    /* Bits of kvf_llama_flags. */
    uint32_t flags;
    /* Which libllama to use when the process has loaded several: its path, a link to it, or a part
     * of its path. A whole path names that library alone. NULL: the only one. */
    const char *library;
    /* Where one line of text is written if the call fails; NULL: nowhere. */
    char *error;
    /* The bytes that `error` has room for, terminating 0 included. */
    uint64_t error_size;
} kvf_llama_options;
#define KVF_LLAMA_OPTIONS_INIT {sizeof(kvf_llama_options), 0, 0, 0, 0}

/* Attaches an engine to a context, so that the context's sequences can be saved and loaded.
 *
 * `options` may be NULL. The context stays the caller's, who detaches before freeing it.
 *
 * Thread:    the context's
 * May block: no; without the tap, while a state is copied if no sequence of the context is empty
 * Returns:   KVF_OK; `*llama` is the handle.
 * Errors:    KVF_ERR_LIBRARY_NOT_FOUND, KVF_ERR_LIBRARY_AMBIGUOUS, KVF_ERR_TAP, KVF_ERR_UNSUPPORTED
 *            (libllama is too old and lacks a function, or the model keeps no state),
 *            KVF_ERR_DEVICE_LOST (any device of the engine is lost), KVF_ERR_CLOSED, KVF_ERR_BUSY
 *            (a blocking transfer of another attachment to the context is in flight)
 * Since:     0.1 */
KVF_API int32_t kvf_llama_attach(kvf_engine engine, struct llama_context *context,
                                 const kvf_llama_options *options, kvf_llama *llama);

/* Tells how many bytes the state of a sequence has, without moving any of them. (Without the tap,
 * libllama copies the first state with cells that is looked at, to show the format of the cache.)
 *
 * An empty sequence has a state too, of a few bytes.
 *
 * A state is what llama_state_seq_get_data() writes, bit for bit. If kvferry does not know the
 * format in which this libllama writes this cache ("format" is "opaque" in kvf_llama_describe()),
 * an envelope of 64 bytes follows: length, checksum, and the model's fingerprint. kvf_llama_load()
 * verifies the envelope, because nothing else tells a damaged state from a whole one. Such a cache
 * is saved and loaded during the submitting call.
 *
 * These checks guard against damage, not against forgery. The checksum (XXH64) has no key: anybody
 * can make a valid envelope. Of a state without an envelope kvferry checks the structure, not the
 * tensor bytes. A program that takes states from strangers must authenticate them before each load,
 * by a keyed MAC or a signature over all bytes. Otherwise a stranger decides what libllama reads,
 * and what the model remembers.
 *
 * Thread:    the context's
 * May block: no; without the tap, while a state is copied
 * Returns:   KVF_OK; `*bytes` is the size.
 * Errors:    KVF_ERR_SEQUENCE_RANGE, KVF_ERR_CONTEXT_FREED, KVF_ERR_LLAMA, KVF_ERR_BUSY (a blocking
 *            transfer is in flight)
 * Since:     0.1 */
KVF_API int32_t kvf_llama_size(kvf_llama llama, int32_t sequence, uint64_t *bytes);

/* What may be done while a transfer is in flight
 * ----------------------------------------------
 * The table holds from the return of the submitting call to the completion, for the context's
 * thread. "This one" is the sequence that is moved. A save by snapshot, and any save of an opaque
 * cache, has read everything when its call returns: then everything is allowed. Loads in place and
 * loads ahead are alike.
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
 * 1: The call waits for the transfer where llama.cpp would read or write the transfer's memory: a
 *    recurrent cache may move this sequence's cell; a transfer that follows a stream keeps decoding
 *    and loads away from a sliding window; llama.cpp's own state calls wait where the cells of the
 *    two sequences are interleaved.
 * 2: The next llama_decode waits for the transfer, because that decode rewrites the keys of all
 *    sequences, or a whole stream.
 * 3: The next llama_decode, kvf_llama_save or kvf_llama_load waits for the transfer if this
 *    sequence has changed. kvferry notices a change of the sequence's first or last position. From
 *    llama.cpp v0.5.0 on, in a cache with one kind of attention and no sliding window, kvferry also
 *    notices that a decode is about to write cells that the transfer moves. Elsewhere four changes
 *    go unnoticed, and bytes are lost: cells are removed from the middle of the sequence; in a
 *    cache with sliding windows, whose first position libllama does not tell, cells are removed
 *    from the beginning; cells at its end are removed, and one batch decodes new ones up to the
 *    same position (beside a save in place of a cache with attention alone and no sliding window:
 *    to that position or beyond); the whole sequence is replaced by one with the same first and
 *    last position.
 * "no": Where the cache is unified, the copy shares its cells with this sequence. libllama does not
 *    tell which sequences share cells: a decode of the copy reads cells that have not been loaded
 *    yet.
 *
 * A call that waits blocks the context's thread. A transfer that follows a stream must therefore
 * not depend on work that this thread submits later. */

/* How a save reads the cache. Values of kvf_submit_options.mode for kvf_llama_save(), and of
 * kvf_completion.mode. A load refuses them: only 0, AUTO, means something for both.
 *
 * The completion's `mode` says how the save was done. It can differ from what was asked for:
 * - IN_PLACE instead of SNAPSHOT: where device memory is short; and without the tap, where the
 *   context must not be used until the completion.
 * - SNAPSHOT instead of IN_PLACE: for an opaque cache, whose bytes move during the call; and for a
 *   sliding window if kvferry cannot tell which cells other sequences may take. */
typedef enum kvf_save_mode {
    /* SNAPSHOT where the next decode of the sequence would overwrite what is being saved (recurrent
     * states, sliding windows, kinds of cache that this version does not know); else IN_PLACE. */
    KVF_SAVE_AUTO = 0,
    /* Bytes move straight from the cache, with no memory beside the buffer. The table above says
     * what may be done until the completion. */
    KVF_SAVE_IN_PLACE = 1,
    /* The call copies the sequence to other device memory before it returns; from then on anything
     * may be done to the sequence (without the tap, not before the completion). Host memory is
     * copied straight into the buffer, during the call. Where device memory is short, the call
     * moves the bytes in place and returns when they have been moved; the completion's `mode` is
     * then KVF_SAVE_IN_PLACE. */
    KVF_SAVE_SNAPSHOT = 2,
} kvf_save_mode;

/* How a load writes the cache. Values of kvf_submit_options.mode for kvf_llama_load(), and of
 * kvf_completion.mode. A save refuses them: only 0, AUTO, means something for both. */
typedef enum kvf_load_mode {
    /* IN_PLACE. */
    KVF_LOAD_AUTO = 0,
    /* Bytes move straight to the cache, with no device memory beside it. They begin to move when
     * libllama has taken cells and listed what to move. */
    KVF_LOAD_IN_PLACE = 16,
    /* Bytes move at once to other device memory, while libllama still takes cells and lists what to
     * move; from there they move to their places within the device. The load ends sooner by about
     * the time that libllama takes. The device memory, as much as the state has bytes, is kept for
     * the next load ahead for half a minute, or until kvf_buffer_trim().
     * The load is done in place instead, and the completion's `mode` says so, if device memory is
     * short, if the cache is not in the memory of one CUDA device, if the driver refuses kvferry's
     * kernels, or if there is no tap. */
    KVF_LOAD_AHEAD = 17,
} kvf_load_mode;

/* The struct is in section 3. */
typedef struct kvf_submit_options kvf_submit_options;

/* Saves a sequence into `buffer`, asynchronously.
 *
 * The buffer needs kvf_llama_size() bytes, and must not be touched until the completion. The
 * completion's `bytes` is the size of the state: pass it to kvf_llama_load(). The call records
 * where the sequence's bytes are: half a millisecond for a sequence in one run of cells, some ten
 * milliseconds for half a million fragments. A save in place begins to move bytes meanwhile.
 * `options` and `job` may be NULL. If `job` is given, release the handle with kvf_job_release().
 *
 * Thread:    the context's
 * May block: where note 3 of the table says so; where the save is by snapshot (AUTO chooses that,
 *            too), until the copy has been made, or until the bytes have been moved if device
 *            memory is short (before that, with KVF_SUBMIT_FOLLOW_STREAM, until the stream has done
 *            its work); with an opaque cache, until the bytes have been moved; with a sliding
 *            window saved in place, until the few cells have been moved that other sequences may
 *            take; with a cache in memory that no device of the engine reaches, until libllama has
 *            copied it; without the tap, as kvf_llama_size()
 * Returns:   KVF_OK; one completion follows.
 * Errors:    KVF_ERR_SEQUENCE_RANGE, KVF_ERR_SEQUENCE_EMPTY (also where its recurrent layers alone
 *            are empty: no load takes such a state), KVF_ERR_BUFFER_TOO_SMALL, KVF_ERR_BUSY
 *            (a load into this sequence, or a blocking transfer of the context, is in flight),
 *            KVF_ERR_INVALID_ARGUMENT (the buffer cannot be written; `mode` is of a load),
 *            KVF_ERR_CLOSED, KVF_ERR_CONTEXT_FREED, KVF_ERR_DEVICE_LOST, KVF_ERR_LLAMA, KVF_ERR_TAP
 *            (another library has replaced the tap's functions), and those of section 7
 * Since:     0.1 */
KVF_API int32_t kvf_llama_save(kvf_llama llama, int32_t sequence, void *buffer, uint64_t bytes,
                               const kvf_submit_options *options, kvf_job *job);

/* Loads a state into a sequence, asynchronously; the state replaces what the sequence held.
 *
 * `bytes` is the exact size of the state: what the completion of its save says. The buffer must not
 * change until the completion. The call takes the sequence's cells; the table above says what may
 * be done until the completion. `options` and `job` may be NULL. If `job` is given, release the
 * handle with kvf_job_release().
 *
 * kvferry checks the state before libllama sees it. A load that is refused then leaves the sequence
 * as it was. A load that fails or is cancelled later leaves the sequence empty: if the call fails,
 * the sequence is empty when the call returns; if the job fails, the next kvf_llama_* call on an
 * attachment to this context empties the sequence. So after a completion that is not KVF_OK, call
 * kvf_llama_settle() before decoding.
 *
 * Thread:    the context's
 * May block: where notes 1 and 3 of the table say so; with an opaque cache, until the bytes have
 *            been moved; with a sliding window, until the few cells have been moved that other
 *            sequences may take; with KVF_SUBMIT_FOLLOW_STREAM and a buffer of pinned memory or a
 *            state in an envelope, until the stream has done its work; with a cache in memory that
 *            no device of the engine reaches, until libllama has copied it; without the tap, as
 *            kvf_llama_size()
 * Returns:   KVF_OK; one completion follows.
 * Errors:    The sequence is as it was: KVF_ERR_STATE_DAMAGED (truncated, damaged, or without the
 *            envelope that this cache needs), KVF_ERR_STATE_MISMATCH (the state is of another
 *            model, kind of cache, or release of llama.cpp), KVF_ERR_CACHE_FULL (the state has more
 *            cells than a sequence may have), KVF_ERR_SEQUENCE_RANGE, KVF_ERR_BUSY (a transfer of
 *            this sequence, or a blocking transfer of the context, is in flight), KVF_ERR_CLOSED,
 *            KVF_ERR_CONTEXT_FREED, KVF_ERR_INVALID_ARGUMENT (the buffer is not mapped; `mode` is
 *            of a save), KVF_ERR_DEVICE_LOST, and those of section 7.
 *            The sequence is empty: KVF_ERR_LLAMA (libllama did not take the state),
 *            KVF_ERR_CACHE_FULL (the cells are taken by other sequences), KVF_ERR_TAP (as for a
 *            save), KVF_ERR_DEVICE_LOST (the device was lost during the call).
 * Since:     0.1 */
KVF_API int32_t kvf_llama_load(kvf_llama llama, int32_t sequence, const void *buffer,
                               uint64_t bytes, const kvf_submit_options *options, kvf_job *job);

/* Empties a sequence, as llama_memory_seq_rm() does, unless a transfer of the sequence is in
 * flight.
 *
 * Thread:    the context's
 * May block: no
 * Returns:   KVF_OK; the sequence is empty.
 * Errors:    KVF_ERR_BUSY (a transfer of this sequence, or a blocking transfer of the context, is
 *            in flight), KVF_ERR_SEQUENCE_RANGE, KVF_ERR_CONTEXT_FREED
 * Since:     0.1 */
KVF_API int32_t kvf_llama_remove(kvf_llama llama, int32_t sequence);

/* Empties the sequences of the context whose loads failed or were cancelled after submission.
 *
 * Call it after such a completion and before decoding. The functions that size, save, load, remove
 * and detach do the same first.
 *
 * Thread:    the context's
 * May block: no
 * Returns:   how many sequences were emptied, 0 or more.
 * Errors:    KVF_ERR_BUSY (there are some, and a blocking transfer of the context is in flight)
 * Since:     0.1 */
KVF_API int32_t kvf_llama_settle(kvf_llama llama);

/* Describes the attachment as JSON: libllama and its build, the model, the kind of cache, the
 * default mode of saves, a fingerprint of the model, counters of the tap.
 *
 * Arguments are those of kvf_engine_describe(). The members of the object; later versions may add
 * some:
 *     "library"               the path of libllama
 *     "ggml_version", "ggml_commit"
 *                             what ggml says of its build, or ""
 *     "model"                 libllama's description of the model
 *     "fingerprint", "fingerprint_covers"
 *                             a hash of the model, and a list of what it covers
 *     "cache"                 the kinds of the cache's parts, such as "attention+recurrent", or
 *                             "unknown"
 *     "format"                kvferry's name for the format of the states; "opaque" where kvferry
 *                             does not know it, "unseen" until a state with cells has been seen
 *     "layout"                a hash of the format and of all types, row sizes and streams of the
 *                             cache, in hex: states and blocks fit where it is equal; "" until a
 *                             state with cells has been seen, and where the format is not known
 *     "guarded_by"            how loads check a state: "structure", or "envelope"
 *     "blocks", "why"
 *                             what kvf_llama_blocks_allowed() says: "unseen", "none",
 *                             "checkpoints", "blocks+checkpoints" or "blocks"; and its reason
 *     "parts_in_blocks"
 *                             how many of the parts blocks hold: see kvf_state_options
 *     "window"
 *                             the tokens of the model's sliding window, or 0
 *     "default_mode"
 *                             what KVF_SAVE_AUTO means here: "in_place" or "snapshot"
 *     "tap"
 *                             whether the tap is used; false: libllama's blocking calls
 *     "recorded_calls", "passed_calls"
 *                             calls that the tap has recorded, and that it has passed to ggml
 *     "sequences"             how many sequences the context may have
 *
 * The fingerprint is a hash of what libllama tells of
 * the model: description, size, number of parameters, metadata. It does not cover what libllama has
 * no public function for: the weights (two models that differ in nothing else have one
 * fingerprint), adapters, control vectors, and the context's own settings of RoPE. It does not
 * cover the types, streams and layout of the cache either: a state says these itself, and
 * kvf_llama_load() refuses a state of another cache.
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK; `json` holds the whole text.
 * Errors:    KVF_ERR_BUFFER_TOO_SMALL (`*needed` is set then, too)
 * Since:     0.1 */
KVF_API int32_t kvf_llama_describe(kvf_llama llama, char *json, uint64_t capacity,
                                   uint64_t *needed);

/* Waits for the attachment's jobs, empties what failed loads have left, and detaches.
 *
 * With the last attachment to a libllama, the tap is removed from that libllama.
 *
 * Thread:    the context's
 * May block: until the attachment's jobs have ended
 * Returns:   KVF_OK; the handle is gone.
 * Errors:    KVF_ERR_BUSY (a completion callback makes the call; nothing has changed)
 * Since:     0.1 */
KVF_API int32_t kvf_llama_detach(kvf_llama llama);

/* ------------------------------------------------------------------------------------------------
 * 2a Blocks and checkpoints
 *
 * A block is the state of the tokens at the positions [begin, end) of a sequence, in the layers
 * that keep every token: bit for bit what libllama would write for a sequence that held these
 * tokens alone, under the same sequence id. For plain attention a block is a state of its own,
 * which kvf_llama_load() and llama.cpp itself load; beside windows or recurrent layers it is the
 * beginning of one. A conversation that is saved in blocks of 256 tokens, say, moves after each
 * turn what is new, and conversations that begin alike can share the blocks of their beginning.
 *
 * A checkpoint is the rest of a state: sliding windows and recurrent layers at one position, the
 * state that llama.cpp writes with LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY. A window's rows and a
 * recurrent state of an earlier position are gone once decoding has gone on, so checkpoints are
 * saved between calls of llama_decode().
 *
 * kvf_llama_blocks_allowed() tells what a cache allows. Without the tap nothing of this section is
 * supported.
 * --------------------------------------------------------------------------------------------- */

/* What kvf_llama_blocks_allowed() returns. */
typedef enum kvf_blocks_allowed {
    /* No state with cells has been seen yet. */
    KVF_BLOCKS_UNSEEN = 0,
    /* Neither blocks nor checkpoints: save and load whole states. */
    KVF_BLOCKS_NONE = 1,
    /* Checkpoints alone: every layer is recurrent, and a checkpoint is a whole state. */
    KVF_BLOCKS_CHECKPOINTS_ALONE = 2,
    /* Blocks, and a checkpoint at the end of the last one. */
    KVF_BLOCKS_WITH_CHECKPOINTS = 3,
    /* Blocks alone. */
    KVF_BLOCKS_ALONE = 4,
} kvf_blocks_allowed;

/* One block: where its bytes are, and which positions it covers. */
typedef struct kvf_block {
    /* Host memory, the caller's. Blocks of one call must not overlap in memory. */
    void *buffer;
    /* The bytes at `buffer`. A save reads how much room there is, and writes the size of the block.
     * A load takes the exact size. */
    uint64_t bytes;
    /* The first position of the block. */
    int32_t begin;
    /* The position after the last one. */
    int32_t end;
} kvf_block;

/* Tells what the cache allows, and why not more.
 *
 * `reason` gets one line of text, "" where blocks alone are allowed, cut to `capacity` bytes with
 * the terminating 0. It may be NULL when `capacity` is 0.
 *
 * Thread:    the context's
 * May block: no
 * Returns:   a value of kvf_blocks_allowed.
 * Errors:    KVF_ERR_CONTEXT_FREED, KVF_ERR_BUSY (a blocking transfer is in flight)
 * Since:     0.1 */
KVF_API int32_t kvf_llama_blocks_allowed(kvf_llama llama, char *reason, uint64_t capacity);

/* Tells how many bytes a block of `tokens` tokens has. No byte is moved.
 *
 * That holds for tokens at positions of their own. Where positions repeat (the patches of an image
 * for a model with M-RoPE) or are missing, a block has as many tokens as there are cells at its
 * positions; kvf_llama_save_blocks() then says the size.
 *
 * Thread:    the context's
 * May block: no
 * Returns:   KVF_OK; `*bytes` is the size.
 * Errors:    KVF_ERR_SEQUENCE_EMPTY (no sequence of the context has had cells yet),
 *            KVF_ERR_UNSUPPORTED (the cache does not allow blocks), KVF_ERR_INVALID_ARGUMENT
 *            (`tokens` is 0), KVF_ERR_CONTEXT_FREED, KVF_ERR_BUSY (a blocking transfer is in
 *            flight)
 * Since:     0.1 */
KVF_API int32_t kvf_llama_block_size(kvf_llama llama, uint32_t tokens, uint64_t *bytes);

/* Saves blocks of a sequence, asynchronously: one job, with one completion, and on request one more
 * for each block.
 *
 * `blocks` is an array of `count` blocks in ascending order, each of `block_size` bytes, which is
 * sizeof(kvf_block). Blocks need not follow one another. The call writes the size of each block
 * into its `bytes` and copies the array, both before any completion can come: whoever gets a
 * completion may read the sizes, and with the job's completion free the array. The buffers must not
 * be touched until the job's completion, or until the block's own. The completion's `bytes` is the
 * sum of the sizes.
 *
 * With KVF_SUBMIT_EACH_BLOCK in `options->flags`, the queue and the callback get a completion for
 * each block, too: when all bytes of the block are in its buffer, which the library no longer uses
 * from then on. That completion's `kind` is KVF_COMPLETION_BLOCK, `block` is the index of the block
 * in the array, `status` is KVF_OK, `bytes` is the size of the block, and `finished_ns` is the time
 * when the block was whole; `fragments` and `segments` are 0. `job`, `user_data` and `mode` are as
 * in the job's completion. Blocks may become whole in any order; mostly it is that of the array.
 *
 * However the job ends, its own completion comes exactly once, after those of its blocks. A block
 * has one completion at most: none if the job failed or was cancelled before the block was told of.
 * If the job ends with KVF_OK, each block has one. The call takes the memory for all completions,
 * so that none can be lost. kvf_job_poll() and kvf_job_wait() tell of the job alone.
 *
 * `options->mode` has the values of kvf_llama_save(). AUTO is IN_PLACE, since decoding never
 * overwrites the bytes of blocks; in a cache with sliding windows it is SNAPSHOT, since libllama
 * does not tell when the beginning of a sequence has been removed. The table of what may be done
 * meanwhile holds as for a save of a state. Where the cache is unified and a sequence id of the
 * context is empty, the call borrows the id, so that libllama lists the cells of the blocks alone
 * and not the whole sequence. The id is empty again when the call returns, also when the call
 * fails.
 *
 * Thread:    the context's
 * May block: as kvf_llama_save()
 * Returns:   KVF_OK; the completion of the job follows, and before it those of blocks if they were
 *            asked for.
 * Errors:    KVF_ERR_UNSUPPORTED (the cache does not allow blocks), KVF_ERR_INVALID_ARGUMENT
 *            (blocks are empty, misordered or overlap; a buffer cannot be written; the options are
 *            those of a load; KVF_SUBMIT_EACH_BLOCK without a queue and without a callback),
 *            KVF_ERR_SEQUENCE_EMPTY (the sequence has no token at the positions of a block),
 *            KVF_ERR_BUFFER_TOO_SMALL (`bytes` of every block says what is needed), and those of
 *            kvf_llama_save()
 * Since:     0.1 */
KVF_API int32_t kvf_llama_save_blocks(kvf_llama llama, int32_t sequence, kvf_block *blocks,
                                      uint64_t block_size, uint32_t count,
                                      const kvf_submit_options *options, kvf_job *job);

/* Tells how many bytes a checkpoint of a sequence has now. No byte is moved.
 *
 * Thread:    the context's
 * May block: no
 * Returns:   KVF_OK; `*bytes` is the size.
 * Errors:    KVF_ERR_SEQUENCE_EMPTY (the sequence, or its window or its recurrent layers),
 *            KVF_ERR_UNSUPPORTED (the cache needs no checkpoints, or allows none),
 *            KVF_ERR_SEQUENCE_RANGE, KVF_ERR_CONTEXT_FREED, KVF_ERR_LLAMA, KVF_ERR_BUSY (a blocking
 *            transfer is in flight)
 * Since:     0.1 */
KVF_API int32_t kvf_llama_checkpoint_size(kvf_llama llama, int32_t sequence, uint64_t *bytes);

/* Saves a checkpoint of a sequence at its present position, asynchronously.
 *
 * The buffer needs kvf_llama_checkpoint_size() bytes. The completion's `bytes` is the size of the
 * checkpoint. AUTO is SNAPSHOT: decoding may go on when the call returns.
 *
 * Thread:    the context's
 * May block: as kvf_llama_save() by snapshot
 * Returns:   KVF_OK; one completion follows.
 * Errors:    KVF_ERR_UNSUPPORTED (the cache needs no checkpoints, or allows none),
 *            KVF_ERR_SEQUENCE_EMPTY as of kvf_llama_checkpoint_size(), and those of
 *            kvf_llama_save()
 * Since:     0.1 */
KVF_API int32_t kvf_llama_save_checkpoint(kvf_llama llama, int32_t sequence, void *buffer,
                                          uint64_t bytes, const kvf_submit_options *options,
                                          kvf_job *job);

/* Loads blocks into a sequence, asynchronously; they replace what the sequence held.
 *
 * The first block begins where the sequence shall begin, and each other block where the one before
 * it ends. Where the cache allows KVF_BLOCKS_WITH_CHECKPOINTS, `checkpoint` is the checkpoint at
 * the last position of the last block. Where checkpoints stand alone, `count` is 0. Elsewhere
 * `checkpoint` is NULL and `checkpoint_bytes` 0. Sequence ids in blocks and checkpoints need not be
 * `sequence`. The array is copied; the buffers must not change until the completion. The
 * completion's `bytes` is the sum of the sizes.
 *
 * kvferry checks everything before libllama is called: each block and the checkpoint as
 * kvf_llama_load() checks a state, that the blocks cover their positions, in order and without a
 * gap, and that the checkpoint belongs to their end. The tensor bytes are not checked. A load that
 * is refused leaves the sequence as it was. A load that fails later leaves it empty, as
 * kvf_llama_load() does.
 *
 * Thread:    the context's
 * May block: as kvf_llama_load()
 * Returns:   KVF_OK; one completion follows.
 * Errors:    KVF_ERR_UNSUPPORTED (the cache does not allow blocks), KVF_ERR_INVALID_ARGUMENT
 *            (blocks are empty or misordered, overlap, or leave a gap; a checkpoint is missing, or
 *            given where none belongs), KVF_ERR_STATE_DAMAGED (a block or the checkpoint is
 *            damaged, or holds other positions than it should), and those of kvf_llama_load()
 * Since:     0.1 */
KVF_API int32_t kvf_llama_load_blocks(kvf_llama llama, int32_t sequence, const kvf_block *blocks,
                                      uint64_t block_size, uint32_t count, const void *checkpoint,
                                      uint64_t checkpoint_bytes, const kvf_submit_options *options,
                                      kvf_job *job);

typedef struct kvf_state_options {
    /* sizeof(kvf_state_options); KVF_STATE_OPTIONS_INIT sets it. */
    uint32_t size;
    /* How many of the state's parts blocks hold; the rest is the checkpoint. kvf_llama_describe()
     * tells it as "parts_in_blocks". 0: the first part. */
    uint32_t parts_in_blocks;
    /* Where one line of text is written if the call fails; NULL: nowhere. */
    char *error;
    /* The bytes that `error` has room for, terminating 0 included. */
    uint64_t error_size;
} kvf_state_options;
#define KVF_STATE_OPTIONS_INIT {sizeof(kvf_state_options), 0, 0, 0}

/* Cuts a state into blocks and a checkpoint, on plain memory: no context, no engine.
 *
 * The state is what kvf_llama_save(), llama_state_seq_get_data() or another program has written.
 * Writes the size of each block into its `bytes`, and that of the checkpoint into
 * `*checkpoint_bytes`. Before the call, `*checkpoint_bytes` holds the room at `checkpoint`. A block
 * whose `buffer` is NULL is sized only, and so is the checkpoint if `checkpoint` is NULL. A state
 * of plain attention has no checkpoint: `*checkpoint_bytes` becomes 0. `checkpoint_bytes` may be
 * NULL if the checkpoint is not wanted.
 *
 * Thread:    any
 * May block: no (it copies)
 * Returns:   KVF_OK.
 * Errors:    KVF_ERR_STATE_DAMAGED, KVF_ERR_UNSUPPORTED (the state has no parts that keep every
 *            token, or several formats describe it), KVF_ERR_SEQUENCE_EMPTY (the state has no token
 *            at the positions of a block), KVF_ERR_BUFFER_TOO_SMALL (all sizes have been written;
 *            nothing else), KVF_ERR_INVALID_ARGUMENT (blocks are empty, misordered or overlap)
 * Since:     0.1 */
KVF_API int32_t kvf_state_cut(const void *state, uint64_t bytes, kvf_block *blocks,
                              uint64_t block_size, uint32_t count, void *checkpoint,
                              uint64_t *checkpoint_bytes, const kvf_state_options *options);

/* Joins blocks, and a checkpoint if there is one, to a state that llama.cpp itself loads.
 *
 * The opposite of kvf_state_cut(), for blocks as of kvf_llama_load_blocks(). `*state_bytes` holds
 * the room at `state`, and becomes the size of the state; if `state` is NULL, the state is sized
 * only.
 *
 * Thread:    any
 * May block: no (it copies)
 * Returns:   KVF_OK.
 * Errors:    KVF_ERR_STATE_DAMAGED, KVF_ERR_STATE_MISMATCH (the blocks are not of one kind of
 *            cache), KVF_ERR_UNSUPPORTED (several formats describe the blocks),
 *            KVF_ERR_BUFFER_TOO_SMALL (`*state_bytes` says what is needed),
 *            KVF_ERR_INVALID_ARGUMENT (there are no blocks, or they are misordered, overlap or
 *            leave a gap)
 * Since:     0.1 */
KVF_API int32_t kvf_state_join(const kvf_block *blocks, uint64_t block_size, uint32_t count,
                               const void *checkpoint, uint64_t checkpoint_bytes, void *state,
                               uint64_t *state_bytes, const kvf_state_options *options);

/* ------------------------------------------------------------------------------------------------
 * 3 Jobs and completions
 *
 * A submitting call (a save or a load of a state, of blocks, of a checkpoint or of regions) makes a
 * job, and the job ends with one completion. A program sees the completion in any of three ways: it
 * takes the completion from a queue, whose descriptor poll(2) can wait for; a callback gets the
 * completion; or the program keeps the job's handle, and polls or waits. When a program can see the
 * completion, the library no longer uses the buffer. On request a save of blocks has a completion
 * for each block, too: KVF_SUBMIT_EACH_BLOCK.
 * --------------------------------------------------------------------------------------------- */

/* Values of kvf_completion.kind. */
typedef enum kvf_completion_kind {
    /* The job has ended. Each job has exactly one completion of this kind, and it is the last. */
    KVF_COMPLETION_JOB = 0,
    /* A block is whole, and its job has not ended yet: see KVF_SUBMIT_EACH_BLOCK. */
    KVF_COMPLETION_BLOCK = 1,
} kvf_completion_kind;

typedef struct kvf_completion {
    /* The job's number. It is a handle only if the submitting call gave one, and until the handle
     * is released. */
    uint64_t job;
    /* The `user_data` of the submission. */
    uint64_t user_data;
    /* KVF_OK, KVF_ERR_CANCELLED, or what went wrong. */
    int32_t status;
    /* How a llama transfer was done: a value of kvf_save_mode or of kvf_load_mode. Else 0. */
    uint32_t mode;
    /* The size of the state, of the blocks or of the regions. If `status` is not KVF_OK, how many
     * of these bytes have been moved is undefined. */
    uint64_t bytes;
    /* How many separate runs of tensor memory the transfer consists of. */
    uint64_t fragments;
    /* How many runs and blocks remained when neighbours and rows at one pitch had been joined. */
    uint64_t segments;
    /* When the submitting call was entered. */
    uint64_t submitted_ns;
    /* When the first piece began to move; 0 if none did. */
    uint64_t started_ns;
    /* When the job ended, or when the block was whole. */
    uint64_t finished_ns;
    /* One line on what went wrong, or "". */
    char detail[128];
    /* Of a llama transfer: when libllama had taken cells and listed what to move. Else 0. */
    uint64_t listed_ns;
    /* Of a llama transfer: when libllama had named the last fragment. Else 0. */
    uint64_t recorded_ns;
    /* A value of kvf_completion_kind. */
    uint32_t kind;
    /* Of a block: its index in the array that was submitted. Of a job: 0. */
    uint32_t block;
} kvf_completion;

/* A function that gets a completion, on the engine's dispatch thread.
 *
 * The engine calls one callback at a time, in the order in which jobs end and blocks become whole:
 * return soon. A callback may call every function whose comment says `Thread: any`, without waiting
 * for a job or a completion in it. `completion` is valid until the callback returns. */
typedef void (*kvf_completion_callback)(const kvf_completion *completion);

/* Values of kvf_submit_options.priority. On each device urgent jobs go before background jobs.
 * Within a priority the job that was submitted first goes first: a small job behind a large one
 * waits. A job that still follows a stream, or is still being recorded, lets later jobs pass until
 * it can move. */
typedef enum kvf_priority {
    /* Paced, so that decoding at the same time hardly slows down. */
    KVF_PRIORITY_BACKGROUND = 0,
    /* As fast as the link. */
    KVF_PRIORITY_URGENT = 1,
} kvf_priority;

/* Bits of kvf_submit_options.flags. Few programs need them. */
typedef enum kvf_submit_flags {
    /* Begin when the CUDA stream `stream` has done what was queued on it before this call: see
     * section 7. */
    KVF_SUBMIT_FOLLOW_STREAM = 1,
    /* For kvf_llama_load() alone: hand libllama a state that cannot be checked, because the format
     * of the cache is not known and the state has no envelope (see kvf_llama_size()). libllama
     * trusts what it loads: a damaged state may end the process, or leave cells that only
     * llama_memory_clear() frees. */
    KVF_SUBMIT_TRUST_STATE = 2,
    /* For kvf_llama_save_blocks() alone: each block has a completion of its own, too, which comes
     * as soon as the whole block is in its buffer. */
    KVF_SUBMIT_EACH_BLOCK = 4,
} kvf_submit_flags;

/* How to do a job, and whom to tell. `queue` and `callback` may both be set; each then gets every
 * completion once. With no queue, no callback and no `job`, nobody learns how the job ended. */
struct kvf_submit_options {
    /* sizeof(kvf_submit_options); KVF_SUBMIT_OPTIONS_INIT sets it. */
    uint32_t size;
    /* A value of kvf_priority. */
    uint32_t priority;
    /* The queue that gets the completion; 0: none. */
    kvf_queue queue;
    /* The function that gets the completion; NULL: none. */
    kvf_completion_callback callback;
    /* The caller's own; the completion has it again. */
    uint64_t user_data;
    /* A value of kvf_save_mode for kvf_llama_save(), of kvf_load_mode for kvf_llama_load(). Regions
     * have no mode: 0. */
    uint32_t mode;
    /* Bits of kvf_submit_flags. */
    uint32_t flags;
    /* Where one line of text is written if the submitting call fails; NULL: nowhere. */
    char *error;
    /* The bytes that `error` has room for, terminating 0 included. */
    uint64_t error_size;
    /* A CUstream or cudaStream_t. Used only with KVF_SUBMIT_FOLLOW_STREAM. */
    uint64_t stream;
};
#define KVF_SUBMIT_OPTIONS_INIT {sizeof(kvf_submit_options), 0, 0, 0, 0, 0, 0, 0, 0, 0}

/* As a timeout: wait for as long as it takes. */
#define KVF_FOREVER INT64_C(-1)

/* Creates a queue for completions.
 *
 * A queue belongs to no engine: it may serve several engines, and outlive them.
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK; `*queue` is the handle.
 * Errors:    KVF_ERR_SYSTEM (the process has no file descriptor left)
 * Since:     0.1 */
KVF_API int32_t kvf_queue_create(kvf_queue *queue);

/* Tells the queue's file descriptor, for poll(2), epoll(7) or an event loop.
 *
 * The descriptor is readable while the queue holds completions (level-triggered), or a wake. Do not
 * read or close it: kvf_queue_take() reads it, kvf_queue_destroy() closes it.
 *
 * Thread:    any
 * May block: no
 * Returns:   the descriptor, 0 or more.
 * Errors:    none of its own
 * Since:     0.1 */
KVF_API int32_t kvf_queue_fd(kvf_queue queue);

/* Takes up to `capacity` completions out of the queue, oldest first.
 *
 * `completion_size` is sizeof(kvf_completion), and the distance from one completion to the next. A
 * `timeout_ns` of 0 does not wait; KVF_FOREVER waits until there is a completion. If several
 * threads take, each completion goes to one of them.
 *
 * Thread:    any
 * May block: for up to `timeout_ns`, while the queue is empty
 * Returns:   how many completions were taken; 0 after the timeout, a wake, or kvf_queue_destroy().
 * Errors:    none of its own
 * Since:     0.1 */
KVF_API int32_t kvf_queue_take(kvf_queue queue, kvf_completion *completions,
                               uint64_t completion_size, uint32_t capacity, int64_t timeout_ns);

/* Makes one kvf_queue_take() return 0: one that waits, or else the next one that finds the queue
 * empty.
 *
 * Wakes are counted: after n wakes, n calls return 0. A call that takes completions uses up no
 * wake.
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK.
 * Errors:    none of its own
 * Since:     0.1 */
KVF_API int32_t kvf_queue_wake(kvf_queue queue);

/* Destroys a queue with the completions that it holds, and closes its descriptor.
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK; the handle is gone. Calls of kvf_queue_take() that wait return 0.
 * Errors:    KVF_ERR_BUSY (jobs in flight would complete into it)
 * Since:     0.1 */
KVF_API int32_t kvf_queue_destroy(kvf_queue queue);

/* Tells whether a job has ended.
 *
 * `completion` is filled in if the job has ended. It may be NULL; `completion_size` is
 * sizeof(kvf_completion).
 *
 * Thread:    any
 * May block: no
 * Returns:   1 if the job has ended, 0 if not.
 * Errors:    none of its own
 * Since:     0.1 */
KVF_API int32_t kvf_job_poll(kvf_job job, kvf_completion *completion, uint64_t completion_size);

/* Waits until a job has ended, and fills in `completion`.
 *
 * `completion` may be NULL; `completion_size` is sizeof(kvf_completion).
 *
 * Thread:    any
 * May block: until the job has ended, for up to `timeout_ns` (KVF_FOREVER: no limit)
 * Returns:   KVF_OK if the job has ended, whatever its own status.
 * Errors:    KVF_ERR_TIMEOUT
 * Since:     0.1 */
KVF_API int32_t kvf_job_wait(kvf_job job, int64_t timeout_ns, kvf_completion *completion,
                             uint64_t completion_size);

/* Asks a job to end early.
 *
 * The job still ends with its one completion: KVF_ERR_CANCELLED, or its true outcome if it was
 * faster. What a cancelled save has left in the buffer is undefined. Cancelling twice or too late
 * is allowed.
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK.
 * Errors:    none of its own
 * Since:     0.1 */
KVF_API int32_t kvf_job_cancel(kvf_job job);

/* Releases a job's handle.
 *
 * The job goes on, and its completion follows. Release each handle that a submitting call has given
 * out once. A submitting call whose `job` is NULL makes no handle.
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK; the handle is gone.
 * Errors:    none of its own
 * Since:     0.1 */
KVF_API int32_t kvf_job_release(kvf_job job);

/* ------------------------------------------------------------------------------------------------
 * 4 Memory
 *
 * Any host memory serves as a buffer. A GPU copies at full speed to and from pinned memory alone.
 * Buffers of the pool are pinned; kvf_buffer_register() pins memory of the caller's.
 * --------------------------------------------------------------------------------------------- */

/* Takes a buffer of at least `bytes` from the engine's pool.
 *
 * The buffer is page-aligned, and pinned for every CUDA device of the engine. Its content is
 * undefined. The caller owns it until kvf_buffer_free(). Reusing a free buffer of the pool takes
 * microseconds; a new one takes the time to map and pin it. To make reuse likely, sizes are rounded
 * up, by at most a sixteenth and a page; and if the engine has no `pinned_limit`, a free buffer up
 * to a quarter larger may be given instead.
 *
 * Thread:    any
 * May block: for the time to map and pin memory: a third of a second a GiB
 * Returns:   KVF_OK; `*buffer` is the address.
 * Errors:    KVF_ERR_PINNED_LIMIT, KVF_ERR_OUT_OF_MEMORY, KVF_ERR_INVALID_ARGUMENT (`bytes` is 0)
 * Since:     0.1 */
KVF_API int32_t kvf_buffer_alloc(kvf_engine engine, uint64_t bytes, void **buffer);

/* Takes a buffer as kvf_buffer_alloc() does, and writes one line of text into `error` if that
 * fails.
 *
 * The text says how much is taken of how much, for instance. `error` has room for `error_size`
 * bytes, terminating 0 included; it may be NULL.
 *
 * Thread:    any
 * May block: as kvf_buffer_alloc()
 * Returns:   KVF_OK; `*buffer` is the address.
 * Errors:    as kvf_buffer_alloc()
 * Since:     0.1 */
KVF_API int32_t kvf_buffer_alloc_with_error(kvf_engine engine, uint64_t bytes, void **buffer,
                                            char *error, uint64_t error_size);

/* Tells how many bytes a buffer of a pool really has: what it takes of the engine's `pinned_limit`.
 *
 * All of these bytes may be used. The engine may have been destroyed.
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK; `*bytes` is the number.
 * Errors:    KVF_ERR_INVALID_ARGUMENT (the address is not that of an allocated buffer)
 * Since:     0.1 */
KVF_API int32_t kvf_buffer_capacity(const void *buffer, uint64_t *bytes);

/* Frees a buffer: returns it to its pool.
 *
 * NULL is allowed. The engine may have been destroyed.
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK; the buffer is no longer the caller's.
 * Errors:    KVF_ERR_BUSY (a job in flight uses it), KVF_ERR_INVALID_ARGUMENT (the address is not
 *            that of an allocated buffer; it may have been freed before)
 * Since:     0.1 */
KVF_API int32_t kvf_buffer_free(void *buffer);

/* Pins memory of the caller's for every CUDA device of the engine, so that jobs use it like a
 * buffer of the pool.
 *
 * The memory stays the caller's, and must stay mapped until kvf_buffer_unregister(). An engine
 * without a CUDA device registers the memory and pins nothing.
 *
 * Thread:    any
 * May block: for the time to pin: about 30 milliseconds a GiB of memory that is in use
 * Returns:   KVF_OK; the memory is registered.
 * Errors:    KVF_ERR_BUSY (it overlaps registered memory or a buffer of a pool), KVF_ERR_DEVICE,
 *            KVF_ERR_INVALID_ARGUMENT (`bytes` is 0, or the range is not mapped)
 * Since:     0.1 */
KVF_API int32_t kvf_buffer_register(kvf_engine engine, void *buffer, uint64_t bytes);

/* Undoes kvf_buffer_register().
 *
 * `buffer` is the address that was registered. `engine` may have been destroyed meanwhile.
 *
 * Thread:    any
 * May block: for the time to unpin: about 15 milliseconds a GiB
 * Returns:   KVF_OK; the memory may be unmapped.
 * Errors:    KVF_ERR_BUSY (a job in flight uses it), KVF_ERR_INVALID_ARGUMENT (nothing is
 *            registered at this address), KVF_ERR_DEVICE_LOST (a copy that may name the memory did
 *            not end: the memory stays registered, and should stay mapped)
 * Since:     0.1 */
KVF_API int32_t kvf_buffer_unregister(kvf_engine engine, void *buffer);

/* Frees all memory that the engine keeps for later.
 *
 * The engine keeps free buffers of its pool, and memory of its own that it does not use now. The
 * latter is, for each CUDA device: up to 62.5 MiB of pinned memory (62 for the copies of both
 * directions, 0.5 for snapshots); `staging_bytes` of device memory for each direction; and the
 * device memory of loads ahead, with 1.5 MiB of pinned memory for each. All devices together pin up
 * to 114 MiB and 5.5 MiB for each device, which bounds engines of more than two devices. Memory
 * that has been idle for half a minute is freed without this call.
 *
 * Thread:    any
 * May block: for the time to unpin: about 15 milliseconds a GiB
 * Returns:   KVF_OK.
 * Errors:    none of its own
 * Since:     0.1 */
KVF_API int32_t kvf_buffer_trim(kvf_engine engine);

/* ------------------------------------------------------------------------------------------------
 * 5 Version and status
 * --------------------------------------------------------------------------------------------- */

#define KVF_VERSION_MAJOR 0
#define KVF_VERSION_MINOR 1
#define KVF_VERSION_PATCH 0
/* The number of the ABI, and the last part of the SONAME. Programs are built for one number. */
#define KVF_ABI_VERSION 0

/* Tells the release of the library that was loaded.
 *
 * Thread:    any
 * May block: no
 * Returns:   a static text such as "0.1.0", never NULL.
 * Errors:    none of its own
 * Since:     0.1 */
KVF_API const char *kvf_version(void);

/* Tells the ABI of the library that was loaded.
 *
 * Thread:    any
 * May block: no
 * Returns:   the KVF_ABI_VERSION that the library was built with.
 * Errors:    none of its own
 * Since:     0.1 */
KVF_API uint32_t kvf_abi_version(void);

/* What a call returns, and what `status` of a completion says. The comments are the texts of
 * kvf_strerror(). Numbers are never reused. */
typedef enum kvf_status {
    KVF_OK = 0,                      /* success */
    KVF_ERR_INVALID_ARGUMENT = -1,   /* invalid argument */
    KVF_ERR_INVALID_HANDLE = -2,     /* unknown handle, or its object has been destroyed */
    KVF_ERR_STRUCT_SIZE = -3,        /* a struct has a wrong size, or unknown fields are set */
    KVF_ERR_OUT_OF_MEMORY = -4,      /* out of memory */
    KVF_ERR_PINNED_LIMIT = -5,       /* the engine's limit of pinned memory is reached */
    KVF_ERR_BUFFER_TOO_SMALL = -6,   /* the buffer is too small */
    KVF_ERR_BUSY = -7,               /* in use by a job in flight or by another object */
    KVF_ERR_CLOSED = -8,             /* the engine is closing */
    KVF_ERR_CANCELLED = -9,          /* the job was cancelled */
    KVF_ERR_TIMEOUT = -10,           /* timed out */
    KVF_ERR_FORKED = -11,            /* the handle was made before fork() in the parent process */
    KVF_ERR_UNSUPPORTED = -12,       /* not supported here */
    KVF_ERR_NO_DEVICE = -13,         /* no such device */
    KVF_ERR_DEVICE = -14,            /* the device reported an error */
    KVF_ERR_DEVICE_LOST = -15,       /* a device is lost: make a new engine */
    KVF_ERR_UNREACHABLE = -16,       /* memory that no device of the engine can reach */
    KVF_ERR_SYSTEM = -17,            /* the operating system refused */
    KVF_ERR_LIBRARY_NOT_FOUND = -18, /* no libllama is loaded in this process */
    KVF_ERR_LIBRARY_AMBIGUOUS = -19, /* several libllama are loaded: name one */
    KVF_ERR_TAP = -20,               /* libllama's calls cannot be recorded */
    KVF_ERR_CONTEXT_FREED = -21,     /* the llama_context has been freed */
    KVF_ERR_SEQUENCE_RANGE = -22,    /* sequence id out of the context's range */
    KVF_ERR_SEQUENCE_EMPTY = -23,    /* the sequence is empty */
    KVF_ERR_STATE_DAMAGED = -24,     /* the state is truncated or its structure is damaged */
    KVF_ERR_STATE_MISMATCH = -25,    /* the state is of another model or another kind of cache */
    KVF_ERR_CACHE_FULL = -26,        /* the cache has not enough free cells */
    KVF_ERR_LLAMA = -27,             /* libllama refused */
    KVF_ERR_INTERNAL = -28,          /* internal error */
} kvf_status;

/* Tells the name of a status, such as "KVF_ERR_BUSY".
 *
 * Thread:    any
 * May block: no
 * Returns:   a static text, never NULL; "KVF_?" for a number that is no status.
 * Errors:    none of its own
 * Since:     0.1 */
KVF_API const char *kvf_status_name(int32_t status);

/* Tells what a status means, in lower case and without a full stop.
 *
 * Thread:    any
 * May block: no
 * Returns:   a static text, never NULL.
 * Errors:    none of its own
 * Since:     0.1 */
KVF_API const char *kvf_strerror(int32_t status);

/* ------------------------------------------------------------------------------------------------
 * Advanced
 * ------------------------------------------------------------------------------------------------
 * 6 Regions: any memory of the engine's devices
 * --------------------------------------------------------------------------------------------- */

/* `rows` rows of `width` bytes, each `pitch` bytes behind the one before, in device or host memory;
 * and their place in the buffer. One run of bytes has one row; its pitches are not read. Any
 * alignment. */
typedef struct kvf_region {
    /* The address of the first row. */
    uint64_t address;
    /* The bytes of a row, at least 1. */
    uint64_t width;
    /* At least 1. */
    uint64_t rows;
    /* From row to row at `address`, at least `width`. */
    uint64_t pitch;
    /* Where the first row begins in the buffer. */
    uint64_t offset;
    /* From row to row in the buffer, at least `width`. */
    uint64_t buffer_pitch;
} kvf_region;

/* Tells how large a buffer the regions need: where the last of them ends in the buffer.
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK; `*bytes` is the size.
 * Errors:    KVF_ERR_INVALID_ARGUMENT (a region is malformed, or a sum overflows)
 * Since:     0.1 */
KVF_API int32_t kvf_regions_size(const kvf_region *regions, uint64_t count, uint64_t *bytes);

/* Saves regions into `buffer`, asynchronously.
 *
 * The call copies the list of regions. The memory that the regions name must stay valid, and the
 * buffer untouched, until the completion. Memory that changes meanwhile is saved partly as it was
 * before and partly as it is afterwards. A save of 0 regions completes at once. `options` and `job`
 * may be NULL. If `job` is given, release the handle with kvf_job_release().
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK; one completion follows.
 * Errors:    KVF_ERR_BUFFER_TOO_SMALL, KVF_ERR_UNREACHABLE (a region is in memory that no device of
 *            the engine reaches), KVF_ERR_INVALID_ARGUMENT (a region is malformed; the buffer
 *            cannot be written; `mode` is not 0), KVF_ERR_CLOSED, KVF_ERR_DEVICE_LOST (where the
 *            call does not notice yet that a device is lost, the completion says so), and those of
 *            section 7
 * Since:     0.1 */
KVF_API int32_t kvf_regions_save(kvf_engine engine, const kvf_region *regions, uint64_t count,
                                 void *buffer, uint64_t bytes, const kvf_submit_options *options,
                                 kvf_job *job);

/* Loads regions from `buffer`, asynchronously.
 *
 * The call copies the list of regions. The memory that the regions name must stay valid and
 * untouched, and the buffer unchanged, until the completion. Regions of one load must not overlap.
 * A load of 0 regions completes at once. `options` and `job` may be NULL. If `job` is given,
 * release the handle with kvf_job_release().
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK; one completion follows.
 * Errors:    as kvf_regions_save(); KVF_ERR_INVALID_ARGUMENT also if the memory of a region cannot
 *            be written
 * Since:     0.1 */
KVF_API int32_t kvf_regions_load(kvf_engine engine, const kvf_region *regions, uint64_t count,
                                 const void *buffer, uint64_t bytes,
                                 const kvf_submit_options *options, kvf_job *job);

/* ------------------------------------------------------------------------------------------------
 * 7 CUDA streams
 *
 * With KVF_SUBMIT_FOLLOW_STREAM a transfer begins when the stream has done the work that it holds
 * at the time of the submitting call. A snapshot is copied during its call, so that the call waits
 * for the stream. kvf_llama_load() reads the state's metadata during the call: if the buffer is
 * pinned memory, which the stream may still be writing, the call waits for the stream, too. A
 * stream may fill pageable memory by a host function; wait for such a stream before the call.
 * kvf_job_stream_wait() is for the other direction: a stream waits for a job.
 *
 * The default streams (0, CU_STREAM_LEGACY and CU_STREAM_PER_THREAD) exist once in every CUDA
 * context. A default stream stands for those of the calling thread's current context and of the
 * devices whose memory is moved. Where no device of the engine has its primary context current, it
 * stands for those of all devices of the engine.
 *
 * Submitting calls return KVF_ERR_UNSUPPORTED if the engine has no CUDA device, and
 * KVF_ERR_INVALID_ARGUMENT if no device of the engine knows the stream, or if the stream is being
 * captured into a CUDA graph. The capture goes on unharmed. A default stream is refused, too, while
 * a stream that it waits for is being captured.
 * --------------------------------------------------------------------------------------------- */

/* Makes a CUDA stream (a CUstream or cudaStream_t) wait for a job.
 *
 * Work that the stream is given from now on begins when the job has ended, in whatever way. A
 * default stream stands for several streams, as above; all of them wait.
 *
 * Thread:    any
 * May block: no
 * Returns:   KVF_OK.
 * Errors:    KVF_ERR_UNSUPPORTED (the engine has no CUDA device, or the driver is older than CUDA
 *            11.7), KVF_ERR_INVALID_ARGUMENT (no device of the engine knows the stream, or the
 *            stream is being captured into a CUDA graph), KVF_ERR_BUSY (1,024 waits are
 *            outstanding)
 * Since:     0.1 */
KVF_API int32_t kvf_job_stream_wait(kvf_job job, uint64_t stream);

/* ------------------------------------------------------------------------------------------------
 * 8 Trace: what moved when, for pictures and tuning
 * --------------------------------------------------------------------------------------------- */

/* Values of kvf_trace_event.direction. */
typedef enum kvf_direction {
    /* From the device to the buffer. */
    KVF_DIRECTION_SAVE = 0,
    /* From the buffer to the device. */
    KVF_DIRECTION_LOAD = 1,
} kvf_direction;

/* One piece that was moved. */
typedef struct kvf_trace_event {
    /* The job, as in its completion. */
    uint64_t job;
    /* The `user_data` of the submission. */
    uint64_t user_data;
    /* When the piece began to move. */
    uint64_t begin_ns;
    /* When the piece had been moved. */
    uint64_t end_ns;
    /* The size of the piece. */
    uint64_t bytes;
    /* The device, as an index into "devices" of kvf_engine_describe(). */
    uint32_t device;
    /* A value of kvf_direction. */
    uint32_t direction;
} kvf_trace_event;

/* Takes up to `capacity` recorded events, oldest first.
 *
 * The engine keeps the last 65,536 events. `event_size` is sizeof(kvf_trace_event).
 *
 * Thread:    any
 * May block: no
 * Returns:   how many events were taken, 0 or more.
 * Errors:    KVF_ERR_UNSUPPORTED (the engine was created without KVF_ENGINE_TRACE)
 * Since:     0.1 */
KVF_API int32_t kvf_engine_trace(kvf_engine engine, kvf_trace_event *events, uint64_t event_size,
                                 uint32_t capacity);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* KVFERRY_H */
