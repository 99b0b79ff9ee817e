package kvferry

// #include "shim.h"
import "C"

import "context"

// Sequence is one sequence of an attached context. It is a small value, and costs nothing to make.
//
// Its methods may be called from any goroutine that does not hold the context's lock; they take the lock themselves,
// and wait for it.
type Sequence struct {
	llama *Llama
	id    int32
}

// Sequence returns the sequence with a number, llama.cpp's llama_seq_id. The number is checked when it is used.
func (l *Llama) Sequence(id int32) Sequence { return Sequence{l, id} }

// ID returns the sequence's number, llama.cpp's llama_seq_id.
func (s Sequence) ID() int32 { return s.id }

// Size returns the size of the sequence's state in bytes. It moves none of them. The state of an empty sequence has a
// few bytes too.
//
// Errors: ErrSequenceRange, ErrContextFreed, ErrClosed.
func (s Sequence) Size() (int, error) {
	l := s.llama
	var size C.uint64_t
	err := check(l.locked(func() C.int32_t { return C.kvf_llama_size(l.handle, C.int32_t(s.id), &size) }))
	return int(size), err
}

// Save writes the sequence's state into memory of at least Size bytes: the bytes that llama_state_seq_get_data would
// write. For a cache whose format kvferry does not know (Llama.Describe says "opaque"), 64 bytes of its own follow.
//
// Save blocks the calling goroutine until the transfer has ended: done, failed, or cancelled through ctx. It waits for
// the end of a cancelled transfer too: when Save returns, the library no longer uses the memory. If the transfer was
// faster than the cancellation, Save returns nil. While Save waits for the context's lock it does not notice the end of
// ctx; if ctx has ended by then, nothing is saved.
//
// Save holds the context's lock while it records the memory of the sequence and, in the mode Snapshot, while the
// sequence is copied aside. After that, other sequences may be decoded. What the program may do with this sequence
// until Save returns depends on the SaveMode.
//
// Errors: ErrSequenceRange, ErrSequenceEmpty, ErrBufferTooSmall, ErrInvalidArgument, ErrBusy (a load into this sequence
// is in flight), ErrCancelled (which wraps the cause), ErrClosed, ErrContextFreed, ErrDeviceLost, ErrLlama, ErrTap.
func (s Sequence) Save(ctx context.Context, to Memory, options ...Option) (Completion, error) {
	if !s.llama.inFlight.enter() {
		return Completion{}, &Error{Status: ErrClosed}
	}
	defer s.llama.inFlight.leave()
	return s.transfer(ctx, C.KVGO_SAVE_SEQUENCE, to, settingsOf(options))
}

// Load replaces what the sequence holds by a saved state. The memory must be exactly the state: Buffer.Slice gives the
// part of a larger Buffer. Load blocks, and can be cancelled, as Save does. Until it returns, the sequence must not be
// used; other sequences may be decoded.
//
// kvferry checks the state before libllama sees it. These errors leave the sequence as it was: ErrStateDamaged
// (truncated, damaged, or without its checksum where it needs one), ErrStateMismatch (of another model or kind of
// cache), ErrSequenceRange, ErrInvalidArgument, ErrBusy (a transfer of this sequence is in flight), ErrClosed,
// ErrContextFreed, and ErrCancelled where ctx ended before Load had the context's lock; a Completion of the value zero
// tells that nothing was submitted.
//
// After any other error the sequence is empty: ErrCancelled in flight, ErrCacheFull, ErrLlama, ErrTap, ErrDeviceLost.
// (A state that has more cells than a sequence may ever have is refused with ErrCacheFull before, and then the sequence
// is as it was.)
func (s Sequence) Load(ctx context.Context, from Memory, options ...Option) (Completion, error) {
	if !s.llama.inFlight.enter() {
		return Completion{}, &Error{Status: ErrClosed}
	}
	defer s.llama.inFlight.leave()
	memory, buffer, err := claim(from)
	if err != nil {
		return Completion{}, err
	}
	defer buffer.release()
	return s.load(ctx, C.KVGO_LOAD_SEQUENCE, nil, memory, settingsOf(options))
}

// Remove empties the sequence, as llama_memory_seq_rm does, but is refused while a transfer of it is in flight.
//
// Errors: ErrBusy (a transfer of this sequence is in flight), ErrSequenceRange, ErrContextFreed, ErrClosed.
func (s Sequence) Remove() error {
	l := s.llama
	return check(l.locked(func() C.int32_t { return C.kvf_llama_remove(l.handle, C.int32_t(s.id)) }))
}

func (s Sequence) transfer(ctx context.Context, operation C.uint32_t, m Memory, set settings) (Completion, error) {
	memory, buffer, err := claim(m)
	if err != nil {
		return Completion{}, err
	}
	defer buffer.release()
	return s.submit(ctx, operation, nil, memory, set)
}

// load makes a transfer that replaces what the sequence holds.
func (s Sequence) load(ctx context.Context, operation C.uint32_t, blocks []Block, memory []byte, set settings) (completion Completion, err error) {
	returned := false // stays false where the function of a StreamWait panics
	defer func() {
		// A load that was submitted and failed has left cells without their bytes: remove them.
		if !returned || err != nil && completion.Submitted != 0 {
			s.llama.lock.Lock()
			defer s.llama.lock.Unlock()
			C.kvf_llama_settle(s.llama.handle)
		}
	}()
	completion, err = s.submit(ctx, operation, blocks, memory, set)
	returned = true
	return completion, err
}

func (s Sequence) submit(ctx context.Context, operation C.uint32_t, blocks []Block, memory []byte, set settings) (Completion, error) {
	return s.llama.engine.transfer(ctx, request{operation: operation, owner: s.llama.handle, lock: s.llama.lock,
		blocking: s.llama.blocking, sequence: s.id, blocks: blocks, memory: memory, fingerprint: s.llama.fingerprint,
		settings: set})
}
