package main

import (
	"context"
	"time"

	"github.com/hybridgroup/yzma/pkg/llama"
)

// A prompt is fed in parts of this many tokens, so that a long one does not hold up the others' next tokens.
const promptPart = 128

// decoder is the one goroutine that decodes: every step takes what all its works want next.
type decoder struct {
	model *model
	works chan *work
	ended chan struct{}
	steps []time.Duration // how long each took while several works were there, waiting for the lock included
}

// work is what a turn wants decoded: tokens to feed, and then some to generate.
type work struct {
	ctx      context.Context
	sequence llama.SeqId
	position int
	feed     []llama.Token
	generate int

	generated []llama.Token
	first     time.Time // when the first of them was there
	err       error
	done      chan struct{}
}

func newDecoder(m *model) *decoder {
	d := &decoder{model: m, works: make(chan *work), ended: make(chan struct{})}
	go d.run()
	return d
}

// close ends the decoder. No work may be under way.
func (d *decoder) close() {
	close(d.works)
	<-d.ended
}

// decode feeds tokens to a sequence from a position on, generates, and waits for it.
func (d *decoder) decode(ctx context.Context, sequence llama.SeqId, position int, feed []llama.Token, generate int) *work {
	w := &work{ctx: ctx, sequence: sequence, position: position, feed: feed, generate: generate, done: make(chan struct{})}
	d.works <- w
	<-w.done
	return w
}

func (d *decoder) run() {
	defer close(d.ended)
	batch := llama.BatchInit(int32(d.model.batch), 0, 1)
	defer llama.BatchFree(batch)
	var active []*work
	for {
		if len(active) == 0 {
			w, open := <-d.works
			if !open {
				return
			}
			active = append(active, w)
		}
		for more := true; more; { // whoever has come in the meantime joins
			select {
			case w := <-d.works:
				active = append(active, w)
			default:
				more = false
			}
		}
		active = d.step(&batch, active)
	}
}

// step decodes one batch and gives the works that go on.
func (d *decoder) step(batch *llama.Batch, active []*work) []*work {
	start := time.Now()
	batch.Clear()
	last := make(map[*work]int32) // the token of the batch whose logits a work waits for
	room := d.model.batch
	var stay []*work
	for i, w := range active {
		if w.err = w.ctx.Err(); w.err != nil {
			close(w.done)
			continue
		}
		stay = append(stay, w)
		part := min(len(w.feed), promptPart, room-(len(active)-1-i)) // the others get a token each
		for j, token := range w.feed[:part] {
			wanted := j == len(w.feed)-1
			if wanted {
				last[w] = batch.NTokens
			}
			if err := batch.Add(token, llama.Pos(w.position+j), []llama.SeqId{w.sequence}, wanted); err != nil {
				panic(err) // the batch was made for so many
			}
		}
		w.feed, w.position, room = w.feed[part:], w.position+part, room-part
	}
	if batch.NTokens == 0 {
		return stay
	}
	next := make(map[*work]llama.Token)
	d.model.mutex.Lock()
	err := d.model.decode(*batch)
	for w, index := range last {
		if err != nil {
			break
		}
		var logits []float32
		if logits, err = d.model.logits(index); err == nil {
			next[w] = largest(logits)
		}
	}
	d.model.mutex.Unlock()
	if len(stay) > 1 && int(batch.NTokens) == len(stay) { // a step of nothing but next tokens: comparable
		d.steps = append(d.steps, time.Since(start))
	}

	active = stay[:0]
	for _, w := range stay {
		if token, there := next[w]; there {
			if len(w.generated) == 0 {
				w.first = time.Now()
			}
			w.generated = append(w.generated, token)
			w.feed = []llama.Token{token}
		}
		// The last generated token stays out of the cache: it is fed with the next turn.
		if w.err = err; err != nil || len(w.generated) == w.generate {
			close(w.done)
			continue
		}
		active = append(active, w)
	}
	return active
}
