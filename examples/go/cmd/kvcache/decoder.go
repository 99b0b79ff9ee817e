package main

import (
	"context"
	"time"

	"github.com/hybridgroup/yzma/pkg/llama"
)

// promptPart is how many tokens of a prompt go into one batch, so that a long prompt does not delay the next tokens of
// other works.
const promptPart = 128

// decoder is the one goroutine that decodes. Each of its steps decodes one batch with the next tokens of all works.
type decoder struct {
	model *model
	works chan *work
	ended chan struct{}
	steps []time.Duration // how long each step of several works took, waiting for the lock included
}

// work is what a turn wants decoded: tokens to feed, and then a number of tokens to generate.
type work struct {
	ctx      context.Context
	sequence llama.SeqId
	position int
	feed     []llama.Token
	generate int

	generated []llama.Token
	first     time.Time // when the first of them was known
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

// decode feeds tokens to a sequence from a position on, generates tokens, and returns when that is done.
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
		for more := true; more; { // works that have come in the meantime join
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

// step decodes one batch, and returns the works that go on.
func (d *decoder) step(batch *llama.Batch, active []*work) []*work {
	start := time.Now()
	active, last := d.fill(batch, active)
	if batch.NTokens == 0 {
		return active
	}
	next, err := d.decodeBatch(*batch, last)
	if len(active) > 1 && int(batch.NTokens) == len(active) { // one token of each work: steps that can be compared
		d.steps = append(d.steps, time.Since(start))
	}
	return passOn(active, next, err)
}

// fill puts the next tokens of all works into the batch. It returns the works that are not cancelled, and for each work
// whose prompt ends in the batch the index of its last token.
func (d *decoder) fill(batch *llama.Batch, active []*work) (stay []*work, last map[*work]int32) {
	batch.Clear()
	last = make(map[*work]int32)
	room := d.model.batch
	for i, w := range active {
		if w.err = w.ctx.Err(); w.err != nil {
			close(w.done)
			continue
		}
		stay = append(stay, w)
		part := min(len(w.feed), promptPart, room-(len(active)-1-i)) // each of the others gets a token at least
		for j, token := range w.feed[:part] {
			wanted := j == len(w.feed)-1
			if wanted {
				last[w] = batch.NTokens
			}
			if err := batch.Add(token, llama.Pos(w.position+j), []llama.SeqId{w.sequence}, wanted); err != nil {
				panic(err) // the batch was made for so many tokens
			}
		}
		w.feed, w.position, room = w.feed[part:], w.position+part, room-part
	}
	return stay, last
}

// decodeBatch decodes the batch, and returns the most likely next token of each work in last.
func (d *decoder) decodeBatch(batch llama.Batch, last map[*work]int32) (map[*work]llama.Token, error) {
	next := make(map[*work]llama.Token)
	d.model.mutex.Lock()
	defer d.model.mutex.Unlock()
	if err := d.model.decode(batch); err != nil {
		return next, err
	}
	for w, index := range last {
		logits, err := d.model.logits(index)
		if err != nil {
			return next, err
		}
		next[w] = largest(logits)
	}
	return next, nil
}

// passOn gives each work its next token, ends the works that are complete, and all of them after an error. It returns
// the works that go on.
func passOn(active []*work, next map[*work]llama.Token, err error) []*work {
	goOn := active[:0]
	for _, w := range active {
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
		goOn = append(goOn, w)
	}
	return goOn
}
