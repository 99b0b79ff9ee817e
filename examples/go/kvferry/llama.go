package kvferry

// #include <stdlib.h>
// #include "shim.h"
import "C"

import (
	"context"
	"encoding/json"
	"sync"
	"unsafe"
)

// AttachOptions of the value zero are the usual ones.
type AttachOptions struct {
	// The path, or part of it, of the libllama to use when the process has loaded several.
	Library string
	// Where libllama's calls cannot be recorded, use its blocking calls on a thread of the engine's. The context must
	// then rest until a transfer has ended: Save and Load hold its lock so long.
	AllowBlocking bool
	// Use them even where recording would work: to compare, or to get round a fault.
	ForceBlocking bool
}

// Llama is an attachment to a llama.cpp context. It must be closed before the context is freed and before its engine
// is closed.
type Llama struct {
	engine   *Engine
	handle   C.kvf_llama
	lock     sync.Locker
	blocking bool // libllama's blocking calls are used, on a thread of the engine's
	inFlight gate

	mutex  sync.Mutex
	closed bool
}

// Attach attaches to a llama_context, given by its address; yzma's llama.Context is one.
//
// A llama_context bears one caller at a time, and recording the layout of a sequence is such a call. So the program
// shares a lock: it holds it around llama_decode and everything else that it does with the context, and this package
// holds it while it sizes, submits and settles, which takes microseconds to a few milliseconds. It does not hold it while
// bytes move, with two exceptions: a Snapshot is copied aside under it (SaveMode says how long that takes); and all is done
// under it where libllama's own calls move the bytes, which is so for a cache whose format is not known (Describe says
// "opaque") and with AllowBlocking. Calls that need no context, such as Describe and those of the Engine,
// never wait for the lock.
//
// A sync.Mutex is the right kind: which thread calls does not matter to llama.cpp, only that nobody else does,
// and a mutex lets a transfer in after the decode that is under way even when the decoding goroutine asks for it
// again at once (it is handed over to whoever has waited for a millisecond). So neither a locked thread nor an owner
// goroutine is needed, and a program that has either may hand in any sync.Locker that gets its consent.
//
// Errors: ErrLibraryNotFound, ErrLibraryAmbiguous, ErrTap, ErrUnsupported.
func (e *Engine) Attach(llamaContext uintptr, lock sync.Locker, options AttachOptions) (*Llama, error) {
	if lock == nil {
		return nil, &Error{Status: ErrInvalidArgument, Detail: "lock is nil"}
	}
	if err := e.countAttachment(); err != nil {
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
		e.discountAttachment()
		return nil, failure(status, text[:])
	}
	var found struct{ Tap bool }
	description, err := l.Describe()
	if err == nil {
		err = json.Unmarshal(description, &found)
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	l.blocking = !found.Tap
	return l, nil
}

// countAttachment keeps the engine from being closed, also while Attach waits for the context's lock: not under the
// engine's own, for others need that and may hold the context's.
func (e *Engine) countAttachment() error {
	e.mutex.Lock()
	defer e.mutex.Unlock()
	if e.closed {
		return &Error{Status: ErrClosed}
	}
	e.attached++
	return nil
}

func (e *Engine) discountAttachment() {
	e.mutex.Lock()
	defer e.mutex.Unlock()
	e.attached--
}

// Close waits for the attachment's transfers, lets no new one begin, and detaches; with the last attachment libllama
// is as it was. Don't hold the lock. Closing twice is allowed.
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
	l.engine.discountAttachment()
	return err
}

// Describe says in JSON what the attachment found: library and build, model, kind of cache, default save mode,
// counters of the tap.
func (l *Llama) Describe() (json.RawMessage, error) {
	if !l.inFlight.enter() {
		return nil, &Error{Status: ErrClosed}
	}
	defer l.inFlight.leave()
	return describe(func(text *C.char, capacity C.uint64_t, needed *C.uint64_t) C.int32_t {
		return C.kvf_llama_describe(l.handle, text, capacity, needed)
	})
}

// Sequence names a sequence of the context. It costs nothing to make.
func (l *Llama) Sequence(id int32) Sequence { return Sequence{l, id} }

// Sequence is one sequence of an attached context.
type Sequence struct {
	llama *Llama
	id    int32
}

// ID is the sequence's number, llama.cpp's llama_seq_id.
func (s Sequence) ID() int32 { return s.id }

// Size is the size of the sequence's state in bytes, found without moving any of it. An empty sequence has a state
// too, of a few bytes. Errors: ErrSequenceRange, ErrContextFreed.
func (s Sequence) Size() (int, error) {
	if !s.llama.inFlight.enter() {
		return 0, &Error{Status: ErrClosed}
	}
	defer s.llama.inFlight.leave()
	var size C.uint64_t
	s.llama.lock.Lock()
	status := C.kvf_llama_size(s.llama.handle, C.int32_t(s.id), &size)
	s.llama.lock.Unlock()
	return int(size), check(status)
}

// Save writes the sequence's state, bit for bit what llama_state_seq_get_data would write, into memory of at least
// Size bytes, and returns when that has been done, has failed, or has been cancelled through ctx. A transfer that ctx
// cancels is still waited for: when Save returns, nobody uses the memory any more. If the transfer was faster than the
// cancellation, Save returns nil. While Save waits for the context's lock it does not notice the end of ctx; then nothing
// is saved.
//
// The context's lock is held while the layout is recorded and, in the mode Snapshot, while the sequence is copied aside. Then
// other sequences decode until Save returns. What this sequence may do until Save returns depends on the SaveMode.
//
// Errors: ErrSequenceRange, ErrSequenceEmpty, ErrBufferTooSmall, ErrBusy (a load into this sequence is in flight),
// ErrCancelled (which wraps the cause), ErrClosed, ErrContextFreed, ErrLlama.
func (s Sequence) Save(ctx context.Context, to Memory, options ...Option) (Completion, error) {
	if !s.llama.inFlight.enter() {
		return Completion{}, &Error{Status: ErrClosed}
	}
	defer s.llama.inFlight.leave()
	return s.transfer(ctx, C.KVGO_SAVE_SEQUENCE, to, read(options))
}

// Load replaces what the sequence holds by a saved state, of exactly the memory's size, and returns when that has been
// done, has failed, or has been cancelled through ctx, as Save does. The sequence must not be used until it returns;
// others decode meanwhile.
//
// The state is checked before libllama sees it. Where it is refused the sequence is as it was: ErrStateDamaged (truncated,
// damaged, or without what vouches for it), ErrStateMismatch (of another model or kind of cache), ErrSequenceRange, ErrBusy
// (a transfer of this sequence is in flight), ErrClosed, ErrContextFreed, and ErrCancelled where ctx ended before the call
// had the context's lock. After other errors it is empty: ErrCancelled later on, ErrCacheFull (unless the state has more
// cells than a sequence may have at all), ErrLlama, ErrDeviceLost.
func (s Sequence) Load(ctx context.Context, from Memory, options ...Option) (completion Completion, err error) {
	if !s.llama.inFlight.enter() {
		return Completion{}, &Error{Status: ErrClosed}
	}
	defer s.llama.inFlight.leave()
	returned := false // else the function of a StreamWait has panicked
	defer func() {
		// A load that had begun and failed left half a state: remove that.
		if !returned || err != nil && completion.Submitted != 0 {
			s.llama.lock.Lock()
			defer s.llama.lock.Unlock()
			C.kvf_llama_settle(s.llama.handle)
		}
	}()
	completion, err = s.transfer(ctx, C.KVGO_LOAD_SEQUENCE, from, read(options))
	returned = true
	return completion, err
}

// Remove empties the sequence, as llama_memory_seq_rm does, but not under a transfer. Errors: ErrBusy (a transfer of
// this sequence is in flight), ErrSequenceRange, ErrContextFreed, ErrClosed.
func (s Sequence) Remove() error {
	if !s.llama.inFlight.enter() {
		return &Error{Status: ErrClosed}
	}
	defer s.llama.inFlight.leave()
	s.llama.lock.Lock()
	defer s.llama.lock.Unlock()
	return check(C.kvf_llama_remove(s.llama.handle, C.int32_t(s.id)))
}

func (s Sequence) transfer(ctx context.Context, operation C.uint32_t, m Memory, set settings) (Completion, error) {
	memory, buffer, err := claim(m)
	if err != nil {
		return Completion{}, err
	}
	defer buffer.release()
	return s.llama.engine.transfer(ctx, request{operation: operation, owner: s.llama.handle, lock: s.llama.lock,
		blocking: s.llama.blocking, sequence: s.id, memory: memory, settings: set})
}
