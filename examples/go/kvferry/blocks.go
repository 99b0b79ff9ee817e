package kvferry

// #include "shim.h"
import "C"

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
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
	// Key is the program's own name for all tokens of the conversation up to the end of the block, such as a chained
	// hash, in any bytes. Parent is the Key of the block before. "" is none. With both, LoadBlocks and JoinBlocks refuse
	// a block that does not follow the one before it: without them, positions alone tell.
	Key, Parent string
	// Fingerprint tells the model that the block is of, as Llama.Fingerprint does; "" if that is not known. A save sets
	// it. A load into a context of another model is refused.
	Fingerprint string
}

// Checksum returns the XXH64 of the block's bytes.
//
// Errors: ErrInvalidArgument (Memory is nil or has been closed, or Size is not within it).
func (b *Block) Checksum() (uint64, error) { return checksum(b.Memory, b.Size) }

// WriteTo writes the bytes of the block, and what the Block says of them, as a file of the Python package's
// Block.write: each package reads the files of the other. It implements io.WriterTo.
//
// Errors: those of the writer; ErrInvalidArgument (Memory is nil or has been closed, Size is not within it, or Begin or
// End is no position).
func (b *Block) WriteTo(w io.Writer) (int64, error) {
	header := partHeader{Fingerprint: orNone(b.Fingerprint)}
	if err := errors.Join(header.setPosition("begin", b.Begin), header.setPosition("end", b.End)); err != nil {
		return 0, err
	}
	header.setKey("key", b.Key)
	header.setKey("parent", b.Parent)
	bytes, buffer, err := claimPart(b.Memory, b.Size)
	if err != nil {
		return 0, err
	}
	defer buffer.release()
	return writePart(w, "block", header, bytes)
}

// ReadFrom reads what WriteTo has written, up to the end of the reader, and verifies every byte. It implements
// io.ReaderFrom. The bytes go to the beginning of Memory; if Memory is nil, to new Bytes.
//
// After an error the Block is as it was, but for the content of its Memory and, where that is too small, its Size.
//
// Errors: those of the reader; ErrStateDamaged (WriteTo has not written this, or it is truncated, or a byte has changed
// since); ErrBufferTooSmall (Size becomes what the block needs); ErrInvalidArgument (Memory has been closed).
func (b *Block) ReadFrom(r io.Reader) (int64, error) {
	var read Block
	header, memory, size, n, err := readPartInto(r, "block", b.Memory)
	if err != nil {
		if size != 0 {
			b.Size = size
		}
		return n, err
	}
	if read.Begin, err = header.position("begin"); err != nil {
		return n, err
	}
	if read.End, err = header.position("end"); err != nil {
		return n, err
	}
	if read.Key, err = header.key("key"); err != nil {
		return n, err
	}
	if read.Parent, err = header.key("parent"); err != nil {
		return n, err
	}
	read.Memory, read.Size, read.Fingerprint = memory, size, header.fingerprint()
	*b = read
	return n, nil
}

// WriteFile writes a file as WriteTo does. An existing file is replaced when the new one is completely on the disk: if
// WriteFile fails, the old file is unchanged.
//
// Errors: those of package os, and those of WriteTo.
func (b *Block) WriteFile(path string) error {
	return replaceFile(path, func(w io.Writer) error {
		_, err := b.WriteTo(w)
		return err
	})
}

// ReadFile reads a file as ReadFrom does.
//
// Errors: those of package os, and those of ReadFrom.
func (b *Block) ReadFile(path string) error { return readFile(path, b) }

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
// sets the Size of each, also where it returns ErrBufferTooSmall: then the Size is what the block needs. It sets the
// Fingerprint of each, too. The Completion's Bytes are the sum of the sizes.
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
// checkpoint's size. Of a *Checkpoint, SaveCheckpoint sets the Size and the Fingerprint.
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
	checkpoint, _ := to.(*Checkpoint)
	if checkpoint != nil {
		to = checkpoint.Memory // all of it
	}
	memory, buffer, err := claimPart(to, 0)
	if err != nil {
		return Completion{}, err
	}
	defer buffer.release()
	completion, err := s.submit(ctx, C.KVGO_SAVE_CHECKPOINT, nil, memory, settingsOf(options))
	if err == nil && checkpoint != nil {
		checkpoint.Size, checkpoint.Fingerprint = int(completion.Bytes), s.llama.fingerprint
	}
	return completion, err
}

// LoadBlocks replaces what the sequence holds by blocks, in one transfer. The sequence begins where the first block
// begins, and each other block begins where the one before it ends. The blocks may have been saved from any sequence.
//
// The cache decides whether a checkpoint is needed (Llama.BlocksAllowed). BlocksWithCheckpoints: the checkpoint is the
// one that was saved when the sequence ended where the last block ends. CheckpointsAlone: there are no blocks.
// BlocksAlone: checkpoint is nil. The memory must be exactly the checkpoint: a *Checkpoint knows its Size, and
// Buffer.Slice gives the part of a larger Buffer.
//
// LoadBlocks blocks, and can be cancelled, as Load does. Until it returns, the sequence must not be used; other sequences
// may be decoded.
//
// kvferry checks the structure of all blocks and of the checkpoint before libllama sees them, and no tensor bytes. These
// errors leave the sequence as it was, and those of which Load says so:
//   - ErrInvalidArgument: blocks are empty or misordered, overlap, or leave a gap; a checkpoint is missing, or given
//     where none belongs.
//   - ErrStateDamaged: a block or the checkpoint is damaged, or holds other positions than it should.
//   - ErrStateMismatch: also where fingerprints are of another model, or keys of several conversations.
//   - ErrUnsupported: the cache does not allow blocks.
//
// After any other error the sequence is empty.
func (s Sequence) LoadBlocks(ctx context.Context, blocks []Block, checkpoint Memory, options ...Option) (Completion, error) {
	if !s.llama.inFlight.enter() {
		return Completion{}, &Error{Status: ErrClosed}
	}
	defer s.llama.inFlight.leave()
	if err := s.llama.checkParts(blocks, checkpoint); err != nil {
		return Completion{}, err
	}
	memory, buffer, err := claimCheckpoint(checkpoint)
	if err != nil {
		return Completion{}, err
	}
	defer buffer.release()
	return s.load(ctx, C.KVGO_LOAD_BLOCKS, blocks, memory, settingsOf(options))
}

// claimCheckpoint is as claim, for memory that may be nil, or a *Checkpoint that is nil.
func claimCheckpoint(checkpoint Memory) ([]byte, *Buffer, error) {
	if given, is := checkpoint.(*Checkpoint); checkpoint == nil || is && given == nil {
		return nil, nil, nil
	}
	return claim(checkpoint)
}

// checkParts refuses blocks and a checkpoint of another model, or of several conversations.
func (l *Llama) checkParts(blocks []Block, checkpoint Memory) error {
	for i := range blocks {
		if of := blocks[i].Fingerprint; of != "" && of != l.fingerprint {
			return blockError(i, errOtherModel())
		}
	}
	if given, _ := checkpoint.(*Checkpoint); given != nil && given.Fingerprint != "" && given.Fingerprint != l.fingerprint {
		return errOtherModel()
	}
	return checkKeys(blocks, checkpoint)
}

func errOtherModel() error { return &Error{Status: ErrStateMismatch, Detail: "of another model"} }

// checkKeys refuses blocks and a checkpoint whose keys are of several conversations.
func checkKeys(blocks []Block, checkpoint Memory) error {
	differ := func(key, other string) bool { return key != "" && other != "" && key != other }
	for i := range blocks {
		if i > 0 && differ(blocks[i-1].Key, blocks[i].Parent) {
			return blockError(i, &Error{Status: ErrStateMismatch, Detail: "does not follow the block before"})
		}
	}
	given, _ := checkpoint.(*Checkpoint)
	if given != nil && len(blocks) > 0 && differ(blocks[len(blocks)-1].Key, given.Key) {
		return &Error{Status: ErrStateMismatch, Detail: "the checkpoint is of another conversation"}
	}
	return nil
}

// blockList is blocks as C takes them, and what keeps their memory in place.
type blockList struct {
	pinner  runtime.Pinner
	blocks  []C.kvf_block
	claimed []*Buffer // that each block is in; nil: in other memory, or the block is whole
}

// claimBlocks lists the blocks for C, and pins their memory. Their Buffers cannot be closed until release.
func (l *blockList) claimBlocks(blocks []Block, isLoad bool) error {
	for i := range blocks {
		size := 0 // all of Memory
		if isLoad {
			size = blocks[i].Size
		}
		if err := l.claim(i, blocks[i], size); err != nil {
			return err
		}
	}
	return nil
}

// claim adds the block at index i, with the first `size` bytes of its memory; 0: with all.
func (l *blockList) claim(i int, b Block, size int) error {
	memory, buffer, err := claimPart(b.Memory, size)
	if err != nil {
		return blockError(i, err)
	}
	l.claimed = append(l.claimed, buffer)
	return l.add(i, memory, b)
}

func (l *blockList) add(i int, memory []byte, b Block) error {
	if !isPosition(b.Begin) || !isPosition(b.End) {
		return blockError(i, &Error{Status: ErrInvalidArgument, Detail: "no such position"})
	}
	start := unsafe.Pointer(unsafe.SliceData(memory))
	if start != nil {
		l.pinner.Pin(start)
	}
	l.blocks = append(l.blocks, C.kvf_block{buffer: start, bytes: C.uint64_t(len(memory)),
		begin: C.int32_t(b.Begin), end: C.int32_t(b.End)})
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

func setFingerprint(blocks []Block, fingerprint string) {
	for i := range blocks {
		blocks[i].Fingerprint = fingerprint
	}
}

// releaseBlock lets the Buffer of a block be closed.
func (l *blockList) releaseBlock(i int) {
	l.claimed[i].release()
	l.claimed[i] = nil
}

// release unpins all memory, also memory that was pinned beside the blocks, and lets the Buffers be closed.
func (l *blockList) release() {
	l.pinner.Unpin()
	for i := range l.claimed {
		l.releaseBlock(i)
	}
	l.claimed = l.claimed[:0]
	clear(l.blocks)
	l.blocks = l.blocks[:0]
}
