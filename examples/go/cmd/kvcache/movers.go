package main

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"example.org/kvferry"
	"github.com/hybridgroup/yzma/pkg/llama"
)

// mover saves the state of a sequence into memory, and loads it from there: with kvferry, or with llama.cpp's own calls.
type mover interface {
	// size returns how many bytes the state of a sequence takes. It moves none of them.
	size(sequence llama.SeqId) (int, error)
	save(ctx context.Context, sequence llama.SeqId, to *kvferry.Buffer) (transfer, error)
	load(ctx context.Context, sequence llama.SeqId, from *kvferry.Buffer) (transfer, error)
	close()
}

// transfer says how a save or a load went.
type transfer struct {
	took time.Duration // from when the context was free for it
	held time.Duration // for how much of that time nothing could be decoded
}

// plus returns what two transfers take, one after the other.
func (t transfer) plus(other transfer) transfer {
	return transfer{took: t.took + other.took, held: t.held + other.held}
}

// kvferryMover saves and loads with kvferry, while other sequences decode.
type kvferryMover struct {
	engine *kvferry.Engine
	llama  *kvferry.Llama
	lock   *timedLock
}

func newKvferryMover(engine *kvferry.Engine, m *model) (kvferryMover, error) {
	lock := &timedLock{mutex: &m.mutex}
	attached, err := engine.Attach(uintptr(m.context), lock, kvferry.AttachOptions{})
	return kvferryMover{engine, attached, lock}, err
}

func (k kvferryMover) size(sequence llama.SeqId) (int, error) {
	return k.llama.Sequence(int32(sequence)).Size()
}

// save makes a background transfer, because nobody waits for it.
func (k kvferryMover) save(ctx context.Context, sequence llama.SeqId, to *kvferry.Buffer) (transfer, error) {
	before := k.lock.held()
	done, err := k.llama.Sequence(int32(sequence)).Save(ctx, to)
	return k.measured(done, before), err
}

// load makes an urgent transfer, because a turn waits for it.
func (k kvferryMover) load(ctx context.Context, sequence llama.SeqId, from *kvferry.Buffer) (transfer, error) {
	before := k.lock.held()
	done, err := k.llama.Sequence(int32(sequence)).Load(ctx, from, kvferry.WithPriority(kvferry.Urgent))
	return k.measured(done, before), err
}

// saveBlocks makes one background transfer of all blocks. It returns how many bytes they have.
func (k kvferryMover) saveBlocks(ctx context.Context, sequence llama.SeqId, blocks []kvferry.Block) (transfer, int64, error) {
	before := k.lock.held()
	done, err := k.llama.Sequence(int32(sequence)).SaveBlocks(ctx, blocks)
	return k.measured(done, before), done.Bytes, err
}

func (k kvferryMover) saveCheckpoint(ctx context.Context, sequence llama.SeqId, to *kvferry.Buffer) (transfer, int64, error) {
	before := k.lock.held()
	done, err := k.llama.Sequence(int32(sequence)).SaveCheckpoint(ctx, to)
	return k.measured(done, before), done.Bytes, err
}

// loadBlocks makes one urgent transfer of all blocks and of the checkpoint, which is nil where none belongs.
func (k kvferryMover) loadBlocks(ctx context.Context, sequence llama.SeqId, blocks []kvferry.Block, checkpoint kvferry.Memory) (transfer, int64, error) {
	before := k.lock.held()
	done, err := k.llama.Sequence(int32(sequence)).LoadBlocks(ctx, blocks, checkpoint, kvferry.WithPriority(kvferry.Urgent))
	return k.measured(done, before), done.Bytes, err
}

func (k kvferryMover) close() { k.llama.Close() }

func (k kvferryMover) measured(done kvferry.Completion, before time.Duration) transfer {
	held := k.lock.held() - before
	return transfer{took: max(done.Took(), held), held: held}
}

// timedLock locks the context for kvferry, and measures for how long in total.
type timedLock struct {
	mutex *sync.Mutex
	since time.Time
	total atomic.Int64
}

func (l *timedLock) Lock() {
	l.mutex.Lock()
	l.since = time.Now()
}

func (l *timedLock) Unlock() {
	l.total.Add(int64(time.Since(l.since)))
	l.mutex.Unlock()
}

func (l *timedLock) held() time.Duration { return time.Duration(l.total.Load()) }

// llamaMover saves and loads with llama.cpp's own calls, which block the context while bytes move.
type llamaMover struct{ model *model }

func (l llamaMover) size(sequence llama.SeqId) (int, error) {
	l.model.mutex.Lock()
	defer l.model.mutex.Unlock()
	return int(llama.StateSeqGetSize(l.model.context, sequence)), nil
}

func (l llamaMover) save(_ context.Context, sequence llama.SeqId, to *kvferry.Buffer) (transfer, error) {
	return l.saveBytes(sequence, to.Bytes())
}

func (l llamaMover) load(_ context.Context, sequence llama.SeqId, from *kvferry.Buffer) (transfer, error) {
	return l.loadBytes(sequence, from.Bytes())
}

func (l llamaMover) close() {}

func (l llamaMover) saveBytes(sequence llama.SeqId, state []byte) (transfer, error) {
	l.model.mutex.Lock()
	defer l.model.mutex.Unlock()
	start := time.Now()
	if n := llama.StateSeqGetData(l.model.context, state, sequence); n != uint64(len(state)) {
		return transfer{}, fmt.Errorf("llama_state_seq_get_data wrote %d bytes of %d", n, len(state))
	}
	return blocked(start), nil
}

func (l llamaMover) loadBytes(sequence llama.SeqId, state []byte) (transfer, error) {
	l.model.mutex.Lock()
	defer l.model.mutex.Unlock()
	start := time.Now()
	if n := llama.StateSeqSetData(l.model.context, state, sequence); n != uint64(len(state)) {
		return transfer{}, fmt.Errorf("llama_state_seq_set_data read %d bytes of %d", n, len(state))
	}
	return blocked(start), nil
}

// blocked returns the transfer that began at start, and ends now.
func blocked(start time.Time) transfer {
	took := time.Since(start)
	return transfer{took: took, held: took}
}
