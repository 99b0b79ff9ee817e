package kvferry

// #include <kvferry.h>
import "C"

import (
	"errors"
	"runtime"
	"sync"
	"time"
	"unsafe"
)

// Buffer is memory from an engine's pool: page-aligned, and pinned for every CUDA device of the engine.
//
// Close returns it to the pool. The garbage collector closes a Buffer that becomes unreachable unclosed, unless Bytes
// was called: a []byte does not keep its Buffer reachable, so after Bytes the program must call Close.
//
// Its methods may be called from any goroutine.
type Buffer struct {
	bytes []byte // its capacity is what the pool has given
	// These two lie behind pointers because the compiler moves a struct with an atomic or a mutex in it to the heap, and
	// with it the interface value of every Memory.
	users     *gate
	mutex     *sync.Mutex // held while Close finds out whether it is refused
	handedOut bool        // Bytes was called
}

// NewBuffer takes a buffer of size bytes from the pool. Its content is undefined. A free buffer of the pool is used
// again within microseconds; a new one takes the time to map and pin it, about a third of a second a GiB. The Buffer
// belongs to the caller until Close, and may outlive the engine.
//
// Where there is no memory, NewBuffer runs the garbage collector and tries once more, so Buffers that were dropped
// unclosed make room.
//
// Errors: ErrInvalidArgument (size is not positive), ErrOutOfMemory, ErrPinnedLimit, ErrClosed.
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
	mapping.acquire()
	defer mapping.release()
	var start unsafe.Pointer
	var text [256]C.char
	status := C.kvf_buffer_alloc_with_error(e.handle, C.uint64_t(size), &start, &text[0], C.uint64_t(len(text)))
	if status != C.KVF_OK {
		return nil, failure(status, text[:])
	}
	return start, nil
}

// collecting is held by the goroutine that runs the garbage collector to make room.
var collecting sync.Mutex

func (e *Engine) allocateAfterCollection(size int) (unsafe.Pointer, error) {
	collecting.Lock()
	defer collecting.Unlock()
	// The goroutine that held the lock before may have made room for this buffer too.
	if start, err := e.allocate(size); err == nil {
		return start, nil
	}
	collect()
	return e.allocate(size)
}

// collect runs the garbage collector, and waits for the finalizers of what it finds.
//
// Go runs all finalizers on one goroutine: those of one collection before those of the next, and within a collection in
// no order that can be relied on. So it takes a finalizer of a second collection to know that those of the first have
// run. A finalizer of the program that hangs holds up the others, and must not hold up the caller: hence the timer.
func collect() {
	late := time.NewTimer(time.Second)
	defer late.Stop()
	for range 2 {
		ran := make(chan struct{})
		// Of a size that Go does not pack into one block with other objects, which might live on.
		runtime.SetFinalizer(new([32]byte), func(*[32]byte) { close(ran) })
		runtime.GC()
		select {
		case <-ran:
		case <-late.C:
			return
		}
	}
}

// Len returns the buffer's size in bytes, as NewBuffer was asked for.
func (b *Buffer) Len() int { return len(b.bytes) }

// Cap returns what the buffer takes of the pool and of EngineOptions.PinnedLimit, in bytes: a little more than Len,
// because sizes are rounded up. A program with a budget counts Cap.
func (b *Buffer) Cap() int { return cap(b.bytes) }

// Slice returns the buffer's part from byte low up to byte high, as buffer.Bytes()[low:high] does. A transfer that is
// given the Slice holds the Buffer. This serves a state that is smaller than its buffer, or several states in one
// buffer. As in Go, high may go up to Cap. Slice panics where the bounds are out of range.
func (b *Buffer) Slice(low, high int) Slice {
	_ = b.bytes[low:high]
	return Slice{b, low, high}
}

// Bytes returns the buffer's memory, or nil if the buffer is closed. The []byte must not be used after Close.
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

// Close returns the memory to the pool. A second Close returns nil. It may be called after the engine's Close.
//
// Errors: ErrBusy while a transfer uses the buffer; then nothing has changed.
func (b *Buffer) Close() error {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	if !b.users.tryClose() {
		if b.users.closed() {
			return nil
		}
		return &Error{Status: ErrBusy, Detail: "a transfer in flight uses the buffer"}
	}
	mapping.acquire()
	err := check(C.kvf_buffer_free(unsafe.Pointer(unsafe.SliceData(b.bytes))))
	mapping.release()
	if err != nil { // a transfer uses the memory that was given to it as Bytes
		b.users.reopen()
		return err
	}
	runtime.SetFinalizer(b, nil)
	return nil
}

// enter counts one more user, and returns false if the buffer is closed. A Close that is under way may still be
// refused, so enter waits for its outcome.
func (b *Buffer) enter() bool {
	if b.users.enter() {
		return true
	}
	b.mutex.Lock()
	defer b.mutex.Unlock()
	return b.users.enter()
}

// release counts one user less. The Buffer may be nil.
func (b *Buffer) release() {
	if b != nil {
		b.users.leave()
	}
}
