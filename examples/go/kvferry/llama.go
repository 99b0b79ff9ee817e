package kvferry

// #include <stdlib.h>
// #include "shim.h"
import "C"

import (
	"encoding/json"
	"sync"
	"unsafe"
)

// AttachOptions are the settings of an attachment. The zero value is the usual choice.
type AttachOptions struct {
	// Library is the path, or part of the path, of the libllama to use when the process has loaded several.
	Library string
	// AllowBlocking uses libllama's blocking calls, on a thread of the engine, where its calls cannot be recorded (a
	// statically linked llama.cpp). Nothing may use the context until such a transfer has ended, so Save and Load hold
	// its lock for that time.
	AllowBlocking bool
	// ForceBlocking uses the blocking calls even where recording would work: to compare, or to avoid a fault.
	ForceBlocking bool
}

// Llama is an attachment to a llama_context. Close it before the context is freed and before its engine is closed.
//
// All its methods may be called from any goroutine that does not hold the context's lock. An exception are Describe
// and Sequence, which do not take the lock.
type Llama struct {
	engine   *Engine
	handle   C.kvf_llama
	lock     sync.Locker
	blocking bool // libllama's blocking calls move the bytes
	inFlight gate

	fingerprint string

	mutex  sync.Mutex
	closed bool
}

// Attach attaches to a llama_context, given by its address. A llama.Context of yzma is such an address. The context
// stays the caller's, and must outlive the attachment. A context may have several attachments, of several engines too.
//
// # The lock
//
// llama.cpp lets one thread at a time use a context, and kvferry uses it too, while it records which memory a sequence
// occupies. So the program and this package share a lock. The program holds it around llama_decode and everything else
// that it does with the context. This package holds it while it measures, submits and settles: microseconds to a few
// ten milliseconds. It does not hold the lock while bytes move, with two exceptions:
//   - A Snapshot is copied aside under the lock; the constant Snapshot says how long that takes.
//   - The whole transfer is under the lock where libllama's blocking calls move the bytes (AllowBlocking), and for a
//     cache whose format kvferry does not know (Describe says "opaque").
//
// A sync.Mutex is the right kind. llama.cpp does not care which thread calls, only that no other thread does. And a
// mutex lets a transfer in after the decode that is under way, even when the decoding goroutine locks again at once: it
// is handed over to a goroutine that has waited for a millisecond. So the program needs neither a locked thread nor a
// goroutine that owns the context. A program that has either may pass any sync.Locker that asks it for permission.
//
// Errors: ErrInvalidArgument, ErrLibraryNotFound, ErrLibraryAmbiguous, ErrTap, ErrUnsupported, ErrDeviceLost, ErrClosed.
func (e *Engine) Attach(llamaContext uintptr, lock sync.Locker, options AttachOptions) (*Llama, error) {
	if lock == nil {
		return nil, &Error{Status: ErrInvalidArgument, Detail: "lock is nil"}
	}
	if err := e.addAttachment(); err != nil {
		return nil, err
	}
	var library *C.char
	if options.Library != "" {
		library = C.CString(options.Library)
		defer C.free(unsafe.Pointer(library))
	}
	var flags C.uint32_t
	if options.AllowBlocking {
		flags |= C.KVF_LLAMA_ALLOW_BLOCKING
	}
	if options.ForceBlocking {
		flags |= C.KVF_LLAMA_FORCE_BLOCKING
	}
	var text [256]C.char
	l := &Llama{engine: e, lock: lock, inFlight: newGate()}
	lock.Lock()
	status := C.kvgo_attach(C.uint64_t(e.handle), C.uintptr_t(llamaContext), flags, library,
		&text[0], C.uint64_t(len(text)), (*C.uint64_t)(&l.handle))
	lock.Unlock()
	if status != C.KVF_OK {
		e.removeAttachment()
		return nil, failure(status, text[:])
	}
	var found struct {
		Tap         bool
		Fingerprint string
	}
	description, err := l.Describe()
	if err == nil {
		err = json.Unmarshal(description, &found)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	l.blocking, l.fingerprint = !found.Tap, found.Fingerprint
	return l, nil
}

// addAttachment counts an attachment, which keeps the engine from being closed. Attach waits for the context's lock after
// that, and not with the engine's mutex held: others need the mutex, and may hold the context's lock.
func (e *Engine) addAttachment() error {
	e.mutex.Lock()
	defer e.mutex.Unlock()
	if e.closed {
		return &Error{Status: ErrClosed}
	}
	e.attached++
	return nil
}

func (e *Engine) removeAttachment() {
	e.mutex.Lock()
	defer e.mutex.Unlock()
	e.attached--
}

// Close refuses new transfers with ErrClosed, waits for those in flight, and detaches. With the last attachment,
// libllama is as it was. The caller must not hold the context's lock. A second Close returns nil.
func (l *Llama) Close() error {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	if l.closed {
		return nil
	}
	l.inFlight.close()
	l.closed = true
	l.lock.Lock()
	err := check(C.kvf_llama_detach(l.handle))
	l.lock.Unlock()
	l.engine.removeAttachment()
	return err
}

// Describe returns a description of the attachment as JSON: library and build, model, kind of cache, default save mode,
// a fingerprint of the model, counters of the recorded calls. It does not take the context's lock.
//
// Errors: ErrClosed.
func (l *Llama) Describe() (json.RawMessage, error) {
	if !l.inFlight.enter() {
		return nil, &Error{Status: ErrClosed}
	}
	defer l.inFlight.leave()
	return describe(func(text *C.char, capacity C.uint64_t, needed *C.uint64_t) C.int32_t {
		return C.kvf_llama_describe(l.handle, text, capacity, needed)
	})
}

// Fingerprint tells models apart: it is a hash of what libllama says of the context's model. Describe names what it
// covers.
func (l *Llama) Fingerprint() string { return l.fingerprint }

// PartsInBlocks returns how many parts of a state of this context blocks hold, for CutState and JoinBlocks.
//
// Errors: ErrClosed.
func (l *Llama) PartsInBlocks() (int, error) {
	description, err := l.Describe()
	if err != nil {
		return 0, err
	}
	var found struct {
		Parts int `json:"parts_in_blocks"`
	}
	err = json.Unmarshal(description, &found)
	return found.Parts, err
}

// locked calls a function of the library that needs the context's lock. It returns the function's status.
func (l *Llama) locked(call func() C.int32_t) C.int32_t {
	if !l.inFlight.enter() {
		return C.KVF_ERR_CLOSED
	}
	defer l.inFlight.leave()
	l.lock.Lock()
	defer l.lock.Unlock()
	return call()
}
