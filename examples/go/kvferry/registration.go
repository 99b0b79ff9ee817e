package kvferry

// #include <kvferry.h>
import "C"

import (
	"fmt"
	"runtime"
	"strings"
	"sync"
	"unsafe"
)

// Registration is memory of the caller's that stays pinned, for Go's garbage collector and for every CUDA device of the
// engine, until Close.
//
// It must be closed. A program that has dropped it may still rely on the pin, so the garbage collector cannot end the
// pin: a Registration that becomes unreachable unclosed is a panic, which says where Register was called.
type Registration struct {
	engine *Engine
	memory []byte
	pinner runtime.Pinner
	mutex  sync.Mutex
	made   []uintptr // program counters of Register's callers
	lost   bool      // it is in lostRegistrations
}

// lostRegistrations keeps memory pinned to which a lost device may still write.
var lostRegistrations struct {
	sync.Mutex
	list []*Registration
}

// Register pins memory that many transfers will use, so that they are as fast as with a Buffer. It takes about 30 ms a
// GiB, so it does not pay for a single transfer. Without a CUDA device nothing is pinned for a device.
//
// Errors: ErrBusy where the memory overlaps registered memory, ErrInvalidArgument, ErrDevice, ErrClosed.
func (e *Engine) Register(memory []byte) (*Registration, error) {
	if !e.inFlight.enter() {
		return nil, &Error{Status: ErrClosed}
	}
	defer e.inFlight.leave()
	r := &Registration{engine: e, memory: memory}
	start := unsafe.Pointer(unsafe.SliceData(memory))
	r.pinner.Pin(start)
	mapping.acquire()
	defer mapping.release()
	if err := check(C.kvf_buffer_register(e.handle, start, C.uint64_t(len(memory)))); err != nil {
		r.pinner.Unpin()
		return nil, err
	}
	var callers [16]uintptr
	r.made = append(r.made, callers[:runtime.Callers(2, callers[:])]...) // without runtime.Callers and Register
	runtime.SetFinalizer(r, (*Registration).panicUnclosed)
	return r, nil
}

// panicUnclosed comes before the panic of runtime.Pinner, which would not say who has pinned the memory.
func (r *Registration) panicUnclosed() {
	var text strings.Builder
	text.WriteString("kvferry: a Registration was dropped without Close; Register was called by")
	for frames, more := runtime.CallersFrames(r.made), true; more; {
		var frame runtime.Frame
		frame, more = frames.Next()
		fmt.Fprintf(&text, "\n%s\n\t%s:%d", frame.Function, frame.File, frame.Line)
	}
	panic(text.String())
}

// Close unpins the memory. A second Close returns nil. It may be called after the engine's Close.
//
// Errors: ErrBusy while a transfer uses the memory; then nothing has changed. ErrDeviceLost where a copy has not ended
// that may still write to the memory: the memory stays pinned for the rest of the program, and the Registration may be
// dropped.
func (r *Registration) Close() error {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if r.memory == nil {
		return nil
	}
	start := unsafe.Pointer(unsafe.SliceData(r.memory))
	mapping.acquire()
	defer mapping.release()
	status := C.kvf_buffer_unregister(r.engine.handle, start)
	if status == C.KVF_ERR_DEVICE_LOST && !r.lost {
		r.lost = true
		runtime.SetFinalizer(r, nil)
		lostRegistrations.Lock()
		lostRegistrations.list = append(lostRegistrations.list, r)
		lostRegistrations.Unlock()
	}
	if err := check(status); err != nil {
		return err
	}
	r.pinner.Unpin()
	r.memory = nil
	runtime.SetFinalizer(r, nil)
	return nil
}
