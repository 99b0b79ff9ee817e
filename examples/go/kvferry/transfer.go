package kvferry

// #include "shim.h"
import "C"

import (
	"context"
	"sync"
	"time"
	"unsafe"
)

// Completion is how a transfer went.
type Completion struct {
	Bytes     int64    // size of the state, or of the regions
	Mode      SaveMode // of a sequence's save: as it was done
	Ahead     bool     // of a sequence's load: it was done as Ahead says
	Fragments int64    // separate pieces of tensor memory that it consists of
	Segments  int64    // what remained of them after joining runs and rows into blocks

	// When it was submitted, when its first byte began to move (0 if none did), and when it ended: readings of
	// CLOCK_MONOTONIC. Only differences mean anything.
	Submitted, Started, Finished time.Duration
	// Of a sequence's transfer, else 0: when libllama had taken cells and listed what to move, and when it had named
	// the last fragment.
	Listed, Recorded time.Duration
}

// Took is the time from the submission to the end.
func (c Completion) Took() time.Duration { return c.Finished - c.Submitted }

// Priority says how a transfer shares the link with whatever else the device does. Within a priority the oldest transfer
// goes first.
type Priority uint32

const (
	Background Priority = C.KVF_PRIORITY_BACKGROUND // paced: decoding beside it hardly notices
	Urgent     Priority = C.KVF_PRIORITY_URGENT     // as fast as the link, and before background transfers
)

// SaveMode says what the sequence may do while it is being saved.
type SaveMode uint32

const (
	// Snapshot where the next decode of the sequence would overwrite what is being saved, else InPlace.
	Auto SaveMode = C.KVF_SAVE_AUTO
	// No memory beside the buffer. A plain attention cache may be appended to meanwhile; the sequence must not be
	// removed, shifted or copied onto, and a recurrent or sliding-window sequence must not be decoded.
	InPlace SaveMode = C.KVF_SAVE_IN_PLACE
	// The sequence is copied aside first, with the context's lock held, for the next decode may overwrite it; then
	// anything may be done to it. On a GPU that takes about a millisecond a gigabyte. In host memory the copy goes to
	// the buffer and is the whole save; so it is on a GPU whose memory is too short for a copy.
	Snapshot SaveMode = C.KVF_SAVE_SNAPSHOT
)

// Option changes how one transfer is made. Without any it is a background transfer in Auto mode.
type Option struct {
	kind  optionKind
	value uint64
	then  func()
}

type optionKind uint8

const (
	optionPriority optionKind = iota
	optionMode
	optionAhead
	optionStream
	optionStreamWait
	optionTrustState
)

// WithPriority sets the transfer's priority.
func WithPriority(p Priority) Option { return Option{kind: optionPriority, value: uint64(p)} }

// WithMode sets the mode of a sequence's save; other transfers ignore it.
func WithMode(m SaveMode) Option { return Option{kind: optionMode, value: uint64(m)} }

// Ahead makes a sequence's load bring the bytes to device memory of their own at once, while libllama still takes cells
// and lists fragments, and from there to their places: sooner done, for as much device memory as the state has bytes,
// which is kept for the next such load for half a minute. Where there is not as much, or no CUDA device has the cache,
// they go straight to the cache. Other transfers ignore it.
func Ahead() Option { return Option{kind: optionAhead} }

// TrustState makes a sequence's load hand libllama a state that nothing vouches for: one that kvferry has not saved, for a
// cache whose format is not known (Llama.Describe says "opaque"). libllama trusts what it loads: a damaged state may end the
// process, or leave cells that only clearing the whole memory frees. Other transfers ignore it.
func TrustState() Option { return Option{kind: optionTrustState} }

// AfterStream makes the transfer begin when the work that a CUDA stream (a CUstream or cudaStream_t) holds at the
// time of the call has been done. A Snapshot waits for that work with the context's lock held, since it copies under it.
func AfterStream(stream uintptr) Option { return Option{kind: optionStream, value: uint64(stream)} }

// StreamWait makes a CUDA stream (a CUstream or cudaStream_t) wait for the transfer, and then calls `then` if it is not
// nil: what the stream is given from there on begins when the transfer has ended, in whatever way. `then` runs on the
// calling goroutine as soon as the transfer has been submitted; the call notices the end of its context after it. The
// option may be given several times.
//
// Where a stream cannot wait, the transfer is cancelled and its end waited for, and the call returns ErrUnsupported (no
// CUDA device, or a driver older than 11.7), ErrInvalidArgument (a stream that no device of the engine knows) or ErrBusy
// (1,024 waits are outstanding).
func StreamWait(stream uintptr, then func()) Option {
	return Option{kind: optionStreamWait, value: uint64(stream), then: then}
}

// settings is what options come to.
type settings struct {
	priority, saveMode, loadMode, flags, loadFlags C.uint32_t
	stream                                         C.uint64_t
	waits                                          []streamWait
}

type streamWait struct {
	stream C.uint64_t
	then   func()
}

func read(options []Option) (s settings) {
	for _, option := range options {
		switch option.kind {
		case optionPriority:
			s.priority = C.uint32_t(option.value)
		case optionMode:
			s.saveMode = C.uint32_t(option.value)
		case optionAhead:
			s.loadMode = C.KVF_LOAD_AHEAD
		case optionStream:
			s.stream = C.uint64_t(option.value)
			s.flags |= C.KVF_SUBMIT_FOLLOW_STREAM
		case optionTrustState:
			s.loadFlags = C.KVF_SUBMIT_TRUST_STATE
		case optionStreamWait:
			s.waits = append(s.waits, streamWait{C.uint64_t(option.value), option.then})
		}
	}
	return s
}

// request is a transfer that somebody wants. What it holds goes to the heap with it, so that options and the box
// around Bytes, which could stay on the stack, are unpacked before.
type request struct {
	operation C.uint32_t
	owner     C.uint64_t  // the engine, or the attachment
	lock      sync.Locker // held while it is submitted; nil: none
	blocking  bool        // the lock is held until it has ended
	sequence  int32
	regions   []Region
	memory    []byte
	settings
}

// transfer submits a job and waits for its one completion, whatever happens to ctx meanwhile. Where nothing was submitted
// the Completion is the value zero.
func (e *Engine) transfer(ctx context.Context, r request) (Completion, error) {
	if ctx.Err() != nil {
		return Completion{}, cancelled(ctx)
	}
	if !e.inFlight.enter() {
		return Completion{}, &Error{Status: ErrClosed}
	}
	defer e.inFlight.leave()
	w := e.completions.get()
	defer e.completions.put(w)
	w.memory = r.memory
	start := unsafe.Pointer(unsafe.SliceData(r.memory))
	// Pinned, then told to C as a number. Memory that is not Go's is left alone by Pin.
	w.pinner.Pin(start)
	for i := range r.regions {
		w.pinner.Pin(r.regions[i].Address)
	}
	s := &w.submission
	s.operation, s.owner, s.sequence = r.operation, r.owner, C.int32_t(r.sequence)
	s.buffer, s.bytes, s.count = C.uint64_t(uintptr(start)), C.uint64_t(len(r.memory)), C.uint64_t(len(r.regions))
	s.priority, s.mode, s.flags, s.stream = r.priority, 0, r.flags, r.stream
	switch r.operation {
	case C.KVGO_SAVE_SEQUENCE:
		s.mode = r.saveMode
	case C.KVGO_LOAD_SEQUENCE:
		s.mode = r.loadMode
		s.flags |= r.loadFlags
	}
	s.error[0] = 0
	done := ctx.Done()
	// Only a job that may have to be cancelled, or waited for by a stream, needs a handle. For a stream it must stay
	// valid although the job has ended: then it is released here and not by the reader.
	w.keepsJob = len(r.waits) > 0
	s.wants_job = 0
	if done != nil || w.keepsJob {
		s.wants_job = 1
	}
	w.armed.Store(true)

	lock := r.lock
	if r.blocking {
		lock.Lock()
		defer lock.Unlock()
		lock = held{}
	}
	if err := w.submit(ctx, lock, r.regions); err != nil {
		w.armed.Store(false)
		return Completion{}, err
	}
	if w.keepsJob {
		defer C.kvgo_release(&s.job, 1)
		if err := w.makeStreamsWait(r.waits); err != nil {
			return w.result, err
		}
	}
	if done == nil {
		<-w.done
	} else {
		select {
		case <-w.done:
		case <-done:
			C.kvf_job_cancel(s.job)
			<-w.done // it still has its true outcome, and C still uses the memory until then
		}
	}
	if w.status != C.KVF_OK {
		err := &Error{Status: Status(w.status), Detail: w.detail}
		if err.Status == ErrCancelled {
			err.Cause = context.Cause(ctx)
		}
		return w.result, err
	}
	return w.result, nil
}

// makeStreamsWait returns an error, or leaves by a panic of the program's function, when the job has ended.
func (w *waiter) makeStreamsWait(waits []streamWait) error {
	job := w.submission.job
	waiting := false
	defer func() {
		if !waiting {
			C.kvf_job_cancel(job)
			<-w.done
		}
	}()
	for _, wait := range waits {
		if err := check(C.kvf_job_stream_wait(job, wait.stream)); err != nil {
			return err
		}
		if wait.then != nil {
			wait.then()
		}
	}
	waiting = true
	return nil
}

// held stands for a lock that is held already.
type held struct{}

func (held) Lock()   {}
func (held) Unlock() {}

func (w *waiter) submit(ctx context.Context, lock sync.Locker, regions []Region) error {
	if lock != nil {
		lock.Lock()
		defer lock.Unlock()
		// The context may have ended during the wait, and a load that is begun costs the sequence what it holds.
		if ctx.Err() != nil {
			return cancelled(ctx)
		}
	}
	status := C.kvgo_submit(&w.submission, (*C.kvf_region)(unsafe.Pointer(unsafe.SliceData(regions))))
	if status != C.KVF_OK {
		return failure(status, w.submission.error[:])
	}
	return nil
}
