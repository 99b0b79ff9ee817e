package main

import (
	"context"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"example.org/kvferry"
	"github.com/hybridgroup/yzma/pkg/llama"
)

// way is what becomes of a conversation between its turns. begin and end are called by one goroutine at a time, in the
// same order in every run; other sequences decode meanwhile.
type way interface {
	// begin gives a sequence to a conversation, and says how many of its tokens the sequence then holds.
	begin(ctx context.Context, sequence llama.SeqId, conversation int) (known int, err error)
	// end is called when a turn is over; the sequence holds that many tokens of the conversation.
	end(ctx context.Context, sequence llama.SeqId, conversation, tokens int) error
	figures() wayFigures
	close()
}

// wayFigures are what a way has counted and measured.
type wayFigures struct {
	counts
	loads, saves []time.Duration
	held         []time.Duration // how long nothing could be decoded, for each of both
	savedBytes   int64
	loadedBytes  int64
}

// prefillAgain keeps nothing.
type prefillAgain struct{ model *model }

func (p prefillAgain) begin(context.Context, llama.SeqId, int) (int, error) { return 0, nil }

func (p prefillAgain) end(_ context.Context, sequence llama.SeqId, _, _ int) error {
	p.model.clear(sequence)
	return nil
}

func (p prefillAgain) figures() wayFigures { return wayFigures{} }

func (p prefillAgain) close() {}

// keepInPlace leaves every conversation in its sequence until another one needs that: what a server without any cache does.
type keepInPlace struct {
	model  *model
	inside map[llama.SeqId]resident
	counts counts
}

type resident struct{ conversation, tokens int }

func newKeepInPlace(m *model) *keepInPlace {
	return &keepInPlace{model: m, inside: map[llama.SeqId]resident{}}
}

func (k *keepInPlace) begin(_ context.Context, sequence llama.SeqId, conversation int) (int, error) {
	inside, occupied := k.inside[sequence]
	if occupied && inside.conversation == conversation {
		k.counts.Hits++
		return inside.tokens, nil
	}
	k.counts.Misses++
	if occupied {
		k.counts.Evictions++
		k.model.clear(sequence)
		delete(k.inside, sequence)
	}
	return 0, nil
}

func (k *keepInPlace) end(_ context.Context, sequence llama.SeqId, conversation, tokens int) error {
	k.inside[sequence] = resident{conversation, tokens}
	return nil
}

func (k *keepInPlace) figures() wayFigures { return wayFigures{counts: k.counts} }

func (k *keepInPlace) close() {}

// cached saves every conversation's state into a cache, and loads it from there.
type cached struct {
	engine   *kvferry.Engine // its limit of memory is the cache's budget
	model    *model
	mover    mover
	states   *cache[*kvferry.Buffer]
	measured wayFigures
}

func newCached(engine *kvferry.Engine, m *model, mover mover, budget int64) *cached {
	release := func(state *kvferry.Buffer) { state.Close() }
	return &cached{engine: engine, model: m, mover: mover, states: newCache(budget, release)}
}

func (c *cached) begin(ctx context.Context, sequence llama.SeqId, conversation int) (int, error) {
	state, tokens, found := c.states.take(conversation)
	if !found {
		return 0, nil
	}
	defer state.Close() // it will be longer when it is saved again
	load, err := c.mover.load(ctx, sequence, state)
	if err != nil {
		return 0, err
	}
	c.measured.loads = append(c.measured.loads, load.took)
	c.measured.held = append(c.measured.held, load.held)
	c.measured.loadedBytes += int64(state.Len())
	return tokens, nil
}

func (c *cached) end(ctx context.Context, sequence llama.SeqId, conversation, tokens int) error {
	defer c.model.clear(sequence)
	size, err := c.mover.size(sequence)
	if err != nil || !c.states.makeRoom(wholePages(size)) {
		return err
	}
	state, err := c.engine.NewBuffer(size)
	if err != nil {
		return err
	}
	save, err := c.mover.save(ctx, sequence, state)
	if err != nil {
		state.Close()
		return err
	}
	c.states.put(conversation, state, tokens, int64(state.Cap()))
	c.measured.saves = append(c.measured.saves, save.took)
	c.measured.held = append(c.measured.held, save.held)
	c.measured.savedBytes += int64(size)
	return nil
}

// wholePages is the least that memory of so many bytes takes.
func wholePages(size int) int64 {
	page := int64(os.Getpagesize())
	return (int64(size) + page - 1) / page * page
}

func (c *cached) figures() wayFigures {
	c.measured.counts = c.states.counts
	return c.measured
}

func (c *cached) close() {
	c.states.clear()
	c.mover.close()
}

// mover is how the state of a sequence gets into memory and back: kvferry's, or llama.cpp's own.
type mover interface {
	// size is how many bytes the state of a sequence takes, known before any is moved.
	size(sequence llama.SeqId) (int, error)
	save(ctx context.Context, sequence llama.SeqId, to *kvferry.Buffer) (transfer, error)
	load(ctx context.Context, sequence llama.SeqId, from *kvferry.Buffer) (transfer, error)
	close()
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
	lock   *timedLock
}

func newFerry(engine *kvferry.Engine, m *model) (ferry, error) {
	lock := &timedLock{mutex: &m.mutex}
	attached, err := engine.Attach(uintptr(m.context), lock, kvferry.AttachOptions{})
	return ferry{engine, attached, lock}, err
}

func (f ferry) size(sequence llama.SeqId) (int, error) {
	return f.llama.Sequence(int32(sequence)).Size()
}

// Nobody waits for a save, so it is a background transfer.
func (f ferry) save(ctx context.Context, sequence llama.SeqId, to *kvferry.Buffer) (transfer, error) {
	before := f.lock.held()
	done, err := f.llama.Sequence(int32(sequence)).Save(ctx, to)
	return f.measured(done, before), err
}

// A turn waits for its load, so it is urgent.
func (f ferry) load(ctx context.Context, sequence llama.SeqId, from *kvferry.Buffer) (transfer, error) {
	before := f.lock.held()
	done, err := f.llama.Sequence(int32(sequence)).Load(ctx, from, kvferry.WithPriority(kvferry.Urgent))
	return f.measured(done, before), err
}

func (f ferry) close() { f.llama.Close() }

func (f ferry) measured(done kvferry.Completion, before time.Duration) transfer {
	held := f.lock.held() - before
	return transfer{took: max(done.Took(), held), held: held}
}

// timedLock locks the context for kvferry, and adds up for how long.
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

// plain saves and loads by llama.cpp's own calls, which block the context while bytes move.
type plain struct{ model *model }

func (p plain) size(sequence llama.SeqId) (int, error) {
	p.model.mutex.Lock()
	defer p.model.mutex.Unlock()
	return int(llama.StateSeqGetSize(p.model.context, sequence)), nil
}

func (p plain) save(_ context.Context, sequence llama.SeqId, to *kvferry.Buffer) (transfer, error) {
	return p.saveBytes(sequence, to.Bytes())
}

func (p plain) load(_ context.Context, sequence llama.SeqId, from *kvferry.Buffer) (transfer, error) {
	return p.loadBytes(sequence, from.Bytes())
}

func (p plain) close() {}

func (p plain) saveBytes(sequence llama.SeqId, state []byte) (transfer, error) {
	p.model.mutex.Lock()
	defer p.model.mutex.Unlock()
	start := time.Now()
	if n := llama.StateSeqGetData(p.model.context, state, sequence); n != uint64(len(state)) {
		return transfer{}, fmt.Errorf("llama_state_seq_get_data wrote %d bytes of %d", n, len(state))
	}
	return blocked(start), nil
}

func (p plain) loadBytes(sequence llama.SeqId, state []byte) (transfer, error) {
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
