package kvferry

// #include "shim.h"
import "C"

import (
	"math"
	"unsafe"
)

// CutState cuts a state into blocks and a checkpoint, without a context: what Save, llama_state_seq_get_data or another
// program has written. It copies the bytes.
//
// Begin and End of each block say which positions it gets; the blocks are in ascending order, and need not follow one
// another. Where Memory is nil, CutState makes it. It sets the Size of each block, also where it returns
// ErrBufferTooSmall. partsInBlocks says how many parts of the state blocks hold, as Llama.PartsInBlocks does; 0 is the
// first part. The rest of the state is the checkpoint: nil for a state of plain attention. Its Position is that of the
// last block's end, so that block must reach to the end of the state.
//
// Errors: ErrStateDamaged; ErrSequenceEmpty (the state has no token at the positions of a block); ErrUnsupported (the
// state has no parts that keep every token, or several formats describe it); ErrBufferTooSmall; ErrInvalidArgument (there
// are no blocks, or they are empty, misordered or overlap; a memory is nil or has been closed).
func CutState(state Memory, blocks []Block, partsInBlocks int) (*Checkpoint, error) {
	given, buffer, err := claim(state)
	if err != nil {
		return nil, err
	}
	defer buffer.release()
	if len(blocks) == 0 {
		return nil, &Error{Status: ErrInvalidArgument, Detail: "a state is cut into at least one block"}
	}
	var sized blockList
	for i := range blocks {
		if err := sized.add(i, nil, blocks[i]); err != nil {
			return nil, err
		}
	}
	room, err := sized.cut(given, nil, partsInBlocks)
	if err != nil {
		return nil, err
	}
	made := make([]Block, len(blocks))
	var filled blockList
	defer filled.release()
	for i := range blocks {
		made[i] = blocks[i]
		made[i].Size = int(sized.blocks[i].bytes)
		blocks[i].Size = made[i].Size
		if made[i].Memory == nil {
			made[i].Memory = Bytes(make([]byte, made[i].Size))
		}
		if err := filled.claim(i, made[i], 0); err != nil {
			return nil, err
		}
	}
	rest := make([]byte, room)
	if _, err := filled.cut(given, rest, partsInBlocks); err != nil {
		return nil, err
	}
	copy(blocks, made)
	if room == 0 {
		return nil, nil
	}
	last := &blocks[len(blocks)-1]
	return &Checkpoint{Memory: Bytes(rest), Position: last.End - 1, Size: room, Key: last.Key, Fingerprint: last.Fingerprint}, nil
}

// JoinBlocks joins blocks, and a checkpoint unless that is nil, to a state that Load and llama.cpp itself take: the
// opposite of CutState. It copies the bytes.
//
// Errors: ErrStateDamaged (a block or the checkpoint is damaged, or holds other positions than it should);
// ErrStateMismatch (the blocks are not of one kind of cache; fingerprints are of several models, or keys of several
// conversations); ErrUnsupported (several formats describe the blocks); ErrInvalidArgument (there are no blocks, or they
// are misordered, overlap or leave a gap; a memory is nil or has been closed).
func JoinBlocks(blocks []Block, checkpoint Memory, partsInBlocks int) ([]byte, error) {
	if err := checkSameModel(blocks, checkpoint); err != nil {
		return nil, err
	}
	if err := checkKeys(blocks, checkpoint); err != nil {
		return nil, err
	}
	rest, buffer, err := claimCheckpoint(checkpoint)
	if err != nil {
		return nil, err
	}
	defer buffer.release()
	var list blockList
	defer list.release()
	for i := range blocks {
		if err := list.claim(i, blocks[i], blocks[i].Size); err != nil {
			return nil, err
		}
	}
	size, err := list.join(rest, nil, partsInBlocks)
	if err != nil {
		return nil, err
	}
	state := make([]byte, size)
	_, err = list.join(rest, state, partsInBlocks)
	return state, err
}

// checkSameModel refuses parts whose fingerprints differ.
func checkSameModel(blocks []Block, checkpoint Memory) error {
	known := ""
	if given, _ := checkpoint.(*Checkpoint); given != nil {
		known = given.Fingerprint
	}
	for i := range blocks {
		of := blocks[i].Fingerprint
		if of != "" && known != "" && of != known {
			return blockError(i, errOtherModel())
		}
		if of != "" {
			known = of
		}
	}
	return nil
}

func (l *blockList) cut(state, checkpoint []byte, parts int) (room int, err error) {
	bytes := C.uint64_t(len(checkpoint))
	err = withParts(parts, func(parts C.uint32_t, text *C.char, size C.uint64_t) C.int32_t {
		return C.kvgo_state_cut(unsafe.Pointer(unsafe.SliceData(state)), C.uint64_t(len(state)),
			unsafe.SliceData(l.blocks), C.uint32_t(len(l.blocks)), pointerTo(checkpoint), &bytes, parts, text, size)
	})
	return int(bytes), err
}

func (l *blockList) join(checkpoint, state []byte, parts int) (size int, err error) {
	bytes := C.uint64_t(len(state))
	err = withParts(parts, func(parts C.uint32_t, text *C.char, size C.uint64_t) C.int32_t {
		return C.kvgo_state_join(unsafe.SliceData(l.blocks), C.uint32_t(len(l.blocks)), pointerTo(checkpoint),
			C.uint64_t(len(checkpoint)), pointerTo(state), &bytes, parts, text, size)
	})
	return int(bytes), err
}

// pointerTo returns nil for no bytes: to C an address without bytes is a buffer that is too small.
func pointerTo(memory []byte) unsafe.Pointer {
	if len(memory) == 0 {
		return nil
	}
	return unsafe.Pointer(unsafe.SliceData(memory))
}

func withParts(parts int, call func(parts C.uint32_t, text *C.char, size C.uint64_t) C.int32_t) error {
	if parts < 0 || parts > math.MaxInt32 {
		return &Error{Status: ErrInvalidArgument, Detail: "partsInBlocks"}
	}
	var text [256]C.char
	if status := call(C.uint32_t(parts), &text[0], C.uint64_t(len(text))); status != C.KVF_OK {
		return failure(status, text[:])
	}
	return nil
}
