package main

import (
	"context"
	"fmt"
	"sync"
	"time"

	"example.org/kvferry"
	"github.com/hybridgroup/yzma/pkg/llama"
)

// way is how the state of a sequence gets into memory and back: kvferry's, or llama.cpp's own.
type way[State any] interface {
	// size is how many bytes the state of a sequence takes, known before any is moved.
	size(sequence llama.SeqId) (int, error)
	save(ctx context.Context, sequence llama.SeqId, size int) (State, transfer, error)
	load(ctx context.Context, sequence llama.SeqId, state State) (transfer, error)
	release(state State)
}

// transfer is how a save or a load went, from when the context was free for it: how long it took, and for how much of
// that nothing could be decoded.
type transfer struct {
	took, held time.Duration
}

// ferry saves and loads through kvferry, while other sequences decode.
type ferry struct {
	engine *kvferry.Engine
	llama  *kvferry.Llama
}

func (f ferry) size(sequence llama.SeqId) (int, error) {
	return f.llama.Sequence(int32(sequence)).Size()
}

func (f ferry) save(ctx context.Context, sequence llama.SeqId, size int) (*kvferry.Buffer, transfer, error) {
	buffer, err := f.engine.NewBuffer(size)
	if err != nil {
		return nil, transfer{}, err
	}
	done, err := f.llama.Sequence(int32(sequence)).Save(ctx, buffer)
	if err != nil {
		buffer.Close()
		return nil, transfer{}, err
	}
	return buffer, ferried(done), nil
}

// A turn waits for its load, but nobody for a save: so the one is urgent and the other is not.
func (f ferry) load(ctx context.Context, sequence llama.SeqId, state *kvferry.Buffer) (transfer, error) {
	done, err := f.llama.Sequence(int32(sequence)).Load(ctx, state, kvferry.WithPriority(kvferry.Urgent))
	return ferried(done), err
}

// ferried: the context is held until the last fragment has been named.
func ferried(done kvferry.Completion) transfer {
	return transfer{took: done.Took(), held: done.Recorded - done.Submitted}
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

func (p *plain) save(_ context.Context, sequence llama.SeqId, size int) ([]byte, transfer, error) {
	state := p.memory(size)
	p.model.mutex.Lock()
	defer p.model.mutex.Unlock()
	start := time.Now()
	if n := llama.StateSeqGetData(p.model.context, state, sequence); n != uint64(size) {
		return nil, transfer{}, fmt.Errorf("llama_state_seq_get_data wrote %d bytes of %d", n, size)
	}
	return state, blocked(start), nil
}

func (p *plain) load(_ context.Context, sequence llama.SeqId, state []byte) (transfer, error) {
	p.model.mutex.Lock()
	defer p.model.mutex.Unlock()
	start := time.Now()
	if n := llama.StateSeqSetData(p.model.context, state, sequence); n != uint64(len(state)) {
		return transfer{}, fmt.Errorf("llama_state_seq_set_data read %d bytes of %d", n, len(state))
	}
	return blocked(start), nil
}

func blocked(start time.Time) transfer {
	took := time.Since(start)
	return transfer{took: took, held: took}
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
