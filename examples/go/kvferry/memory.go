package kvferry

// Memory is host memory that a transfer writes or reads: a *Buffer, a Slice of a Buffer, any memory of the caller's as
// Bytes, or the memory of a *Checkpoint. A GPU copies to and from a Buffer at full speed.
//
// While a transfer is in flight its memory can be neither freed nor moved: a Buffer's Close is refused with ErrBusy,
// and Go memory is pinned and kept reachable. Bytes that do not lie in Go's heap, such as those of an mmap, are the
// caller's to keep.
type Memory interface{ isMemory() }

// Bytes is a []byte that serves as Memory.
type Bytes []byte

// Slice is a part of a Buffer. Buffer.Slice makes it.
type Slice struct {
	buffer    *Buffer
	low, high int
}

func (Bytes) isMemory()   {}
func (*Buffer) isMemory() {}
func (Slice) isMemory()   {}

// Len returns the number of bytes.
func (s Slice) Len() int { return s.high - s.low }

// claim returns the bytes of memory, and the Buffer that they belong to, or nil. That Buffer cannot be closed until
// its release.
func claim(memory Memory) ([]byte, *Buffer, error) {
	if checkpoint, is := memory.(*Checkpoint); is {
		if checkpoint == nil {
			return nil, nil, errNoMemory()
		}
		return claimPart(checkpoint.Memory, checkpoint.Size)
	}
	return claimPlain(memory)
}

// claimPart claims the first `size` bytes of the memory of a block or a checkpoint; 0: all.
func claimPart(memory Memory, size int) ([]byte, *Buffer, error) {
	bytes, buffer, err := claimPlain(memory)
	if err != nil || size == 0 {
		return bytes, buffer, err
	}
	if size < 0 || size > len(bytes) {
		buffer.release()
		return nil, nil, &Error{Status: ErrInvalidArgument, Detail: "Size is not within Memory"}
	}
	return bytes[:size], buffer, nil
}

// claimPlain is as claim, for memory other than a Checkpoint's.
func claimPlain(memory Memory) ([]byte, *Buffer, error) {
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
	return nil, nil, errNoMemory()
}

func errNoMemory() error { return &Error{Status: ErrInvalidArgument, Detail: "memory is nil"} }

func errBufferClosed() error {
	return &Error{Status: ErrInvalidArgument, Detail: "the buffer has been closed"}
}

// mapping is held around calls that map, pin or unmap memory. Such a call takes long, so Go would start a thread for
// every goroutine that is in one, and never ends these threads. More than a few calls at a time gain nothing.
var mapping = make(semaphore, 8)

type semaphore chan struct{}

func (s semaphore) acquire() { s <- struct{}{} }
func (s semaphore) release() { <-s }
