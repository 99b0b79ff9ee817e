package kvferry

// #include "shim.h"
import "C"

import (
	"context"
	"sync"
	"time"
	"unsafe"
)

// Completion says how a transfer went. It is the value zero where nothing was submitted.
type Completion struct {
	Bytes     int64    // size of the state, of the blocks, or of the regions
	Mode      SaveMode // of a sequence's save: the mode in which it was done
	Ahead     bool     // of a sequence's load: it was done as Ahead says
	Fragments int64    // separate pieces of tensor memory that the transfer consists of
	Segments  int64    // what remained of the fragments after joining runs and rows into blocks

	// When the transfer was submitted, when its first byte began to move (0 if none did), and when it ended. These are
	// readings of CLOCK_MONOTONIC: only differences mean anything.
	Submitted, Started, Finished time.Duration
	// Of a sequence's transfer, else 0: when libllama had taken cells and listed what to move, and when it had named
	// the last fragment.
	Listed, Recorded time.Duration
}

// Took returns the time from the submission to the end.
func (c Completion) Took() time.Duration { return c.Finished - c.Submitted }

// request is a transfer that a caller wants. Its fields go to the heap with it. So options and the interface value of a
// Memory, which can stay on the stack, are unpacked before.
type request struct {
	operation C.uint32_t  // KVGO_*
	owner     C.uint64_t  // the engine, or the attachment
	lock      sync.Locker // held during the submission; nil: none
	blocking  bool        // the lock is held until the transfer has ended
	sequence  int32
	regions   []Region
	blocks    []Block
	memory    []byte // of LoadBlocks: the checkpoint

	fingerprint string // of the model, for blocks
	settings
}

// transfer submits a job and waits for its one completion, whatever happens to ctx meanwhile. The Completion is the
// value zero where nothing was submitted.
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
	if err := w.claimBlocks(r.blocks, r.operation == C.KVGO_LOAD_BLOCKS); err != nil {
		return Completion{}, err
	}
	w.prepare(r, ctx.Done() != nil)

	lock := r.lock
	if r.blocking {
		lock.Lock()
		defer lock.Unlock()
		lock = alreadyLocked{}
	}
	err := w.submit(ctx, lock, r.regions)
	if r.operation == C.KVGO_SAVE_BLOCKS {
		w.setSizes(r.blocks, err)
		if err == nil {
			setFingerprint(r.blocks, r.fingerprint)
		}
	}
	if err != nil {
		w.armed.Store(false)
		return Completion{}, err
	}
	if w.keepsJob {
		defer C.kvgo_release(&w.submission.job, 1)
		if err := w.makeStreamsWait(r.waits); err != nil {
			return w.result, err
		}
	}
	if w.whole != nil {
		return w.waitWithBlocks(ctx, r.eachBlock)
	}
	return w.wait(ctx)
}

// prepare writes down a request for C, and pins its memory.
func (w *waiter) prepare(r request, cancellable bool) {
	w.memory = r.memory
	start := unsafe.Pointer(unsafe.SliceData(r.memory))
	// C is told the address as a number, so it must not change. Pin leaves memory alone that is not Go's.
	w.pinner.Pin(start)
	for i := range r.regions {
		w.pinner.Pin(r.regions[i].Address)
	}
	s := &w.submission
	s.operation, s.owner, s.sequence = r.operation, r.owner, C.int32_t(r.sequence)
	s.buffer, s.bytes = C.uint64_t(uintptr(start)), C.uint64_t(len(r.memory))
	s.count = C.uint64_t(len(r.regions) + len(r.blocks)) // a transfer has either
	s.priority, s.mode, s.flags, s.stream = r.priority, 0, r.flags, r.stream
	switch r.operation {
	case C.KVGO_SAVE_SEQUENCE, C.KVGO_SAVE_BLOCKS, C.KVGO_SAVE_CHECKPOINT:
		s.mode = r.saveMode
	case C.KVGO_LOAD_SEQUENCE:
		s.mode = r.loadMode
		s.flags |= r.loadFlags
	case C.KVGO_LOAD_BLOCKS:
		s.mode = r.loadMode
	}
	s.error[0] = 0
	// Only a job that may have to be cancelled, or that a stream has to wait for, needs a handle. (A function that is
	// called for each block may panic: then the job is cancelled.) For a stream the handle must stay valid when the job
	// has ended: then the transfer releases it, and not the reader of the completions.
	w.keepsJob = len(r.waits) > 0
	s.wants_job = 0
	if r.operation == C.KVGO_SAVE_BLOCKS && r.eachBlock != nil {
		s.flags |= C.KVF_SUBMIT_EACH_BLOCK
		w.whole = make(chan int, len(r.blocks))
	}
	if cancellable || w.keepsJob || w.whole != nil {
		s.wants_job = 1
	}
	w.armed.Store(true)
}

// alreadyLocked stands for a lock that the caller holds already.
type alreadyLocked struct{}

func (alreadyLocked) Lock()   {}
func (alreadyLocked) Unlock() {}

func (w *waiter) submit(ctx context.Context, lock sync.Locker, regions []Region) error {
	if lock != nil {
		lock.Lock()
		defer lock.Unlock()
		// The context may have ended while this goroutine waited for the lock, and a load that begins costs the
		// sequence what it holds.
		if ctx.Err() != nil {
			return cancelled(ctx)
		}
	}
	status := C.kvgo_submit(&w.submission, regionsPointer(regions), unsafe.SliceData(w.blocks))
	if status != C.KVF_OK {
		return failure(status, w.submission.error[:])
	}
	return nil
}

// makeStreamsWait makes streams wait for the job, and calls the program's functions. If it returns an error, or a
// function panics, the job has ended by then.
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

// wait waits for the job's completion, and cancels the job when ctx ends.
func (w *waiter) wait(ctx context.Context) (Completion, error) {
	if cancel := ctx.Done(); cancel == nil {
		<-w.done
	} else {
		select {
		case <-w.done:
		case <-cancel:
			C.kvf_job_cancel(w.submission.job)
			<-w.done // the outcome is not known yet, and C uses the memory until then
		}
	}
	return w.outcome(ctx)
}

// waitWithBlocks waits as wait does, and calls the program's function for each block that is whole. If the function
// panics, the job has ended by then.
func (w *waiter) waitWithBlocks(ctx context.Context, each func(block int)) (Completion, error) {
	job := w.submission.job
	ended := false
	defer func() {
		if !ended {
			C.kvf_job_cancel(job)
			<-w.done
		}
	}()
	tell := func(block int) {
		w.releaseBlock(block)
		each(block)
	}
	for cancel := ctx.Done(); !ended; {
		select {
		case <-w.done:
			ended = true
		case block := <-w.whole:
			tell(block)
		case <-cancel:
			C.kvf_job_cancel(job)
			cancel = nil
		}
	}
	for len(w.whole) > 0 {
		tell(<-w.whole)
	}
	return w.outcome(ctx)
}

// outcome returns how the job has ended.
func (w *waiter) outcome(ctx context.Context) (Completion, error) {
	if w.status == C.KVF_OK {
		return w.result, nil
	}
	err := &Error{Status: Status(w.status), Detail: w.detail}
	if err.Status == ErrCancelled {
		err.Cause = context.Cause(ctx)
	}
	return w.result, err
}
