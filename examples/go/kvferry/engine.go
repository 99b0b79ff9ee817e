package kvferry

// #include <stdlib.h>
// #include "shim.h"
import "C"

import (
	"encoding/json"
	"fmt"
	"math"
	"sync"
	"unsafe"
)

// Devices says which devices an engine uses.
type Devices uint32

const (
	// AutoDevices are the host and every CUDA device that the driver shows, or those of EngineOptions.CUDADevices.
	AutoDevices Devices = C.KVF_DEVICES_AUTO
	// HostOnly is the host alone. The CUDA driver is not touched.
	HostOnly Devices = C.KVF_DEVICES_HOST
	// RequireCUDA is AutoDevices, but NewEngine returns ErrNoDevice where no CUDA device can be used.
	RequireCUDA Devices = C.KVF_DEVICES_CUDA
)

// EngineOptions are the settings of an engine. The zero value is the usual choice.
type EngineOptions struct {
	// Devices that the engine uses.
	Devices Devices
	// CopyThreads is the number of threads that copy host memory. 0: by the number of cores, at most 6.
	CopyThreads int
	// PinnedLimit is the most bytes that the buffer pool takes. Each buffer counts with its Cap, a free buffer that the
	// pool keeps too. 0: no limit.
	PinnedLimit int64
	// StagingBytes is the most device memory that the engine uses for each device and direction. 0: 32 MiB.
	StagingBytes int64
	// CUDADevices are the ordinals, from 0 to 63, of the CUDA devices to use, as the driver counts them
	// (CUDA_VISIBLE_DEVICES changes that). Other CUDA devices are not touched. Empty: every one.
	// NewEngine returns ErrNoDevice where one of them cannot be used.
	CUDADevices []int
}

// Engine moves memory between devices and the host while they do other work.
//
// All its methods may be called from any goroutine. Whoever makes an Engine closes it.
type Engine struct {
	handle      C.kvf_engine
	completions *completions
	inFlight    gate // transfers, and calls during which the engine must exist

	mutex    sync.Mutex
	attached int
	closed   bool
	ended    chan struct{} // closed when Close has done all its work
}

// NewEngine starts an engine. Where there is a CUDA device this takes a few hundred milliseconds, so make the engine
// before your program begins to serve.
//
// Errors: ErrInvalidArgument, ErrNoDevice, ErrOutOfMemory, ErrSystem.
func NewEngine(options EngineOptions) (*Engine, error) {
	if options.CopyThreads < 0 || options.PinnedLimit < 0 || options.StagingBytes < 0 {
		return nil, &Error{Status: ErrInvalidArgument, Detail: "a number in the options is negative"}
	}
	var ordinals uint64
	for _, ordinal := range options.CUDADevices {
		if ordinal < 0 || ordinal > 63 {
			return nil, &Error{Status: ErrInvalidArgument, Detail: fmt.Sprintf("CUDA device %d; they go from 0 to 63", ordinal)}
		}
		ordinals |= 1 << ordinal
	}
	var text [256]C.char
	// The struct holds a pointer, so it lies in memory of C's, with the text behind it.
	given := (*C.kvf_engine_options)(C.calloc(1, C.sizeof_kvf_engine_options+C.size_t(len(text))))
	defer C.free(unsafe.Pointer(given))
	given.size = C.sizeof_kvf_engine_options
	given.devices = C.uint32_t(options.Devices)
	given.copy_threads = C.uint32_t(min(options.CopyThreads, math.MaxInt32)) // the library refuses what is too many
	given.pinned_limit = C.uint64_t(options.PinnedLimit)
	given.staging_bytes = C.uint64_t(options.StagingBytes)
	given.cuda_devices = C.uint64_t(ordinals)
	given.error = (*C.char)(unsafe.Add(unsafe.Pointer(given), C.sizeof_kvf_engine_options))
	given.error_size = C.uint64_t(len(text))

	completions, err := newCompletions()
	if err != nil {
		return nil, err
	}
	e := &Engine{completions: completions, inFlight: newGate(), ended: make(chan struct{})}
	if status := C.kvf_engine_create(given, &e.handle); status != C.KVF_OK {
		completions.close()
		copy(text[:], unsafe.Slice(given.error, len(text)))
		return nil, failure(status, text[:])
	}
	return e, nil
}

// Close refuses new transfers with ErrClosed, waits for those in flight, and ends the engine's threads. Call Cancel
// first where that would take too long. A second Close waits for the first one and returns nil. Buffers stay valid
// until they are closed themselves.
//
// Errors: ErrBusy while a Llama is attached; then nothing has changed.
func (e *Engine) Close() error {
	first, err := e.beginClosing()
	if err != nil {
		return err
	}
	if !first {
		<-e.ended
		return nil
	}
	defer close(e.ended)
	// Go waits for the transfers, so kvf_engine_destroy finds none and does not hold up a thread.
	e.inFlight.close()
	err = check(C.kvf_engine_destroy(e.handle))
	if other := e.completions.close(); err == nil {
		err = other
	}
	return err
}

func (e *Engine) beginClosing() (first bool, err error) {
	e.mutex.Lock()
	defer e.mutex.Unlock()
	if e.attached > 0 {
		return false, &Error{Status: ErrBusy, Detail: "a llama context is attached"}
	}
	first = !e.closed
	e.closed = true
	return first, nil
}

// Cancel asks every transfer in flight to end early, and returns at once. Each transfer ends with ErrCancelled or, if
// it was faster, with its true outcome.
func (e *Engine) Cancel() { C.kvf_engine_cancel(e.handle) }

// Trim returns the pool's free buffers to the system, and memory of the engine's own that is idle at the moment.
//
// Errors: ErrClosed.
func (e *Engine) Trim() error {
	if !e.inFlight.enter() {
		return &Error{Status: ErrClosed}
	}
	defer e.inFlight.leave()
	return check(C.kvf_buffer_trim(e.handle))
}

// Describe returns a description of the engine as JSON: its devices, why a device is missing, memory in use, the number
// of jobs in flight.
//
// Errors: ErrClosed.
func (e *Engine) Describe() (json.RawMessage, error) {
	if !e.inFlight.enter() {
		return nil, &Error{Status: ErrClosed}
	}
	defer e.inFlight.leave()
	return describe(func(text *C.char, capacity C.uint64_t, needed *C.uint64_t) C.int32_t {
		return C.kvf_engine_describe(e.handle, text, capacity, needed)
	})
}

// describe calls a function of the library that writes JSON, with more and more room until the text fits.
func describe(write func(*C.char, C.uint64_t, *C.uint64_t) C.int32_t) (json.RawMessage, error) {
	for capacity := C.uint64_t(4096); ; {
		text := make([]byte, capacity)
		var needed C.uint64_t
		status := write((*C.char)(unsafe.Pointer(&text[0])), capacity, &needed)
		if status != C.KVF_ERR_BUFFER_TOO_SMALL {
			if err := check(status); err != nil {
				return nil, err
			}
			return text[:needed-1], nil
		}
		capacity = needed + 256 // the next text may be longer
	}
}
