package kvferry

// #include <stdlib.h>
// #include "shim.h"
import "C"

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"sync"
	"unsafe"
)

// Devices says which devices an engine uses.
type Devices uint32

const (
	AutoDevices Devices = C.KVF_DEVICES_AUTO // every CUDA device that the driver shows, or CUDADevices; and the host
	HostOnly    Devices = C.KVF_DEVICES_HOST // the CUDA driver is not touched
	RequireCUDA Devices = C.KVF_DEVICES_CUDA // as AutoDevices, but ErrNoDevice where no CUDA device can be used
)

// EngineOptions of the value zero are the usual ones.
type EngineOptions struct {
	Devices      Devices
	CopyThreads  int   // threads that copy host memory; 0: by the number of cores, 6 at most
	PinnedLimit  int64 // most bytes of the buffer pool, each buffer's Cap and free ones included; 0: no limit
	StagingBytes int64 // most device memory used per device and direction; 0: 32 MiB
	// The ordinals of the CUDA devices to use, as the driver counts them (CUDA_VISIBLE_DEVICES changes that); none: every
	// one. Others are not touched. ErrNoDevice where one of them cannot be used.
	CUDADevices []int
}

// Engine moves memory between devices and the host beside whatever else they do. All its methods may be called from
// any goroutine. It must be closed.
type Engine struct {
	handle      C.kvf_engine
	completions *completions
	inFlight    gate // transfers, and calls that need the engine to exist

	mutex    sync.Mutex
	attached int
	closed   bool
	ended    chan struct{} // closed when Close has done all
}

// NewEngine starts an engine. Where there is CUDA it takes a few hundred milliseconds: make one before serving.
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
	// In C's memory, because it holds a pointer.
	given := (*C.kvf_engine_options)(C.calloc(1, C.sizeof_kvf_engine_options+C.size_t(len(text))))
	defer C.free(unsafe.Pointer(given))
	given.size = C.sizeof_kvf_engine_options
	given.devices = C.uint32_t(options.Devices)
	given.copy_threads = C.uint32_t(min(options.CopyThreads, math.MaxInt32)) // C says what is too many
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

// Close waits for the transfers in flight, lets no new one begin (they get ErrClosed), and ends the engine's
// threads; call Cancel first where waiting takes too long. Closing twice is allowed. Buffers stay valid until they
// are closed themselves. Errors: ErrBusy while a Llama is attached; then nothing has changed.
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
	// Waited for in Go: the call into C then finds nothing to wait for, and holds up no thread.
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

// Cancel asks every transfer in flight to end early. Each ends with ErrCancelled or, if it was faster, with its true
// outcome.
func (e *Engine) Cancel() { C.kvf_engine_cancel(e.handle) }

// Trim returns the pool's free buffers to the system.
func (e *Engine) Trim() error {
	if !e.inFlight.enter() {
		return &Error{Status: ErrClosed}
	}
	defer e.inFlight.leave()
	return check(C.kvf_buffer_trim(e.handle))
}

// Describe says in JSON what the engine is: devices, why one is missing, memory in use, jobs in flight.
func (e *Engine) Describe() (json.RawMessage, error) {
	if !e.inFlight.enter() {
		return nil, &Error{Status: ErrClosed}
	}
	defer e.inFlight.leave()
	return describe(func(text *C.char, capacity C.uint64_t, needed *C.uint64_t) C.int32_t {
		return C.kvf_engine_describe(e.handle, text, capacity, needed)
	})
}

func describe(ask func(*C.char, C.uint64_t, *C.uint64_t) C.int32_t) (json.RawMessage, error) {
	for capacity := C.uint64_t(4096); ; {
		text := make([]byte, capacity)
		var needed C.uint64_t
		status := ask((*C.char)(unsafe.Pointer(&text[0])), capacity, &needed)
		if status != C.KVF_ERR_BUFFER_TOO_SMALL {
			if err := check(status); err != nil {
				return nil, err
			}
			return text[:needed-1], nil
		}
		capacity = needed + 256 // it may grow meanwhile
	}
}

// Region is Rows rows of Width bytes in the memory of a device or of the host, and their place in a buffer. With one
// row the pitches are not read.
type Region struct {
	// Of the first row. A pointer to Go memory keeps it reachable, and it is pinned during the transfer; At gives
	// an address that Go does not know, such as a GPU's.
	Address     unsafe.Pointer
	Width       uint64
	Rows        uint64
	Pitch       uint64 // bytes from row to row at Address
	Offset      uint64 // of the first row in the buffer
	BufferPitch uint64 // bytes from row to row in the buffer
}

// Regions are passed to C as they are.
var _ = [1]struct{}{}[unsafe.Sizeof(Region{})-unsafe.Sizeof(C.kvf_region{})]

// At is the Region.Address of memory that is not Go's.
func At(address uintptr) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&address)) }

// RegionsSize is the size of the buffer that regions need: the end of the one that reaches furthest. Moves nothing.
func RegionsSize(regions []Region) (int64, error) {
	var size C.uint64_t
	err := check(C.kvf_regions_size(regionsPointer(regions), C.uint64_t(len(regions)), &size))
	return int64(size), err
}

func regionsPointer(regions []Region) *C.kvf_region {
	return (*C.kvf_region)(unsafe.Pointer(unsafe.SliceData(regions)))
}

// SaveRegions copies regions into memory, and returns when that has been done, has failed, or has been cancelled
// through ctx. A transfer that ctx cancels is still waited for: when SaveRegions returns, nobody uses the memory any
// more. If the transfer was faster than the cancellation, it returns nil.
//
// Errors: ErrBufferTooSmall, ErrUnreachable, ErrInvalidArgument, ErrCancelled (which wraps the cause), ErrClosed.
func (e *Engine) SaveRegions(ctx context.Context, regions []Region, to Memory, options ...Option) (Completion, error) {
	memory, buffer, err := claim(to)
	if err != nil {
		return Completion{}, err
	}
	defer buffer.release()
	return e.transfer(ctx, request{operation: C.KVGO_SAVE_REGIONS, owner: e.handle, regions: regions, memory: memory,
		settings: read(options)})
}

// LoadRegions copies memory into regions, which must not overlap: the way back from SaveRegions. If it fails or is
// cancelled, part of the regions may have been written.
func (e *Engine) LoadRegions(ctx context.Context, regions []Region, from Memory, options ...Option) (Completion, error) {
	memory, buffer, err := claim(from)
	if err != nil {
		return Completion{}, err
	}
	defer buffer.release()
	return e.transfer(ctx, request{operation: C.KVGO_LOAD_REGIONS, owner: e.handle, regions: regions, memory: memory,
		settings: read(options)})
}
