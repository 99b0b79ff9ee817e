package kvferry

// #include <kvferry.h>
import "C"

import (
	"context"
	"strings"
)

// Status is why a call or a transfer did not succeed. Each Status is an error that errors.Is finds in the errors of this
// package, as in errors.Is(err, kvferry.ErrCacheFull). Numbers, names and texts are those of the C library.
type Status int32

const (
	ErrInvalidArgument  Status = C.KVF_ERR_INVALID_ARGUMENT
	ErrInvalidHandle    Status = C.KVF_ERR_INVALID_HANDLE
	ErrStructSize       Status = C.KVF_ERR_STRUCT_SIZE
	ErrOutOfMemory      Status = C.KVF_ERR_OUT_OF_MEMORY
	ErrPinnedLimit      Status = C.KVF_ERR_PINNED_LIMIT
	ErrBufferTooSmall   Status = C.KVF_ERR_BUFFER_TOO_SMALL
	ErrBusy             Status = C.KVF_ERR_BUSY
	ErrClosed           Status = C.KVF_ERR_CLOSED
	ErrCancelled        Status = C.KVF_ERR_CANCELLED
	ErrTimeout          Status = C.KVF_ERR_TIMEOUT
	ErrForked           Status = C.KVF_ERR_FORKED
	ErrUnsupported      Status = C.KVF_ERR_UNSUPPORTED
	ErrNoDevice         Status = C.KVF_ERR_NO_DEVICE
	ErrDevice           Status = C.KVF_ERR_DEVICE
	ErrDeviceLost       Status = C.KVF_ERR_DEVICE_LOST
	ErrUnreachable      Status = C.KVF_ERR_UNREACHABLE
	ErrSystem           Status = C.KVF_ERR_SYSTEM
	ErrLibraryNotFound  Status = C.KVF_ERR_LIBRARY_NOT_FOUND
	ErrLibraryAmbiguous Status = C.KVF_ERR_LIBRARY_AMBIGUOUS
	ErrTap              Status = C.KVF_ERR_TAP
	ErrContextFreed     Status = C.KVF_ERR_CONTEXT_FREED
	ErrSequenceRange    Status = C.KVF_ERR_SEQUENCE_RANGE
	ErrSequenceEmpty    Status = C.KVF_ERR_SEQUENCE_EMPTY
	ErrStateDamaged     Status = C.KVF_ERR_STATE_DAMAGED
	ErrStateMismatch    Status = C.KVF_ERR_STATE_MISMATCH
	ErrCacheFull        Status = C.KVF_ERR_CACHE_FULL
	ErrLlama            Status = C.KVF_ERR_LLAMA
	ErrInternal         Status = C.KVF_ERR_INTERNAL
)

// Error returns what the status means, as kvf_strerror does.
func (s Status) Error() string { return C.GoString(C.kvf_strerror(C.int32_t(s))) }

// Name returns the status's name in C, such as "KVF_ERR_BUSY".
func (s Status) Name() string { return C.GoString(C.kvf_status_name(C.int32_t(s))) }

// Error is a call or a transfer that has failed.
type Error struct {
	Status Status
	// Detail is one line of text that says more than the status, or "".
	Detail string
	// Cause is why the context.Context of a cancelled transfer ended: context.Canceled, context.DeadlineExceeded, or the
	// caller's own cause. errors.Is finds it too. It is nil in other errors, and where Engine.Cancel was called.
	Cause error
}

// Error returns the status's text, the detail and the cause.
func (e *Error) Error() string {
	text := e.Status.Error()
	if e.Detail != "" {
		text += ": " + e.Detail
	}
	if e.Cause != nil {
		text += ": " + e.Cause.Error()
	}
	return text
}

// Unwrap returns the status and the cause, for errors.Is and errors.As.
func (e *Error) Unwrap() []error {
	if e.Cause == nil {
		return []error{e.Status}
	}
	return []error{e.Status, e.Cause}
}

// failure makes an error of a status and the text that C wrote. The text begins with the status's own text.
func failure(status C.int32_t, text []C.char) *Error {
	err := &Error{Status: Status(status)}
	if line := goString(text); line != "" {
		err.Detail = strings.TrimPrefix(strings.TrimPrefix(line, err.Status.Error()), ": ")
	}
	return err
}

// check returns the error of a negative status, else nil.
func check(status C.int32_t) error {
	if status < 0 {
		return &Error{Status: Status(status)}
	}
	return nil
}

func cancelled(ctx context.Context) *Error {
	return &Error{Status: ErrCancelled, Cause: context.Cause(ctx)}
}

// goString reads a text that ends with a 0, or with the end of its array.
func goString(text []C.char) string {
	bytes := make([]byte, 0, len(text))
	for _, c := range text {
		if c == 0 {
			break
		}
		bytes = append(bytes, byte(c))
	}
	return string(bytes)
}
