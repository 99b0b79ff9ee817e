package main

import (
	"context"
	"os"
	"time"

	"example.org/kvferry"
	"github.com/hybridgroup/yzma/pkg/llama"
)

// way is what a server does with a conversation between its turns. One goroutine at a time calls begin and end, in the
// same order in every run. Other sequences decode at the same time.
type way interface {
	// begin gives a sequence to a conversation, of which `said` has been said, the new turn included. It returns how many
	// of these tokens the sequence holds.
	begin(ctx context.Context, sequence llama.SeqId, conversation int, said []llama.Token) (known int, err error)
	// end is called when a turn is over, with the conversation's tokens that the sequence holds.
	end(ctx context.Context, sequence llama.SeqId, conversation int, held []llama.Token) error
	figures() wayFigures
	close()
}

// wayFigures is what a way has counted and measured.
type wayFigures struct {
	counts
	loads, saves []time.Duration
	held         []time.Duration // for how long each load and save kept all sequences from being decoded
	savedBytes   int64
	loadedBytes  int64
	keptBytes    int64 // in the cache, in the end
}

// prefillAgain keeps nothing between turns.
type prefillAgain struct{ model *model }

func (p prefillAgain) begin(context.Context, llama.SeqId, int, []llama.Token) (int, error) {
	return 0, nil
}

func (p prefillAgain) end(_ context.Context, sequence llama.SeqId, _ int, _ []llama.Token) error {
	p.model.clear(sequence)
	return nil
}

func (p prefillAgain) figures() wayFigures { return wayFigures{} }

func (p prefillAgain) close() {}

// keepInPlace leaves each conversation in its sequence until another conversation needs the sequence, as a server without
// a cache does.
type keepInPlace struct {
	model  *model
	inside map[llama.SeqId]resident
	counts counts
}

type resident struct{ conversation, tokens int }

func newKeepInPlace(m *model) *keepInPlace {
	return &keepInPlace{model: m, inside: map[llama.SeqId]resident{}}
}

func (k *keepInPlace) begin(_ context.Context, sequence llama.SeqId, conversation int, _ []llama.Token) (int, error) {
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

func (k *keepInPlace) end(_ context.Context, sequence llama.SeqId, conversation int, held []llama.Token) error {
	k.inside[sequence] = resident{conversation, len(held)}
	return nil
}

func (k *keepInPlace) figures() wayFigures { return wayFigures{counts: k.counts} }

func (k *keepInPlace) close() {}

// cached saves each conversation's state into a cache, and loads it from there.
type cached struct {
	engine   *kvferry.Engine // its PinnedLimit is the cache's budget
	model    *model
	mover    mover
	states   *cache[*kvferry.Buffer]
	measured wayFigures
}

func newCached(engine *kvferry.Engine, m *model, mover mover, budget int64) *cached {
	release := func(state *kvferry.Buffer) { state.Close() }
	return &cached{engine: engine, model: m, mover: mover, states: newCache(budget, release)}
}

func (c *cached) begin(ctx context.Context, sequence llama.SeqId, conversation int, _ []llama.Token) (int, error) {
	state, tokens, found := c.states.take(conversation)
	if !found {
		return 0, nil
	}
	defer state.Close() // the state will be longer when it is saved again
	load, err := c.mover.load(ctx, sequence, state)
	if err != nil {
		return 0, err
	}
	c.measured.loads = append(c.measured.loads, load.took)
	c.measured.held = append(c.measured.held, load.held)
	c.measured.loadedBytes += int64(state.Len())
	return tokens, nil
}

func (c *cached) end(ctx context.Context, sequence llama.SeqId, conversation int, held []llama.Token) error {
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
	c.states.put(conversation, state, len(held), int64(state.Cap()))
	c.measured.saves = append(c.measured.saves, save.took)
	c.measured.held = append(c.measured.held, save.held)
	c.measured.savedBytes += int64(size)
	return nil
}

// wholePages returns the bytes of the pages that a buffer of size bytes needs.
func wholePages(size int) int64 {
	page := int64(os.Getpagesize())
	return (int64(size) + page - 1) / page * page
}

func (c *cached) figures() wayFigures {
	c.measured.counts = c.states.counts
	c.measured.keptBytes = c.states.used
	return c.measured
}

func (c *cached) close() {
	c.states.clear()
	c.mover.close()
}
