/* libcuda_simulated.so: a CUDA driver for tests, which needs no GPU.
 *
 * It exports the entry points of cabi/cuda/driver_api.h. Point KVFERRY_CUDA_DRIVER at it, and
 * kvferry's whole CUDA path runs. Tests control it by the functions below: they ask for faults,
 * hold operations, lose devices, and read counters.
 *
 * What is simulated
 * -----------------
 * Streams       A stream executes its operations in order, on a thread of its own, concurrently
 * with other streams. The legacy stream (NULL) and blocking streams wait for one another. Device
 * memory A copy or a kernel reaches only what is allocated: any other access is
 *               CUDA_ERROR_ILLEGAL_ADDRESS. There are gaps between allocations (see guard_pages),
 *               and a copy from one allocation into another is refused. A program that touches
 *               device memory directly crashes at once, since its pages are PROT_NONE.
 * Host memory   Host memory is pinned if it was registered or allocated by the driver; otherwise it
 *               is pageable. A copy to pageable memory is synchronous, and so is one of more than
 *               64 KiB from it. Memory that is not mapped is CUDA_ERROR_ILLEGAL_ADDRESS, not a
 *               crash.
 * Errors        An error of execution is sticky: every later call on the context returns it, until
 *               the context's last reference is released.
 * Capture       A stream that is being captured into a graph executes nothing. A query of the
 *               stream or of an event in it breaks the capture, and so does work on the legacy
 *               stream beside it. (kvferry itself captures nothing.)
 * Kernels       kvferry_gather and kvferry_scatter, by their names in the PTX text.
 * Fork          In a child process every call returns CUDA_ERROR_NOT_INITIALIZED.
 * Time          Copies, kernels and allocations take the time that the settings ask for.
 *
 * What is not simulated
 * ---------------------
 * The speed of a device: no figure comes from here. Also: other kernels than these two, the content
 * and the launch of graphs, arrays, managed memory, access of one device to another one's memory,
 * virtual memory management (cuMemMap), and priorities of streams.
 *
 * The simulated driver is stricter than a real one: handles are never used twice, so a stale handle
 * is an error; and a copy, a launch or a record needs the stream's context to be current.
 *
 * Where to read on
 * ----------------
 * driver/state.h has the data, and each part is named after its subject:
 *     entry, settings, faults, counters           what tests control
 *     devices, contexts, streams, events, capture   entry points of these names
 *     operations                                  the threads that execute what streams queue
 *     allocations, view                           which memory there is, and its bytes
 *     memory, pointers, copies, kernels           entry points that use memory
 * tests/ has a program for each subject, which also runs on a real driver.
 *
 * Any thread may call any function here, at any time. All have C linkage and plain types, so that
 * Python's ctypes can call them. */
#ifndef KVFERRY_SIMULATED_CUDA_H
#define KVFERRY_SIMULATED_CUDA_H

#include <stdint.h>

#include "cuda/driver_api.h"

#define KVFSIM_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Capture, as in cuda.h ------------------------------------------------------------------- */

typedef struct CUgraph_st *CUgraph;

KVFSIM_API CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode);
KVFSIM_API CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph);

/* ---- Settings -----------------------------------------------------------------------------------
 * X(name, default, text). The environment has settings too: KVFSIM_DEVICES sets devices, and so on.
 * It is read at the first call and by kvfsim_reset(). */
#define KVFSIM_SETTINGS(X)                                                                         \
    X(devices, 1, "number of devices, at most 8; with 0, cuInit() returns CUDA_ERROR_NO_DEVICE")   \
    X(driver_version, 12090, "what cuDriverGetVersion() tells")                                    \
    X(init_ms, 0, "milliseconds that cuInit() takes")                                              \
    X(init_error, 0, "the error that cuInit() returns, as a number; 0: none")                      \
    X(device_bytes, 16ull << 30,                                                                   \
      "size of each device's memory, as it is when the device is first used; the host has memory " \
      "only for what is written")                                                                  \
    X(device_limit, UINT64_MAX, "bytes of a device that may be allocated at once")                 \
    X(guard_pages, 1,                                                                              \
      "pages of 4 KiB between allocations; 0: allocations may be neighbours, as on a real driver") \
    X(pinned_limit, UINT64_MAX, "bytes of host memory that may be pinned at once")                 \
    X(bytes_per_second, 0,                                                                         \
      "speed of each device in each direction between host and device; 0: as fast as it goes")     \
    X(memory_pools, 1, "whether devices have cuMemAllocAsync()")                                   \
    X(latency_us, 0, "microseconds that every copy and kernel takes at least")                     \
    X(allocation_us, 0,                                                                            \
      "microseconds that allocating or pinning memory takes, on the calling thread")

/* Returns 0, or -1 for an unknown name. */
KVFSIM_API int kvfsim_set(const char *setting, uint64_t value);

/* Reads the settings from the environment again; ends faults, holds, a simulated capture and losses
 * of devices; lets held operations go on; and sets counters to zero, except those of what is there
 * now. Objects stay. */
KVFSIM_API void kvfsim_reset(void);

/* ---- Faults -----------------------------------------------------------------------------------
 */

/* Makes something fail. `what` is an entry point ("cuMemAlloc" or "cuMemAlloc_v2"), which then
 * returns the error; or "copy" or "kernel", whose execution on its stream then fails, which is
 * sticky. `nth` counts from now: 1 is the next time. With `forever`, all later ones fail too.
 * Returns 0, or -1 for an unknown name.
 * Environment: KVFSIM_FAIL="cuMemAlloc:3:2,copy:5:700+". A rule is what:nth:error; + means forever.
 */
KVFSIM_API int kvfsim_fail(const char *what, uint64_t nth, int error, int forever);

/* Holds the nth "copy" or "kernel" from now: it does not end until it is released, or its context
 * is destroyed or lost. With `forever`, all later ones are held too. Returns 0, or -1 for an
 * unknown name. Environment: KVFSIM_HOLD="copy:5,kernel:1+". */
KVFSIM_API int kvfsim_hold(const char *what, uint64_t nth, int forever);
/* Lets all held operations go on, and forgets all holds. */
KVFSIM_API void kvfsim_release(void);
/* Waits until `count` operations are held. Returns 1, or 0 after the timeout. */
KVFSIM_API int kvfsim_wait_held(uint64_t count, uint32_t timeout_ms);

/* Loses a device: its context has this sticky error, and what is queued on the context ends. If
 * `permanent`, no new context can be made on the device, with the same error; otherwise the next
 * one works. Returns 0, or -1 if there is no such device. */
KVFSIM_API int kvfsim_lose_device(int device, int error, int permanent);

/* Between these calls it is as if another thread captured a CUDA graph in global mode. A call that
 * is unsafe then returns CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED on every thread that has not
 * exchanged its capture mode, and counts as a capture violation. */
KVFSIM_API void kvfsim_begin_capture(void);
KVFSIM_API void kvfsim_end_capture(void);

/* ---- Counters -------------------------------------------------------------------------------- */

/* X(name, text) */
#define KVFSIM_COUNTERS(X)                                                                         \
    X(live, "objects of all seven kinds below; 0 when nothing has leaked")                         \
    X(live_contexts, "references to primary contexts")                                             \
    X(live_streams, "")                                                                            \
    X(live_events, "")                                                                             \
    X(live_modules, "")                                                                            \
    X(live_device_allocations, "")                                                                 \
    X(live_host_allocations, "by cuMemHostAlloc()")                                                \
    X(live_registrations, "by cuMemHostRegister()")                                                \
    X(device_bytes, "allocated now, on all devices")                                               \
    X(peak_device_bytes, "")                                                                       \
    X(pinned_bytes, "of host memory, allocated or registered now")                                 \
    X(peak_pinned_bytes, "")                                                                       \
    X(abandoned, "objects that were destroyed with their context, not by their owner")             \
    X(hazards, "times that memory was freed or unregistered while a queued operation named it")    \
    X(capture_violations, "unsafe calls during a simulated capture")                               \
    X(sticky_errors, "contexts that got a sticky error")                                           \
    X(held, "operations held now")                                                                 \
    X(copies_save, "executed copies from a device to the host")                                    \
    X(copies_load, "executed copies from the host to a device")                                    \
    X(copies_device, "executed copies within and between devices")                                 \
    X(bytes_save, "")                                                                              \
    X(bytes_load, "")                                                                              \
    X(bytes_device, "")                                                                            \
    X(kernels, "executed kernels")                                                                 \
    X(kernel_rows, "")                                                                             \
    X(kernel_bytes, "")

/* Returns the counter's value, or UINT64_MAX for an unknown name. */
KVFSIM_API uint64_t kvfsim_count(const char *counter);
/* Returns how often an entry point was called since the last reset, or UINT64_MAX for an unknown
 * name. */
KVFSIM_API uint64_t kvfsim_calls(const char *entry_point);

enum { KVFSIM_SAVE = 0, KVFSIM_LOAD = 1, KVFSIM_DEVICE = 2 };
/* Returns how many copies of a device and direction were submitted and had not ended at one time,
 * at most; UINT64_MAX for an unknown device or direction. */
KVFSIM_API uint64_t kvfsim_peak_queued(int device, int direction);

/* ---- The content of device memory ---------------------------------------------------------------
 * For tests that fill device memory and look at it. These copies happen at once, in no stream, and
 * no counter counts them. Each returns 0, or -1 if the bytes are not all in one allocation. */
KVFSIM_API int kvfsim_write(uint64_t address, const void *from, uint64_t bytes);
KVFSIM_API int kvfsim_read(void *to, uint64_t address, uint64_t bytes);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* KVFERRY_SIMULATED_CUDA_H */
