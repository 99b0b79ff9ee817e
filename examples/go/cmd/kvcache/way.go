package main

import (
	"context"
	"fmt"
	"sync"

	"example.org/kvferry"
	"github.com/hybridgroup/yzma/pkg/llama"
)

// way is how the state of a sequence gets into memory and back: kvferry's, or llama.cpp's own.
type way[State any] interface {
	// size is how many bytes the state of a sequence takes, known before any is moved.
	size(sequence llama.SeqId) (int, error)
	save(ctx context.Context, sequence llama.SeqId, size int) (State, error)
	load(ctx context.Context, sequence llama.SeqId, state State) error
	release(state State)
}

// ferry saves and loads through kvferry, while other sequences decode.
type ferry struct {
	engine *kvferry.Engine
	llama  *kvferry.Llama
}

func (f ferry) size(sequence llama.SeqId) (int, error) {
	return f.llama.Sequence(int32(sequence)).Size()
}

func (f ferry) save(ctx context.Context, sequence llama.SeqId, size int) (*kvferry.Buffer, error) {
	buffer, err := f.engine.NewBuffer(size)
	if err != nil {
		return nil, err
	}
	if _, err := f.llama.Sequence(int32(sequence)).Save(ctx, buffer); err != nil {
		buffer.Close()
		return nil, err
	}
	return buffer, nil
}

// A turn waits for its load, but nobody for a save: so the one is urgent and the other is not.
func (f ferry) load(ctx context.Context, sequence llama.SeqId, state *kvferry.Buffer) error {
	_, err := f.llama.Sequence(int32(sequence)).Load(ctx, state, kvferry.WithPriority(kvferry.Urgent))
	return err
}

func (f ferry) release(state *kvferry.Buffer) { state.Close() }

// plain saves and loads by llama.cpp's own calls, which block the context while bytes move.
type plain struct {
	model *model
	mutex sync.Mutex
	free  [][]byte // used again, as kvferry's buffers are
}

func (p *plain) size(sequence llama.SeqId) (int, error) {
	p.model.mutex.Lock()
	defer p.model.mutex.Unlock()
	return int(llama.StateSeqGetSize(p.model.context, sequence)), nil
}

func (p *plain) save(_ context.Context, sequence llama.SeqId, size int) ([]byte, error) {
	state := p.memory(size)
	p.model.mutex.Lock()
	defer p.model.mutex.Unlock()
	if n := llama.StateSeqGetData(p.model.context, state, sequence); n != uint64(size) {
		return nil, fmt.Errorf("llama_state_seq_get_data wrote %d bytes of %d", n, size)
	}
	return state, nil
}

func (p *plain) load(_ context.Context, sequence llama.SeqId, state []byte) error {
	p.model.mutex.Lock()
	defer p.model.mutex.Unlock()
	if n := llama.StateSeqSetData(p.model.context, state, sequence); n != uint64(len(state)) {
		return fmt.Errorf("llama_state_seq_set_data read %d bytes of %d", n, len(state))
	}
	return nil
}

func (p *plain) memory(size int) []byte {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	for i, memory := range p.free {
		if cap(memory) >= size && cap(memory) <= size+size/4 {
			p.free = append(p.free[:i], p.free[i+1:]...)
			return memory[:size]
		}
	}
	return make([]byte, size)
}

func (p *plain) release(state []byte) {
	p.mutex.Lock()
	defer p.mutex.Unlock()
	p.free = append(p.free, state)
}
