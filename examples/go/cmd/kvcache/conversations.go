package main

import (
	"context"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hybridgroup/yzma/pkg/llama"
)

// settings say what the conversations are like.
type settings struct {
	Conversations int    `json:"conversations"`
	Sequences     int    `json:"sequences"`
	Turns         int    `json:"turns"`    // of all conversations together
	Prompt        int    `json:"prompt"`   // tokens that a conversation begins with, on average
	User          int    `json:"user"`     // tokens of a later turn
	Generate      int    `json:"generate"` // tokens of an answer
	Budget        int64  `json:"budget_bytes"`
	Seed          uint64 `json:"seed"`
}

// conversation is what has been said, by both sides.
type conversation struct {
	tokens []llama.Token
	busy   bool
}

// turn is one thing that a user says to one conversation.
type turn struct {
	conversation int
	tokens       []llama.Token
}

// schedule draws the turns: the same ones for every way. Some conversations are livelier than others, by Zipf's law.
func schedule(s settings, vocabulary int) []turn {
	random := rand.New(rand.NewPCG(s.Seed, 1))
	weights, total := make([]float64, s.Conversations), 0.0
	for i := range weights {
		weights[i] = 1 / math.Pow(float64(i+1), 0.8)
		total += weights[i]
	}
	begun := make([]bool, s.Conversations)
	turns := make([]turn, s.Turns)
	for i := range turns {
		at, n := random.Float64()*total, 0
		for n < s.Conversations-1 && at >= weights[n] {
			at -= weights[n]
			n++
		}
		length := s.User
		if !begun[n] {
			begun[n] = true
			length = s.Prompt/2 + random.IntN(s.Prompt+1)
		}
		turns[i] = turn{n, make([]llama.Token, max(1, length))}
		for j := range turns[i].tokens {
			turns[i].tokens[j] = llama.Token(random.IntN(vocabulary))
		}
	}
	return turns
}

// longest is how many tokens a sequence must have room for.
func longest(s settings, turns []turn) int {
	lengths, most := make([]int, s.Conversations), 0
	for _, t := range turns {
		lengths[t.conversation] += len(t.tokens) + s.Generate
		most = max(most, lengths[t.conversation])
	}
	return most
}

// runner holds conversations: as many turns at a time as there are sequences, each in one of its own.
type runner[State any] struct {
	settings settings
	model    *model
	decoder  *decoder
	way      way[State] // nil: nothing is kept, every turn prefills again
	cache    *cache[State]
	progress func(done int)

	mutex         sync.Mutex
	changed       *sync.Cond
	conversations []conversation
	pending       []turn
	done          int
	failed        error
	figures       figures
}

// figures are what a run measures.
type figures struct {
	firsts, found []time.Duration // first tokens of all turns, and of those whose state was found
	loads, saves  []time.Duration
	held          []time.Duration // how long nothing could be decoded, for each of both
	prefilled     int
	savedBytes    int64
	loadedBytes   int64
}

func (r *runner[State]) run(ctx context.Context, turns []turn) error {
	r.changed = sync.NewCond(&r.mutex)
	r.conversations = make([]conversation, r.settings.Conversations)
	r.pending = append([]turn(nil), turns...)
	defer context.AfterFunc(ctx, func() { r.fail(ctx.Err()) })()
	var group sync.WaitGroup
	for sequence := range r.settings.Sequences {
		group.Go(func() {
			for {
				t, more := r.next()
				if !more {
					return
				}
				if err := r.turn(ctx, llama.SeqId(sequence), t); err != nil {
					r.fail(err)
				}
				r.finish(t)
			}
		})
	}
	group.Wait()
	return r.failed
}

// next waits for a turn whose conversation is not in the middle of another one. False where there are no more.
func (r *runner[State]) next() (turn, bool) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	for len(r.pending) > 0 && r.failed == nil {
		for i, t := range r.pending {
			if !r.conversations[t.conversation].busy {
				r.pending = append(r.pending[:i:i], r.pending[i+1:]...)
				r.conversations[t.conversation].busy = true
				return t, true
			}
			if i == 4*r.settings.Sequences { // a user in a hurry must not have the others wait for ever
				break
			}
		}
		r.changed.Wait()
	}
	return turn{}, false
}

func (r *runner[State]) finish(t turn) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.conversations[t.conversation].busy = false
	r.done++
	r.progress(r.done)
	r.changed.Broadcast()
}

func (r *runner[State]) fail(err error) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if r.failed == nil {
		r.failed = err
	}
	r.changed.Broadcast()
}

// turn answers one turn: the state comes back or is computed again, the answer is given, and the state is put away.
func (r *runner[State]) turn(ctx context.Context, sequence llama.SeqId, t turn) error {
	defer r.model.clear(sequence)
	c := &r.conversations[t.conversation] // ours while it is busy
	start := time.Now()
	known, err := r.restore(ctx, sequence, t.conversation)
	if err != nil {
		return err
	}
	tokens := append(c.tokens, t.tokens...)
	w := r.decoder.decode(ctx, sequence, known, tokens[known:], r.settings.Generate)
	if w.err != nil {
		return w.err
	}
	c.tokens = append(tokens, w.generated...)
	r.mutex.Lock()
	r.figures.firsts = append(r.figures.firsts, w.first.Sub(start))
	if known > 0 {
		r.figures.found = append(r.figures.found, w.first.Sub(start))
	}
	r.figures.prefilled += len(tokens) - known
	r.mutex.Unlock()
	// The answer is there. What follows happens behind the user's back, while other sequences decode.
	return r.keep(ctx, sequence, t.conversation, len(c.tokens)-1)
}

// restore loads a conversation's state, and says how many of its tokens the sequence then holds.
func (r *runner[State]) restore(ctx context.Context, sequence llama.SeqId, conversation int) (int, error) {
	if r.way == nil {
		return 0, nil
	}
	state, tokens, size, found := r.cache.take(conversation)
	if !found {
		return 0, nil
	}
	load, err := r.way.load(ctx, sequence, state)
	r.way.release(state) // it will be longer when it is saved again
	r.cache.giveUp(size)
	if err != nil {
		return 0, err
	}
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.figures.loads = append(r.figures.loads, load.took)
	r.figures.held = append(r.figures.held, load.held)
	r.figures.loadedBytes += size
	return tokens, nil
}

// keep saves a conversation's state, where the budget has room for it.
func (r *runner[State]) keep(ctx context.Context, sequence llama.SeqId, conversation, tokens int) error {
	if r.way == nil {
		return nil
	}
	size, err := r.way.size(sequence)
	if err != nil || !r.cache.reserve(int64(size)) {
		return err
	}
	state, save, err := r.way.save(ctx, sequence, size)
	if err != nil {
		r.cache.giveUp(int64(size))
		return err
	}
	r.cache.put(conversation, state, tokens, int64(size))
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.figures.saves = append(r.figures.saves, save.took)
	r.figures.held = append(r.figures.held, save.held)
	r.figures.savedBytes += int64(size)
	return nil
}
