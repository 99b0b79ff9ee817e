package kvferry

// #include <kvferry.h>
import "C"

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"time"
	"unsafe"
)

// Memory is host memory that a transfer writes to or reads from: a *Buffer or a Slice of one, which a GPU copies to and
// from at full speed, or any memory of the caller's as Bytes.
//
// While a transfer is in flight its memory can be neither freed nor moved: a Buffer's Close is refused with ErrBusy,
// and Go memory is pinned and kept reachable. (Bytes that lie outside of Go's heap, such as those of an mmap, are the
// caller's to keep.)
type Memory interface{ isMemory() }

// Bytes is a []byte that serves as Memory.
type Bytes []byte

// Slice is a part of a Buffer, which Buffer.Slice makes.
type Slice struct {
	buffer    *Buffer
	low, high int
}

func (Bytes) isMemory()   {}
func (*Buffer) isMemory() {}
func (Slice) isMemory()   {}

// claim gives the bytes of memory, and the Buffer that they belong to, if any: it cannot be closed until it has been
// released.
func claim(memory Memory) ([]byte, *Buffer, error) {
	switch m := memory.(type) {
	case Bytes:
		return m, nil, nil
	case *Buffer:
		if m == nil {
			break
		}
		if !m.enter() {
			return nil, nil, errBufferClosed()
		}
		return m.bytes, m, nil
	case Slice:
		if m.buffer == nil {
			break
		}
		if !m.buffer.enter() {
			return nil, nil, errBufferClosed()
		}
		return m.buffer.bytes[m.low:m.high], m.buffer, nil
	}
	return nil, nil, &Error{Status: ErrInvalidArgument, Detail: "memory is nil"}
}

func errBufferClosed() error {
	return &Error{Status: ErrInvalidArgument, Detail: "the buffer has been closed"}
}

// enter lets a user in, unless the buffer is closed. A Close that is under way may yet be refused: that is waited for.
func (b *Buffer) enter() bool {
	if b.users.enter() {
		return true
	}
	b.mutex.Lock()
	defer b.mutex.Unlock()
	return b.users.enter()
}

func (b *Buffer) release() {
	if b != nil {
		b.users.leave()
	}
}

// Buffer is memory from an engine's pool: page-aligned, and pinned for every CUDA device of the engine.
//
// Close gives it back. A Buffer that becomes unreachable unclosed is given back by the garbage collector, unless
// Bytes was called: a slice does not keep its Buffer reachable, so from then on only Close does.
type Buffer struct {
	bytes []byte // its capacity is what the pool has given
	// Behind pointers: Go thinks that what is counted atomically and what is locked goes to the heap, and with them the
	// box around any Memory.
	users     *gate
	mutex     *sync.Mutex // held while Close finds out whether it is refused
	handedOut bool        // Bytes was called
}

// mapping is held around calls that map, pin or unmap memory. They take so long that Go would start a thread for every
// goroutine that is in one, and it keeps its threads; more than a few at a time gain nothing.
var mapping = make(limit, 8)

type limit chan struct{}

func (l limit) enter() { l <- struct{}{} }
func (l limit) leave() { <-l }

// NewBuffer takes a buffer of size bytes from the pool. Its content is undefined. One that is used again costs
// microseconds, a new one the time to map and pin it. It may outlive the engine.
//
// Where there is no memory, the garbage collector runs first: Buffers that were dropped unclosed make room.
//
// Errors: ErrOutOfMemory, ErrPinnedLimit, ErrClosed.
func (e *Engine) NewBuffer(size int) (*Buffer, error) {
	if !e.inFlight.enter() {
		return nil, &Error{Status: ErrClosed}
	}
	defer e.inFlight.leave()
	if size < 0 {
		return nil, &Error{Status: ErrInvalidArgument, Detail: "size is negative"}
	}
	start, err := e.allocate(size)
	if errors.Is(err, ErrOutOfMemory) || errors.Is(err, ErrPinnedLimit) {
		start, err = e.allocateAfterCollection(size)
	}
	if err != nil {
		return nil, err
	}
	var capacity C.uint64_t
	if err := check(C.kvf_buffer_capacity(start, &capacity)); err != nil {
		C.kvf_buffer_free(start)
		return nil, err
	}
	b := &Buffer{bytes: unsafe.Slice((*byte)(start), int(capacity))[:size], users: new(gate), mutex: new(sync.Mutex)}
	runtime.SetFinalizer(b, (*Buffer).Close)
	return b, nil
}

func (e *Engine) allocate(size int) (unsafe.Pointer, error) {
	mapping.enter()
	defer mapping.leave()
	var start unsafe.Pointer
	var text [256]C.char
	status := C.kvf_buffer_alloc_with_error(e.handle, C.uint64_t(size), &start, &text[0], C.uint64_t(len(text)))
	if status != C.KVF_OK {
		return nil, failure(status, text[:])
	}
	return start, nil
}

// collecting is held by the one that has the garbage collector run for memory.
var collecting sync.Mutex

func (e *Engine) allocateAfterCollection(size int) (unsafe.Pointer, error) {
	collecting.Lock()
	defer collecting.Unlock()
	// Whoever held the lock before may have made room for this one too.
	if start, err := e.allocate(size); err == nil {
		return start, nil
	}
	collect()
	return e.allocate(size)
}

// collect runs the garbage collector, and the finalizers of what it finds. One goroutine of Go's runs finalizers, all of
// one collection before those of the next, in no order that can be relied on: so two are needed to see the end of one.
// A finalizer of the program's that hangs holds up the others, and must not hold up the caller.
func collect() {
	late := time.NewTimer(time.Second)
	defer late.Stop()
	for range 2 {
		ran := make(chan struct{})
		// Of a size that Go does not pack together with other objects, which might live on.
		runtime.SetFinalizer(new([32]byte), func(*[32]byte) { close(ran) })
		runtime.GC()
		select {
		case <-ran:
		case <-late.C:
			return
		}
	}
}

// Len is the buffer's size in bytes, as it was asked for.
func (b *Buffer) Len() int { return len(b.bytes) }

// Cap is what the buffer takes of the pool, and of EngineOptions.PinnedLimit: a little more than Len, for sizes are
// rounded up. Who keeps to a budget counts this.
func (b *Buffer) Cap() int { return cap(b.bytes) }

// Slice is the buffer's part from byte low up to byte high, as buffer.Bytes()[low:high] is, but the transfer that it is
// given to holds the Buffer: for a state that is smaller than its buffer, or several in one. As in Go, high may go up to
// Cap. Panics where it may not be sliced so.
func (b *Buffer) Slice(low, high int) Slice {
	_ = b.bytes[low:high]
	return Slice{b, low, high}
}

// Len is how many bytes it has.
func (s Slice) Len() int { return s.high - s.low }

// Bytes gives the buffer's memory, or nil if the buffer is closed. The []byte must not be used after Close.
func (b *Buffer) Bytes() []byte {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	if b.users.closed() {
		return nil
	}
	if !b.handedOut {
		b.handedOut = true
		runtime.SetFinalizer(b, nil)
	}
	return b.bytes
}

// Close gives the memory back to the pool. Closing twice is allowed. Errors: ErrBusy while a transfer uses it; then
// nothing has changed.
func (b *Buffer) Close() error {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	if !b.users.tryClose() {
		if b.users.closed() {
			return nil
		}
		return &Error{Status: ErrBusy, Detail: "a transfer in flight uses the buffer"}
	}
	mapping.enter()
	err := check(C.kvf_buffer_free(unsafe.Pointer(unsafe.SliceData(b.bytes))))
	mapping.leave()
	if err != nil { // a transfer that was given the memory as Bytes uses it
		b.users.reopen()
		return err
	}
	runtime.SetFinalizer(b, nil)
	return nil
}

// Registration is memory of the caller's that stays pinned, for Go's collector and for every CUDA device, until
// Close.
//
// It must be closed. Whoever drops it may still rely on its pin, so the collector cannot end it behind the program's back:
// a Registration that becomes unreachable unclosed is a panic, which says where Register was called.
type Registration struct {
	engine *Engine
	memory []byte
	pinner runtime.Pinner
	mutex  sync.Mutex
	made   []uintptr // who called Register: program counters
	lost   bool      // it is among the lost ones
}

// lost keeps the memory pinned that a device which was given up may still write to.
var lost struct {
	sync.Mutex
	registrations []*Registration
}

// Register pins memory that many transfers will use, so that they run as from a Buffer. It costs about 30 ms per
// GiB, so it does not pay for a single transfer. Errors: ErrBusy where it overlaps memory that is registered.
func (e *Engine) Register(memory []byte) (*Registration, error) {
	if !e.inFlight.enter() {
		return nil, &Error{Status: ErrClosed}
	}
	defer e.inFlight.leave()
	r := &Registration{engine: e, memory: memory}
	start := unsafe.Pointer(unsafe.SliceData(memory))
	r.pinner.Pin(start)
	mapping.enter()
	defer mapping.leave()
	if err := check(C.kvf_buffer_register(e.handle, start, C.uint64_t(len(memory)))); err != nil {
		r.pinner.Unpin()
		return nil, err
	}
	var callers [16]uintptr
	r.made = append(r.made, callers[:runtime.Callers(2, callers[:])]...) // without runtime.Callers and this function
	runtime.SetFinalizer(r, (*Registration).forgotten)
	return r, nil
}

// forgotten panics before runtime.Pinner does, which would not say whose pin it is.
func (r *Registration) forgotten() {
	var text strings.Builder
	text.WriteString("kvferry: a Registration was dropped without Close; Register was called by")
	for frames, more := runtime.CallersFrames(r.made), true; more; {
		var frame runtime.Frame
		frame, more = frames.Next()
		fmt.Fprintf(&text, "\n%s\n\t%s:%d", frame.Function, frame.File, frame.Line)
	}
	panic(text.String())
}

// Close unpins the memory. Closing twice is allowed, and closing after the engine too. Errors: ErrBusy while a transfer
// uses the memory; then nothing has changed. ErrDeviceLost where a copy did not end that may still write to the memory: it
// stays pinned for the rest of the program, and the Registration may be dropped.
func (r *Registration) Close() error {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if r.memory == nil {
		return nil
	}
	start := unsafe.Pointer(unsafe.SliceData(r.memory))
	mapping.enter()
	defer mapping.leave()
	status := C.kvf_buffer_unregister(r.engine.handle, start)
	if status == C.KVF_ERR_DEVICE_LOST && !r.lost {
		r.lost = true
		runtime.SetFinalizer(r, nil)
		lost.Lock()
		lost.registrations = append(lost.registrations, r)
		lost.Unlock()
	}
	if err := check(status); err != nil {
		return err
	}
	r.pinner.Unpin()
	r.memory = nil
	runtime.SetFinalizer(r, nil)
	return nil
}
