package kvferry

// #include "shim.h"
import "C"

import (
	"context"
	"unsafe"
)

// Region is Rows rows of Width bytes in the memory of a device or of the host, and their place in a buffer. All
// numbers are bytes, except Rows. With one row the pitches are not read.
type Region struct {
	// Address of the first row. A pointer to Go memory keeps the memory reachable, and the memory is pinned during the
	// transfer. At makes a pointer from an address that Go does not know, such as one of a GPU.
	Address     unsafe.Pointer
	Width       uint64
	Rows        uint64
	Pitch       uint64 // from row to row at Address
	Offset      uint64 // of the first row in the buffer
	BufferPitch uint64 // from row to row in the buffer
}

// A []Region is passed to C as an array of kvf_region: the sizes must be equal.
var _ = [1]struct{}{}[unsafe.Sizeof(Region{})-unsafe.Sizeof(C.kvf_region{})]

// At returns the Region.Address for memory that does not belong to Go.
func At(address uintptr) unsafe.Pointer { return *(*unsafe.Pointer)(unsafe.Pointer(&address)) }

// RegionsSize returns the size in bytes of the buffer that regions need: the end of the region that reaches furthest.
// It moves nothing.
//
// Errors: ErrInvalidArgument for a malformed region.
func RegionsSize(regions []Region) (int64, error) {
	var size C.uint64_t
	err := check(C.kvf_regions_size(regionsPointer(regions), C.uint64_t(len(regions)), &size))
	return int64(size), err
}

func regionsPointer(regions []Region) *C.kvf_region {
	return (*C.kvf_region)(unsafe.Pointer(unsafe.SliceData(regions)))
}

// SaveRegions copies regions into memory. It blocks the calling goroutine until the transfer has ended: done, failed,
// or cancelled through ctx. The call waits for the end of a cancelled transfer too: when SaveRegions returns, the
// library no longer uses the memory. If the transfer was faster than the cancellation, SaveRegions returns nil.
//
// Until then the memory that the regions name must stay valid, and nothing else may touch `to`.
//
// Errors: ErrBufferTooSmall, ErrUnreachable, ErrInvalidArgument, ErrCancelled (which wraps the cause), ErrClosed,
// ErrDeviceLost.
func (e *Engine) SaveRegions(ctx context.Context, regions []Region, to Memory, options ...Option) (Completion, error) {
	return e.transferRegions(ctx, C.KVGO_SAVE_REGIONS, regions, to, settingsOf(options))
}

// LoadRegions copies memory into regions, which must not overlap: the way back from SaveRegions. It blocks as
// SaveRegions does, and returns the same errors. If it fails or is cancelled, part of the regions may have been
// written.
func (e *Engine) LoadRegions(ctx context.Context, regions []Region, from Memory, options ...Option) (Completion, error) {
	return e.transferRegions(ctx, C.KVGO_LOAD_REGIONS, regions, from, settingsOf(options))
}

func (e *Engine) transferRegions(ctx context.Context, operation C.uint32_t, regions []Region, m Memory, s settings) (Completion, error) {
	memory, buffer, err := claim(m)
	if err != nil {
		return Completion{}, err
	}
	defer buffer.release()
	return e.transfer(ctx, request{operation: operation, owner: e.handle, regions: regions, memory: memory, settings: s})
}
