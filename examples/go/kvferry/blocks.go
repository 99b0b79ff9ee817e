package kvferry

// #include "shim.h"
import "C"

import (
	"context"
	"errors"
	"fmt"
	"math"
	"unsafe"
)

// Block is the state of the tokens at the positions from Begin up to End, End not included, in the layers that keep
// every token. For plain attention a block is a state of its own, which Load and llama.cpp itself take; beside sliding
// windows or recurrent layers it is the beginning of one.
//
// A conversation that is saved in blocks of 256 tokens, say, moves after each turn only what is new, and conversations
// that begin alike can share the blocks of their beginning.
type Block struct {
	// Memory is where the bytes of the block are. The memories of one call must not overlap.
	Memory Memory
	// Begin is the first position, and End the position after the last one.
	Begin, End int
	// Size is how many bytes of Memory the block takes, from the first one on. A save sets it. For a load, 0 means all
	// of Memory.
	Size int
}

// BlocksAllowed says whether the cache of a context can be saved in blocks.
type BlocksAllowed uint32

const (
	// BlocksUnseen means that no sequence of the context has had tokens yet, so that nothing is known.
	BlocksUnseen BlocksAllowed = C.KVF_BLOCKS_UNSEEN
	// BlocksNone means neither blocks nor checkpoints: save and load whole states.
	BlocksNone BlocksAllowed = C.KVF_BLOCKS_NONE
	// CheckpointsAlone means that every layer is recurrent, and that a checkpoint is a whole state.
	CheckpointsAlone BlocksAllowed = C.KVF_BLOCKS_CHECKPOINTS_ALONE
	// BlocksWithCheckpoints means blocks, and a checkpoint at the end of the last one.
	BlocksWithCheckpoints BlocksAllowed = C.KVF_BLOCKS_WITH_CHECKPOINTS
	// BlocksAlone means blocks without checkpoints.
	BlocksAlone BlocksAllowed = C.KVF_BLOCKS_ALONE
)

// NeedBlocks returns whether a sequence is loaded from blocks.
func (a BlocksAllowed) NeedBlocks() bool { return a == BlocksAlone || a == BlocksWithCheckpoints }

// NeedCheckpoint returns whether a sequence is loaded from a checkpoint, alone or after its blocks.
func (a BlocksAllowed) NeedCheckpoint() bool {
	return a == CheckpointsAlone || a == BlocksWithCheckpoints
}

// BlocksAllowed returns what the cache allows, and in one line of text why not more: "" for BlocksAlone.
//
// Errors: ErrContextFreed, ErrClosed.
func (l *Llama) BlocksAllowed() (allowed BlocksAllowed, reason string, err error) {
	var text [256]C.char
	status := l.locked(func() C.int32_t { return C.kvf_llama_blocks_allowed(l.handle, &text[0], C.uint64_t(len(text))) })
	if err := check(status); err != nil {
		return 0, "", err
	}
	return BlocksAllowed(status), goString(text[:]), nil
}

// BlockSize returns the size in bytes of a block of a number of tokens. No byte is moved.
//
// That holds for tokens at positions of their own. Where positions repeat (the patches of an image, for a model with
// M-RoPE) or are missing, a block has as many tokens as there are cells at its positions; SaveBlocks then sets Size.
//
// Errors: ErrSequenceEmpty (no sequence of the context has had tokens yet), ErrUnsupported (the cache does not allow
// blocks), ErrInvalidArgument (tokens is not positive), ErrContextFreed, ErrClosed.
func (l *Llama) BlockSize(tokens int) (int, error) {
	if tokens < 0 || tokens > math.MaxInt32 {
		return 0, &Error{Status: ErrInvalidArgument, Detail: fmt.Sprintf("%d tokens", tokens)}
	}
	var size C.uint64_t
	err := check(l.locked(func() C.int32_t { return C.kvf_llama_block_size(l.handle, C.uint32_t(tokens), &size) }))
	return int(size), err
}

// CheckpointSize returns the size in bytes that a checkpoint of the sequence has now. No byte is moved.
//
// Errors: ErrSequenceEmpty, ErrUnsupported (the cache needs no checkpoints, or allows none), ErrSequenceRange,
// ErrContextFreed, ErrLlama, ErrClosed.
func (s Sequence) CheckpointSize() (int, error) {
	l := s.llama
	var size C.uint64_t
	err := check(l.locked(func() C.int32_t { return C.kvf_llama_checkpoint_size(l.handle, C.int32_t(s.id), &size) }))
	return int(size), err
}

// SaveBlocks saves blocks of the sequence, in one transfer: each into its own Memory of at least the block's size
// (Llama.BlockSize). The blocks are in ascending order of their positions, and need not follow one another. SaveBlocks
// sets the Size of each, also where it returns ErrBufferTooSmall: then the Size is what the block needs. The
// Completion's Bytes are the sum of the sizes.
//
// SaveBlocks blocks, and can be cancelled, as Save does. Auto is InPlace, because decoding never overwrites the
// bytes of blocks; in a cache with sliding windows it is Snapshot. The sequence may be decoded meanwhile, whatever layers
// the model has. SaveBlocks holds the context's lock
// while it records the memory of the blocks. In a unified cache that takes as long as the blocks need, and not the whole
// sequence, if another sequence of the context is empty; otherwise it takes as long as Save. The option EachBlock tells
// of each block as soon as it is whole.
//
// Errors: ErrUnsupported (the cache does not allow blocks), ErrInvalidArgument (there are no blocks; they are empty or
// misordered, or overlap), ErrSequenceEmpty (the sequence has no token at the positions of a block), ErrBufferTooSmall,
// and those of Save.
func (s Sequence) SaveBlocks(ctx context.Context, blocks []Block, options ...Option) (Completion, error) {
	if !s.llama.inFlight.enter() {
		return Completion{}, &Error{Status: ErrClosed}
	}
	defer s.llama.inFlight.leave()
	return s.submit(ctx, C.KVGO_SAVE_BLOCKS, blocks, nil, settingsOf(options))
}

// SaveCheckpoint saves a checkpoint of the sequence at its present position into memory of at least CheckpointSize
// bytes: the sliding windows and the recurrent layers, which blocks do not hold. The Completion's Bytes are the
// checkpoint's size.
//
// SaveCheckpoint blocks, and can be cancelled, as Save does. It is a Snapshot: the sequence may be decoded as soon as the
// context's lock is free again.
//
// Errors: ErrUnsupported (the cache needs no checkpoints, or allows none), and those of Save.
func (s Sequence) SaveCheckpoint(ctx context.Context, to Memory, options ...Option) (Completion, error) {
	if !s.llama.inFlight.enter() {
		return Completion{}, &Error{Status: ErrClosed}
	}
	defer s.llama.inFlight.leave()
	return s.transfer(ctx, C.KVGO_SAVE_CHECKPOINT, to, settingsOf(options))
}

// LoadBlocks replaces what the sequence holds by blocks, in one transfer. The sequence begins where the first block
// begins, and each other block begins where the one before it ends. The blocks may have been saved from any sequence.
//
// The cache decides whether a checkpoint is needed (Llama.BlocksAllowed). BlocksWithCheckpoints: the checkpoint is the
// one that was saved when the sequence ended where the last block ends. CheckpointsAlone: there are no blocks.
// BlocksAlone: checkpoint is nil. The memory must be exactly the checkpoint: Buffer.Slice gives the part of a larger
// Buffer.
//
// LoadBlocks blocks, and can be cancelled, as Load does. Until it returns, the sequence must not be used; other sequences
// may be decoded.
//
// kvferry checks the structure of all blocks and of the checkpoint before libllama sees them, and no tensor bytes. These
// errors leave the sequence as it was: ErrInvalidArgument (blocks are empty or misordered, overlap, or leave a gap; a
// checkpoint is missing, or given where none belongs), ErrStateDamaged (a block or the checkpoint is damaged, or holds
// other positions than it should), ErrUnsupported (the cache does not allow blocks), and those of which Load says so.
// After any other error the sequence is empty.
func (s Sequence) LoadBlocks(ctx context.Context, blocks []Block, checkpoint Memory, options ...Option) (Completion, error) {
	if !s.llama.inFlight.enter() {
		return Completion{}, &Error{Status: ErrClosed}
	}
	defer s.llama.inFlight.leave()
	var memory []byte
	if checkpoint != nil {
		var buffer *Buffer
		var err error
		if memory, buffer, err = claim(checkpoint); err != nil {
			return Completion{}, err
		}
		defer buffer.release()
	}
	return s.load(ctx, C.KVGO_LOAD_BLOCKS, blocks, memory, settingsOf(options))
}

// claimBlocks lists the blocks for C, and pins their memory. Their Buffers cannot be closed until releaseBlocks.
func (w *waiter) claimBlocks(blocks []Block, isLoad bool) error {
	for i := range blocks {
		b := &blocks[i]
		memory, buffer, err := claim(b.Memory)
		if err != nil {
			return blockError(i, err)
		}
		w.claimed = append(w.claimed, buffer)
		if isLoad && b.Size != 0 {
			if b.Size < 0 || b.Size > len(memory) {
				return blockError(i, &Error{Status: ErrInvalidArgument, Detail: "Size is not within Memory"})
			}
			memory = memory[:b.Size]
		}
		if !isPosition(b.Begin) || !isPosition(b.End) {
			return blockError(i, &Error{Status: ErrInvalidArgument, Detail: "no such position"})
		}
		start := unsafe.Pointer(unsafe.SliceData(memory))
		w.pinner.Pin(start)
		w.blocks = append(w.blocks, C.kvf_block{buffer: start, bytes: C.uint64_t(len(memory)),
			begin: C.int32_t(b.Begin), end: C.int32_t(b.End)})
	}
	return nil
}

func isPosition(p int) bool { return p >= 0 && p <= math.MaxInt32 }

func blockError(index int, err error) error {
	var given *Error
	if errors.As(err, &given) {
		return &Error{Status: given.Status, Detail: fmt.Sprintf("block %d: %s", index, given.Detail)}
	}
	return err
}

// setSizes sets the Size of each block to what C has written. C writes the sizes also where a memory is too small.
func (w *waiter) setSizes(blocks []Block, err error) {
	if err != nil && !errors.Is(err, ErrBufferTooSmall) {
		return
	}
	for i := range blocks {
		blocks[i].Size = int(w.blocks[i].bytes)
	}
}

// releaseBlock lets the Buffer of a block be closed.
func (w *waiter) releaseBlock(i int) {
	w.claimed[i].release()
	w.claimed[i] = nil
}

func (w *waiter) releaseBlocks() {
	for i := range w.claimed {
		w.releaseBlock(i)
	}
	w.claimed = w.claimed[:0]
	clear(w.blocks)
	w.blocks = w.blocks[:0]
}
