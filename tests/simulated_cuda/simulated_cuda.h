/* libcuda_simulated.so: a CUDA driver that moves no electrons, for tests.
 *
 * It exports the entry points of cabi/cuda_driver_api.h. Point KVFERRY_CUDA_DRIVER at it, and
 * kvferry's whole CUDA path runs without a GPU. No figure comes from it.
 *
 * What it keeps
 * -------------
 * Streams       in order in themselves, concurrent with one another: a thread each. The legacy
 *               stream (0) waits for blocking streams and they for it.
 * Device memory its addresses are PROT_NONE: a program that touches them directly crashes at once.
 *               There is a gap between allocations (see guard_pages); access outside of one is
 *               CUDA_ERROR_ILLEGAL_ADDRESS. A copy from one into another is refused.
 * Host memory   registered or allocated is pinned; all other is pageable: copies to it, and from it
 *               beyond 64 KiB, are synchronous. Unmapped memory is CUDA_ERROR_ILLEGAL_ADDRESS, not
 *               a crash.
 * Errors        of execution are sticky: every later call on the context returns them, until its
 *               last reference is released.
 * Capture       a stream that is being captured (cuStreamBeginCapture_v2(), cuStreamEndCapture(),
 *               which kvferry itself does not use) executes nothing. A query of it, of an event in
 *               it, or work on the legacy stream beside it breaks the capture.
 * Kernels       kvferry_gather and kvferry_scatter, recognised by their names in the PTX text.
 * fork          in the child every call returns CUDA_ERROR_NOT_INITIALIZED.
 *
 * Handles are never used twice, so that a stale one is an error. Stricter than the driver: copies,
 * launches and records need the stream's context to be current.
 *
 * All functions here may be called from any thread, at any time. C linkage; plain types, for
 * ctypes. */
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

/* X(name, default, text). A setting is also read from the environment, at the first call and at
 * kvfsim_reset(): devices from KVFSIM_DEVICES, and so on. */
#define KVFSIM_SETTINGS(X)                                                                         \
    X(devices, 1, "how many there are, at most 8; with 0, cuInit() returns CUDA_ERROR_NO_DEVICE")  \
    X(driver_version, 12090, "of cuDriverGetVersion()")                                            \
    X(init_ms, 0, "that cuInit() takes")                                                           \
    X(init_error, 0, "what cuInit() returns, as a number")                                         \
    X(device_bytes, 16ull << 30,                                                                   \
      "memory of each device; virtual until written; read at its first use")                       \
    X(device_limit, UINT64_MAX, "bytes of a device that may be allocated at once")                 \
    X(guard_pages, 1,                                                                              \
      "of 4 KiB, behind each allocation; 0: neighbours, as a driver may place them")               \
    X(pinned_limit, UINT64_MAX, "bytes of host memory that may be pinned at once")                 \
    X(bytes_per_second, 0,                                                                         \
      "of each device in each direction between host and device; 0: as fast as it goes")           \
    X(memory_pools, 1, "whether devices can allocate in the order of streams")                     \
    X(latency_us, 0, "that every copy and kernel takes at least")                                  \
    X(allocation_us, 0, "that taking device or pinned memory takes, on the calling thread")

/* Returns 0, or -1 for an unknown name. */
KVFSIM_API int kvfsim_set(const char *setting, uint64_t value);

/* Settings from the environment again; faults, holds, a capture and losses end; counters start anew
 * (live objects stay). What was held goes on. */
KVFSIM_API void kvfsim_reset(void);

/* ---- Faults -------------------------------------------------------------------------------------
 * `what` is an entry point ("cuMemAlloc" or "cuMemAlloc_v2"), or "copy" or "kernel" for the
 * execution of one on its stream: that error is sticky. `nth` counts from now: 1 is the next. With
 * `forever`, all that follow fail too. Returns 0, or -1 for an unknown name.
 * Environment: KVFSIM_FAIL="cuMemAlloc:3:2,copy:5:700+": what:nth:error, + for forever. */
KVFSIM_API int kvfsim_fail(const char *what, uint64_t nth, int error, int forever);

/* The nth "copy" or "kernel" from now does not end, until it is released or its context is
 * destroyed or lost. Environment: KVFSIM_HOLD="copy:5,kernel:1+". */
KVFSIM_API int kvfsim_hold(const char *what, uint64_t nth, int forever);
/* Lets all that is held go on, and forgets the holds. */
KVFSIM_API void kvfsim_release(void);
/* Waits until `count` operations are held. Returns 1, or 0 after the timeout. */
KVFSIM_API int kvfsim_wait_held(uint64_t count, uint32_t timeout_ms);

/* The device is lost now: its context has this sticky error, what is queued on it ends. If
 * `permanent`, new contexts have it too; else the next one works. Returns 0, or -1 for no such
 * device. */
KVFSIM_API int kvfsim_lose_device(int device, int error, int permanent);

/* As if another thread captured a CUDA graph in global mode: calls that are unsafe then return
 * CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED on every thread that has not exchanged its capture mode,
 * and are counted as capture_violations. */
KVFSIM_API void kvfsim_begin_capture(void);
KVFSIM_API void kvfsim_end_capture(void);

/* ---- Counters -------------------------------------------------------------------------------- */

/* X(name, text) */
#define KVFSIM_COUNTERS(X)                                                                         \
    X(live, "objects of all kinds below: 0 when nothing has leaked")                               \
    X(live_contexts, "primary contexts retained, each as often as it is")                          \
    X(live_streams, "")                                                                            \
    X(live_events, "")                                                                             \
    X(live_modules, "")                                                                            \
    X(live_device_allocations, "")                                                                 \
    X(live_host_allocations, "")                                                                   \
    X(live_registrations, "")                                                                      \
    X(device_bytes, "allocated on all devices")                                                    \
    X(peak_device_bytes, "")                                                                       \
    X(pinned_bytes, "allocated and registered")                                                    \
    X(peak_pinned_bytes, "")                                                                       \
    X(abandoned, "objects destroyed with their context instead of by their owner")                 \
    X(hazards, "memory freed or unregistered while a queued operation names it")                   \
    X(capture_violations, "")                                                                      \
    X(sticky_errors, "contexts that broke")                                                        \
    X(held, "operations held now")                                                                 \
    X(copies_save, "executed, device to host")                                                     \
    X(copies_load, "host to device")                                                               \
    X(copies_device, "device to device")                                                           \
    X(bytes_save, "")                                                                              \
    X(bytes_load, "")                                                                              \
    X(bytes_device, "")                                                                            \
    X(kernels, "executed")                                                                         \
    X(kernel_rows, "")                                                                             \
    X(kernel_bytes, "")

/* UINT64_MAX for an unknown name. */
KVFSIM_API uint64_t kvfsim_count(const char *counter);
/* Calls of an entry point since the last reset. */
KVFSIM_API uint64_t kvfsim_calls(const char *entry_point);

enum { KVFSIM_SAVE = 0, KVFSIM_LOAD = 1, KVFSIM_DEVICE = 2 };
/* The most copies that were submitted and had not ended, at once, for a device and direction. */
KVFSIM_API uint64_t kvfsim_peak_queued(int device, int direction);

/* ---- Device memory, past all streams ------------------------------------------------------------
 * For a test to fill it and to look at it. Uncounted. Returns 0, or -1 outside of an allocation. */
KVFSIM_API int kvfsim_write(uint64_t address, const void *from, uint64_t bytes);
KVFSIM_API int kvfsim_read(void *to, uint64_t address, uint64_t bytes);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* KVFERRY_SIMULATED_CUDA_H */
