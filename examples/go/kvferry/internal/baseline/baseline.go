// Package baseline does in C what the benchmarks do in Go, so that the difference is the cost of the Go layer. It also
// has memory and clocks for benchmarks and tests that Go does not have.
package baseline

/*
#cgo pkg-config: ../../kvferry-go.pc
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <kvferry.h>
#include <malloc.h>
#include <stdlib.h>
#include <time.h>

static uint64_t now(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static uint64_t monotonic(void) { return now(CLOCK_MONOTONIC); }
static uint64_t cpu(void) { return now(CLOCK_PROCESS_CPUTIME_ID); }

static uint64_t heap_in_use(void) {
    struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
}

// Saves `bytes` bytes `count` times with at most `depth` jobs in flight, and takes the completions in batches.
static int32_t saves(uint64_t count, uint64_t depth, uint64_t bytes) {
    kvf_engine_options options = KVF_ENGINE_OPTIONS_INIT;
    options.devices = KVF_DEVICES_HOST;
    kvf_engine engine;
    kvf_queue queue;
    int32_t status = kvf_engine_create(&options, &engine);
    if (status) return status;
    status = kvf_queue_create(&queue);
    char *source = calloc(depth, bytes);
    void *pool = NULL;
    if (!status) status = kvf_buffer_alloc(engine, depth * bytes, &pool);
    kvf_completion *done = calloc(depth, sizeof *done);
    kvf_submit_options submit = KVF_SUBMIT_OPTIONS_INIT;
    submit.queue = queue;
    submit.priority = KVF_PRIORITY_URGENT;
    uint64_t submitted = 0, completed = 0;
    for (; submitted < depth && submitted < count && !status; ++submitted) {
        submit.user_data = submitted;
        const kvf_region region = {(uint64_t)(source + submitted * bytes), bytes, 1, 0, 0, 0};
        status = kvf_regions_save(engine, &region, 1, (char *)pool + submitted * bytes, bytes, &submit, NULL);
    }
    while (completed < submitted && !status) {
        const int32_t n = kvf_queue_take(queue, done, sizeof *done, (uint32_t)depth, KVF_FOREVER);
        for (int32_t i = 0; i < n && !status; ++i, ++completed) {
            if (done[i].status) status = done[i].status;
            if (submitted == count) continue;
            const uint64_t slot = submit.user_data = done[i].user_data;
            const kvf_region region = {(uint64_t)(source + slot * bytes), bytes, 1, 0, 0, 0};
            status = kvf_regions_save(engine, &region, 1, (char *)pool + slot * bytes, bytes, &submit, NULL);
            ++submitted;
        }
    }
    kvf_engine_destroy(engine);
    kvf_queue_destroy(queue);
    kvf_buffer_free(pool);
    free(source);
    free(done);
    return status;
}

// Allocates memory of the first CUDA device, through the driver in a file. Returns 0 if there is none.
static uint64_t device_alloc(const char *driver, uint64_t bytes) {
    void *library = dlopen(driver, RTLD_NOW);
    if (!library) return 0;
    int (*init)(unsigned) = (int (*)(unsigned))dlsym(library, "cuInit");
    int (*retain)(void **, int) = (int (*)(void **, int))dlsym(library, "cuDevicePrimaryCtxRetain");
    int (*adopt)(void *) = (int (*)(void *))dlsym(library, "cuCtxSetCurrent");
    int (*alloc)(uint64_t *, size_t) = (int (*)(uint64_t *, size_t))dlsym(library, "cuMemAlloc_v2");
    void *context;
    uint64_t address = 0;
    if (!init || !retain || !adopt || !alloc) return 0;
    if (init(0) || retain(&context, 0) || adopt(context) || alloc(&address, bytes)) return 0;
    adopt(NULL);
    return address;
}
*/
import "C"

import (
	"fmt"
	"time"
	"unsafe"
)

// Monotonic returns the time of the clock that completions use, CLOCK_MONOTONIC.
func Monotonic() time.Duration { return time.Duration(C.monotonic()) }

// CPU returns the processor time that the whole process has used, C's threads included.
func CPU() time.Duration { return time.Duration(C.cpu()) }

// HeapInUse returns the bytes that C's allocator has allocated.
func HeapInUse() int64 { return int64(C.heap_in_use()) }

// Alloc allocates memory in C, filled with zeros. Free frees it.
func Alloc(size int) []byte { return unsafe.Slice((*byte)(C.calloc(1, C.size_t(size))), size) }

// Free frees what Alloc has allocated.
func Free(memory []byte) { C.free(unsafe.Pointer(unsafe.SliceData(memory))) }

// DeviceAlloc allocates memory of the first device of a CUDA driver, which is named by its file. It returns 0 if there is
// none. The memory is never freed.
func DeviceAlloc(driver string, size int) uintptr {
	name := C.CString(driver)
	defer C.free(unsafe.Pointer(name))
	return uintptr(C.device_alloc(name, C.uint64_t(size)))
}

// Saves saves size bytes count times in C, with at most depth jobs in flight.
func Saves(count, depth, size int) error {
	if status := C.saves(C.uint64_t(count), C.uint64_t(depth), C.uint64_t(size)); status != 0 {
		return fmt.Errorf("%s", C.GoString(C.kvf_strerror(status)))
	}
	return nil
}
