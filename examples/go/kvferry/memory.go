package kvferry

// #include <kvferry.h>
import "C"

import (
	"runtime"
	"sync"
	"unsafe"
)

// Memory is host memory that a transfer writes to or reads from: a *Buffer, which a GPU copies to and from at full
// speed, or any memory of the caller's as Bytes.
//
// While a transfer is in flight its memory can be neither freed nor moved: a Buffer's Close is refused with ErrBusy,
// and Go memory is pinned and kept reachable. (Bytes that lie outside of Go's heap, such as those of an mmap, are the
// caller's to keep.)
type Memory interface{ isMemory() }

// Bytes is a []byte that serves as Memory.
type Bytes []byte

func (Bytes) isMemory()   {}
func (*Buffer) isMemory() {}

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
		if !m.users.enter() {
			return nil, nil, &Error{Status: ErrInvalidArgument, Detail: "the buffer has been closed"}
		}
		return m.bytes, m, nil
	}
	return nil, nil, &Error{Status: ErrInvalidArgument, Detail: "memory is nil"}
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
	bytes []byte
	users *gate // behind a pointer: Go 1.22 thinks that what is counted atomically goes to the heap
	once  sync.Once
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
// Errors: ErrOutOfMemory, ErrPinnedLimit, ErrClosed.
func (e *Engine) NewBuffer(size int) (*Buffer, error) {
	if !e.inFlight.enter() {
		return nil, &Error{Status: ErrClosed}
	}
	defer e.inFlight.leave()
	if size < 0 {
		return nil, &Error{Status: ErrInvalidArgument, Detail: "size is negative"}
	}
	var start unsafe.Pointer
	var text [256]C.char
	mapping.enter()
	status := C.kvf_buffer_alloc_with_error(e.handle, C.uint64_t(size), &start, &text[0], C.uint64_t(len(text)))
	mapping.leave()
	if status != C.KVF_OK {
		return nil, failure(status, text[:])
	}
	b := &Buffer{bytes: unsafe.Slice((*byte)(start), size), users: new(gate)}
	runtime.SetFinalizer(b, (*Buffer).Close)
	return b, nil
}

// Len is the buffer's size in bytes.
func (b *Buffer) Len() int { return len(b.bytes) }

// Bytes gives the buffer's memory. The slice must not be used after Close.
func (b *Buffer) Bytes() []byte {
	b.once.Do(func() { runtime.SetFinalizer(b, nil) })
	if b.users.closed() {
		return nil
	}
	return b.bytes
}

// Close gives the memory back to the pool. Closing twice is allowed. Errors: ErrBusy while a transfer uses it.
func (b *Buffer) Close() error {
	if !b.users.tryClose() {
		if b.users.closed() {
			return nil
		}
		return &Error{Status: ErrBusy, Detail: "a transfer in flight uses the buffer"}
	}
	b.once.Do(func() { runtime.SetFinalizer(b, nil) })
	mapping.enter()
	defer mapping.leave()
	return check(C.kvf_buffer_free(unsafe.Pointer(unsafe.SliceData(b.bytes))))
}

// Registration is memory of the caller's that stays pinned, for Go's collector and for every CUDA device, until
// Close.
type Registration struct {
	engine *Engine
	memory []byte
	pinner runtime.Pinner
	mutex  sync.Mutex
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
	return r, nil
}

// Close unpins the memory. Closing twice is allowed; close it before the engine. Errors: ErrBusy while a transfer
// uses it.
func (r *Registration) Close() error {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if r.memory == nil {
		return nil
	}
	start := unsafe.Pointer(unsafe.SliceData(r.memory))
	mapping.enter()
	defer mapping.leave()
	if err := check(C.kvf_buffer_unregister(r.engine.handle, start)); err != nil {
		return err
	}
	r.pinner.Unpin()
	r.memory = nil
	return nil
}
