package kvferry

// #include "shim.h"
import "C"

// Priority says how a transfer shares the link with other transfers and with the work of the device. Within a priority
// the oldest transfer goes first.
type Priority uint32

const (
	// Background transfers are paced, so that decoding at the same time hardly gets slower. This is the default.
	Background Priority = C.KVF_PRIORITY_BACKGROUND
	// Urgent transfers are as fast as the link, and go before background transfers.
	Urgent Priority = C.KVF_PRIORITY_URGENT
)

// SaveMode says what the program may do with a sequence while it is being saved.
type SaveMode uint32

const (
	// Auto is Snapshot where the next decode of the sequence would overwrite what is being saved (recurrent, hybrid and
	// sliding-window models, and caches that kvferry does not know), else InPlace.
	Auto SaveMode = C.KVF_SAVE_AUTO
	// InPlace needs no memory besides the buffer. Until Save returns, the sequence must not be removed, shifted, divided
	// or copied onto. With plain attention it may be decoded meanwhile; with recurrent layers or a sliding window it may
	// not.
	InPlace SaveMode = C.KVF_SAVE_IN_PLACE
	// Snapshot copies the sequence aside first. The program may use the sequence in any way as soon as the context's
	// lock is free again: the copy is made with the lock held, because the next decode may overwrite the sequence. On a
	// GPU the copy takes about a millisecond a GB. In host memory the copy goes to the buffer and is the whole save; so
	// it is on a GPU that has too little memory for the copy.
	Snapshot SaveMode = C.KVF_SAVE_SNAPSHOT
)

// Option changes one transfer. Without any option a transfer is a Background one, and a save has the mode Auto.
type Option struct {
	kind  optionKind
	value uint64
	then  func()
	each  func(block int)
}

type optionKind uint8

const (
	optionPriority optionKind = iota
	optionMode
	optionAhead
	optionStream
	optionStreamWait
	optionTrustState
	optionEachBlock
)

// WithPriority sets the transfer's priority.
func WithPriority(p Priority) Option { return Option{kind: optionPriority, value: uint64(p)} }

// WithMode sets the mode of Sequence.Save and Sequence.SaveBlocks. Other transfers ignore it.
func WithMode(m SaveMode) Option { return Option{kind: optionMode, value: uint64(m)} }

// Ahead makes Sequence.Load and Sequence.LoadBlocks copy the bytes to device memory of their own at once, while libllama
// still takes cells, and from there to their cells. The load ends sooner, and needs as much device memory as it moves
// bytes; the engine keeps that memory for the next such load for half a minute. The bytes go straight to the cache where
// there is too little device memory, and where the cache is not in the memory of one CUDA device: Completion.Ahead tells.
// Other transfers ignore it.
func Ahead() Option { return Option{kind: optionAhead} }

// TrustState makes Sequence.Load pass a state to libllama that has no checksum: one that kvferry has not saved, for a
// cache whose format it does not know (Llama.Describe says "opaque"). libllama trusts what it loads: a damaged state may
// end the process, or leave cells that only clearing the whole memory frees. Other transfers ignore it.
func TrustState() Option { return Option{kind: optionTrustState} }

// AfterStream makes the transfer follow a CUDA stream (a CUstream or cudaStream_t): it begins when the work has been
// done that the stream holds at the time of the call. A Snapshot waits for that work with the context's lock held.
//
// While such a transfer of a sequence waits for its stream, llama_decode of other sequences may wait for the transfer,
// and the decoding goroutine holds the context's lock meanwhile. So that work of the stream must not depend on a later
// decode: a goroutine that must decode before it lets the stream go on waits for ever.
func AfterStream(stream uintptr) Option { return Option{kind: optionStream, value: uint64(stream)} }

// StreamWait makes a CUDA stream (a CUstream or cudaStream_t) wait for the transfer, and then calls `then` if it is not
// nil: work that the stream is given from there on begins when the transfer has ended, in whatever way. `then` runs on
// the calling goroutine as soon as the transfer has been submitted; the call notices the end of its context only after
// that. The option may be given several times.
//
// Where the stream cannot wait, the call cancels the transfer, waits for its end, and returns ErrUnsupported (no CUDA
// device, or a driver older than 11.7), ErrInvalidArgument (no device of the engine knows the stream) or ErrBusy (1,024
// waits are outstanding).
func StreamWait(stream uintptr, then func()) Option {
	return Option{kind: optionStreamWait, value: uint64(stream), then: then}
}

// EachBlock makes Sequence.SaveBlocks call a function for each block as soon as the block is whole, while others still
// move. The function gets the index of the block. Size of the block is set, and the block's Memory is the program's again:
// a Buffer may be closed. Other transfers ignore the option.
//
// The calls come one at a time, on the goroutine that has called SaveBlocks, and before SaveBlocks returns. They come in
// the order in which the blocks became whole: mostly in that of the blocks, but a program must not count on it. While a
// call runs, SaveBlocks does not notice the end of its context. If SaveBlocks returns an error, the function has been
// called for the blocks that were whole before. If the function panics, SaveBlocks cancels the transfer and waits for its
// end, and the panic goes on.
func EachBlock(each func(block int)) Option { return Option{kind: optionEachBlock, each: each} }

// settings are the options of one transfer, in the library's terms.
type settings struct {
	priority, saveMode, loadMode, flags, loadFlags C.uint32_t
	stream                                         C.uint64_t
	waits                                          []streamWait
	eachBlock                                      func(block int)
}

type streamWait struct {
	stream C.uint64_t
	then   func()
}

func settingsOf(options []Option) (s settings) {
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
		case optionEachBlock:
			s.eachBlock = option.each
		}
	}
	return s
}
