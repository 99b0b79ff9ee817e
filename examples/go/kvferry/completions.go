package kvferry

// #include "shim.h"
import "C"

import (
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

// batch is how many completions one call takes from the queue, at most.
const batch = 256

// completions is a queue of the C library and the one goroutine that reads it. That goroutine waits for the queue's
// descriptor in Go's poller, as it would for a socket: no thread waits in C, and C never calls Go.
type completions struct {
	queue  C.kvf_queue
	file   *os.File // a duplicate of the queue's descriptor, because os.File closes the descriptor that it polls
	ended  chan struct{}
	closed atomic.Bool

	// Every waiter that was ever made. A waiter's token is its index.
	waiters atomic.Pointer[[]*waiter]
	mutex   sync.Mutex
	free    []*waiter // the last used one is taken first
}

// waiter is where one transfer waits for its completion. It is used again for later transfers, so that a transfer
// allocates nothing.
type waiter struct {
	submission C.kvgo_submission
	blockList
	memory   []byte   // keeps the memory reachable that C works on
	whole    chan int // the blocks that are whole, if the program wants to know: has room for all
	keepsJob bool     // the transfer itself releases the job's handle

	// True from before the submission until the completion. Go's memory model does not see that C calls lie between what
	// the submitter writes and what the reader reads: this flag orders the two. The channel orders the way back.
	armed  atomic.Bool
	done   chan struct{} // has room for one
	status C.int32_t
	result Completion
	detail string
}

func newCompletions() (*completions, error) {
	c := &completions{ended: make(chan struct{})}
	c.waiters.Store(new([]*waiter))
	if err := check(C.kvf_queue_create(&c.queue)); err != nil {
		return nil, err
	}
	fail := func(err error) (*completions, error) {
		C.kvf_queue_destroy(c.queue)
		return nil, err
	}
	fd := C.kvf_queue_fd(c.queue)
	if fd < 0 {
		return fail(check(fd))
	}
	duplicate, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), syscall.F_DUPFD_CLOEXEC, 0)
	if errno != 0 {
		return fail(&Error{Status: ErrSystem, Detail: "fcntl: " + errno.Error()})
	}
	c.file = os.NewFile(duplicate, "kvferry queue")
	if err := c.file.SetReadDeadline(time.Time{}); err != nil { // the poller does not have the file
		c.file.Close()
		return fail(&Error{Status: ErrSystem, Detail: err.Error()})
	}
	go c.read()
	return c, nil
}

// close ends the reader and destroys the queue. No job may be in flight.
func (c *completions) close() error {
	c.closed.Store(true)
	C.kvf_queue_wake(c.queue)
	<-c.ended
	c.file.Close()
	return check(C.kvf_queue_destroy(c.queue))
}

// read passes completions to their waiters until close.
func (c *completions) read() {
	defer close(c.ended)
	taken := make([]C.kvf_completion, batch)
	handles := make([]C.uint64_t, 0, batch)
	// The descriptor is level-triggered and Go's poller is edge-triggered. No completion is missed, because the poller
	// waits only after the queue has been found empty: a later completion is a new edge.
	drain := func(uintptr) bool {
		for {
			n := C.kvf_queue_take(c.queue, &taken[0], C.uint64_t(unsafe.Sizeof(taken[0])), batch, 0)
			if n <= 0 {
				return c.closed.Load()
			}
			handles = handles[:0]
			waiters := *c.waiters.Load()
			for i := range taken[:n] {
				completion := &taken[i]
				if waiters[completion.user_data].complete(completion) {
					handles = append(handles, completion.job)
				}
			}
			if len(handles) > 0 {
				C.kvgo_release(&handles[0], C.uint32_t(len(handles)))
			}
		}
	}
	connection, err := c.file.SyscallConn()
	if err == nil {
		err = connection.Read(drain)
	}
	if err != nil {
		panic("kvferry: the completion queue cannot be read: " + err.Error())
	}
}

// complete passes a completion, of a job or of a block, to the transfer that waits. It returns whether the reader must
// release the job's handle.
func (w *waiter) complete(completion *C.kvf_completion) bool {
	if completion.kind == C.KVF_COMPLETION_BLOCK {
		if !w.armed.Load() {
			panic("kvferry: a block is whole after its job has completed")
		}
		w.whole <- int(completion.block)
		return false
	}
	if !w.armed.Swap(false) {
		panic("kvferry: a job has completed twice")
	}
	w.status = completion.status
	w.result = Completion{
		Bytes:     int64(completion.bytes),
		Fragments: int64(completion.fragments),
		Segments:  int64(completion.segments),
		Submitted: time.Duration(completion.submitted_ns),
		Started:   time.Duration(completion.started_ns),
		Finished:  time.Duration(completion.finished_ns),
		Listed:    time.Duration(completion.listed_ns),
		Recorded:  time.Duration(completion.recorded_ns),
	}
	switch w.submission.operation {
	case C.KVGO_SAVE_SEQUENCE, C.KVGO_SAVE_BLOCKS, C.KVGO_SAVE_CHECKPOINT:
		w.result.Mode = SaveMode(completion.mode)
	case C.KVGO_LOAD_SEQUENCE, C.KVGO_LOAD_BLOCKS:
		w.result.Ahead = completion.mode == C.KVF_LOAD_AHEAD
	}
	if completion.status != C.KVF_OK {
		w.detail = goString(completion.detail[:])
	}
	toRelease := w.submission.wants_job != 0 && !w.keepsJob
	w.done <- struct{}{} // from here on w may belong to another transfer
	return toRelease
}

// get returns a waiter that no transfer uses.
func (c *completions) get() *waiter {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if n := len(c.free); n > 0 {
		w := c.free[n-1]
		c.free = c.free[:n-1]
		return w
	}
	waiters := *c.waiters.Load()
	w := &waiter{done: make(chan struct{}, 1)}
	w.submission.queue = C.uint64_t(c.queue)
	w.submission.token = C.uint64_t(len(waiters))
	// The reader may hold the older slice, which ends before the new element.
	waiters = append(waiters, w)
	c.waiters.Store(&waiters)
	return w
}

// put makes a waiter free again.
func (c *completions) put(w *waiter) {
	w.memory = nil
	w.blockList.release()
	w.whole = nil
	w.detail = ""
	c.mutex.Lock()
	c.free = append(c.free, w)
	c.mutex.Unlock()
}
